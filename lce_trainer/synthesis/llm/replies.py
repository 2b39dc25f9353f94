"""What a reply is that should have been a search query: a query, an answer, a lead-in, a refusal, or nothing."""

import re
from typing import Literal

Reply = Literal["query", "empty", "lead_in", "refusal", "answer"]

_THOUGHT = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THOUGHT_OPEN = re.compile(r"<(?:think|thinking|reasoning)>.*\Z", re.DOTALL | re.IGNORECASE)
_THOUGHT_CLOSE = re.compile(r"\A.*</(?:think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE)

_LEAD_IN = re.compile(
    r"""(?:(?:sure|certainly|of\ course|absolutely|okay|ok|great|alright)\b\s*[,!.:]
    |here(?:'s|’s|\ is|\ are)\b.*(?:quer|question|search|example|passage)
    |(?:the|a|one|this|my)\ (?:(?:possible|best|suitable|good)\ )?(?:search\ )?(?:query|question)
     \ (?:is|could|would|might|for)\b
    |based\ on\ (?:the|this|your)\ (?:passage|text|context|information)
    |i(?:'d|’d|\ would)\ (?:suggest|be\ happy|type|search)
    |let\ me\b|to\ (?:find|search\ for)\ this\b.*:$
    |.*:$)""",
    re.IGNORECASE | re.VERBOSE,
)
_REFUSAL = re.compile(
    r"""(?:(?:i(?:'m|’m|\ am)\ (?:very\ |really\ |so\ )?sorry|sorry|unfortunately|i\ apologi[sz]e|my\ apologies)\b
    |(?:(?:but|as\ an?\ (?:ai|language|large)[^,]*),?\ )?i
     \ (?:can(?:'t|’t|not|\ not)|could(?:n't|n’t|\ not)|am\ (?:not\ able|unable)
       |do(?:n't|n’t|\ not)\ (?:have|know|think))\b
    |i(?:'m|’m)\ (?:not\ able|unable|just\ an?\ ai|an\ ai)\b
    |as\ an?\ (?:ai|language\ model|large\ language)\b
    |(?:the|this)\ (?:passage|text)\ (?:does(?:n't|n’t|\ not)|is\ not|has\ no|contains\ no)\b
    |there\ is\ no\ (?:information|mention|query|question)\b
    |please\ provide\b|could\ you\ (?:please\ )?(?:provide|clarify)\b)""",
    re.IGNORECASE | re.VERBOSE,
)
# A statement about what the passage is about, rather than what someone types to find it.
_ANSWER = re.compile(
    r"""(?:yes|no)\s*[,.]\s+\S+
    |(?:the|this|these|that)\ (?:[\w'’()`.-]+\ ){1,4}
     (?:is|are|was|were|has|have|can|will|returns?|takes?|provides?|contains?|describes?|explains?|discusses|means
       |refers|allows|raises|uses|creates|checks|converts|defines|represents|specifies)\b
    |(?:it|they|you|he|she|we)
     \ (?:is|are|was|were|has|have|can|should|will|may|must|need|returns?|provides?|contains?|describes?)\b
    |(?:the\ passage|the\ text|this\ passage|this\ text|the\ author)\b""",
    re.IGNORECASE | re.VERBOSE,
)
_ASKS = re.compile(
    r"(?:\A|[,;:]\s*)(?:what|which|who|whom|whose|when|where|why|how|is|are|was|were|do|does|did|can|could|should|would|will|has|have)\b",
    re.IGNORECASE,
)
_LONGEST_TITLE = 6  # words of a keyword query that may well start with "the": "the history of green tea"


def without_thinking(text: str) -> str:
    """A reply without what the model wrote while it reasoned; nothing is left of one that never came to an end."""
    text = _THOUGHT.sub("", text)
    text = _THOUGHT_CLOSE.sub("", text)  # the opening tag was part of the prompt
    return _THOUGHT_OPEN.sub("", text).strip()


def kind_of_reply(text: str) -> Reply:
    """What a reply to "write a search query" is, by its first line.

    It goes by the wording that instruct models have in English, and takes what it does not know for a
    query: a query that is dropped costs as much as an answer that is kept.

    Args:
        text: The reply as it came.

    Returns:
        ``query``; ``empty``: no word; ``lead_in``: "Sure, here is a query:"; ``refusal``: "I'm sorry, but …";
        ``answer``: a statement, as of one who answers the passage or sums it up.
    """
    line = without_thinking(text).partition("\n")[0].strip().strip("\"'“”‘’*`").strip()
    if not re.search(r"\w", line):
        return "empty"
    if _REFUSAL.match(line):
        return "refusal"
    if _LEAD_IN.match(line):
        return "lead_in"
    if line.endswith("?") or _ASKS.search(line):
        return "query"
    if _ANSWER.match(line) and (len(line.split()) > _LONGEST_TITLE or line.endswith((".", "!"))):
        return "answer"
    return "query"
