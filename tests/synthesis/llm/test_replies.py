"""What instruct models reply instead of a query, on literal examples."""

import pytest

from helpers.fake_llm import FakeLLM
from helpers.queries import PROMPT, build_passages, generate
from lce_trainer.synthesis.llm.replies import kind_of_reply, without_thinking
from lce_trainer.synthesis.queries import GenerateConfig


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("how to replace the battery", "query"),
        ("the history of green tea", "query"),
        ("Is green tea healthy?", "query"),
        ("  \n", "empty"),
        ("<think>The user wants", "empty"),
        ("Sure, here is a search query:\ngreen tea", "lead_in"),
        ("Here is a query for the passage", "lead_in"),
        ("I'm sorry, but I cannot help with that.", "refusal"),
        ("As an AI language model, I have no opinion", "refusal"),
        ("The function is designed to help you sort a list of numbers.", "answer"),
        ("Yes, it can be replaced.", "answer"),
    ],
)
def test_the_kind_of_a_reply(reply, kind):
    assert kind_of_reply(reply) == kind


@pytest.mark.parametrize(
    "reply", ["<think>hm</think>\n\ngreen tea", "hm\n</think>\n\ngreen tea", "green tea<think>more"]
)
def test_thinking_is_no_part_of_a_reply(reply):
    assert without_thinking(reply) == "green tea"


class Chatting(FakeLLM):
    def reads(self, prompt):
        return [{"role": "user", "content": str(prompt)}]


@pytest.mark.parametrize(("kind", "dropped"), [(Chatting, 4), (FakeLLM, 0)])
def test_replies_of_an_instruct_model_that_are_no_queries_are_dropped_and_counted(tmp_path, kind, dropped):
    passages = build_passages(8)
    prompts = [PROMPT.render(passage=text, examples=[]) for text in passages["text"]]
    written = [
        f"The topic{i} is described by the passage above" if i % 2 else f"what is topic{i}" for i in range(len(prompts))
    ]
    llm = kind(completions={prompt: [text] for prompt, text in zip(prompts, written, strict=True)})
    _, counts, _ = generate(tmp_path, passages, llm, GenerateConfig(queries=8, roundtrip_k=0))
    assert counts["dropped_reply"] == dropped
    assert counts["kept"] == 8 - dropped
