"""What the language model's answers cost: calls, tokens, seconds, and money from the recipe's price table.

What was used stands in the journal beside the answers that it bought, so a run that was interrupted
and one that was not have the same sums.
"""

import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields

from lce_trainer.errors import ConfigError, LLMError

_MARK = "usage "  # the journal's keys of what was used start with it; those of answers are digests
_MILLION = 1e6


@dataclass(frozen=True)
class Usage:
    """What some answers cost.

    Attributes:
        calls: Prompts that were answered.
        tokens_in: Tokens of the prompts. A server's own count; 0 where it reports none.
        tokens_out: Tokens that were written.
        seconds: That answers took: of a server from the first request to the last answer, of a model that runs in
            several processes those of all of them.
        without_text: Answers that held no text.
    """

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    without_text: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(*(getattr(self, item.name) - getattr(other, item.name) for item in fields(self)))


class QuoteReadyError(Exception):
    """Ends a dry run once its sample is answered; ``str()`` is the quote in one line."""


class Meter:
    """Reads what a language model used for a journal, stops a stage at its budget, and quotes it from a sample."""

    def __init__(
        self,
        read: Callable[[], Usage],
        past: Usage,
        price: Mapping[str, float],
        *,
        budget: float | None = None,
        spent: float = 0.0,
        sample: int | None = None,
    ) -> None:
        """Start to count.

        Args:
            read: The language model's own count in this process: ``lambda: llm.usage``.
            past: What the stage used before, as its journal has it.
            price: Of a million tokens: ``input``, ``output``. Empty for none.
            budget: Money at most, that of earlier stages included; None for no limit.
            spent: Money that earlier stages took.
            sample: For a dry run, how many prompts to answer for a quote.

        Raises:
            ConfigError: As :func:`check_prices`.
        """
        check_prices(price, budget)
        self._read = read
        self._begun = read()
        self._key = f"{_MARK}{uuid.uuid4().hex}"
        self._past = past
        self._price = price
        self._budget = budget
        self._spent = spent
        self._sample = sample

    @property
    def samples(self) -> bool:
        """Whether this is a dry run, which ends with a quote."""
        return self._sample is not None

    def before(self, calls: int) -> int:
        """How many of the next calls to make.

        Args:
            calls: How many there are.

        Raises:
            LLMError: They would exceed the budget; what was paid for stays in the journal.
        """
        if self._sample is not None:
            calls = min(calls, self._sample)
        if self._budget is not None:
            past = self._past + self._read() - self._begun
            used = self._spent + money(past, self._price)
            coming = money(past, self._price) * calls / past.calls if past.calls else 0.0
            if used >= self._budget or used + coming > self._budget:
                raise LLMError(
                    f"llm.budget is {self._budget:g}: {used:.4g} is spent, and the next {calls} calls would cost about "
                    f"{coming:.2g}. All answers are kept: raise llm.budget and run the same command to go on"
                )
        return calls

    def affords(self) -> float:
        """How many more calls the budget pays for, by the mean of those so far.

        Infinite without a budget, and 0 while no call has shown what one costs.
        """
        if self._budget is None:
            return math.inf
        past = self._past + self._read() - self._begun
        if not past.calls:
            return 0.0
        left = self._budget - self._spent - money(past, self._price)
        each = money(past, self._price) / past.calls
        return max(left, 0.0) / each if each else math.inf

    def used(self) -> dict[str, dict[str, float]]:
        """Return the journal's record of what this process has used, which replaces the record before it."""
        return {self._key: asdict(self._read() - self._begun)}

    def after(self, done: int, left: int) -> None:
        """End a dry run, which has its sample.

        Args:
            done: Calls of the stage that are answered.
            left: Calls that are not.

        Raises:
            QuoteReadyError: Always.
        """
        raise QuoteReadyError(quote(self._read() - self._begun, self._price, done, left))


def check_prices(price: Mapping[str, float], budget: float | None) -> None:
    """Refuse a price table or budget that cannot be used.

    Raises:
        ConfigError: The table has other keys or no prices, or there is a budget without a table.
    """
    if price and (
        set(price) != {"input", "output"}
        or not all(isinstance(value, (int, float)) and 0 <= value < float("inf") for value in price.values())
    ):
        raise ConfigError(
            f"llm.price must be the prices of a million tokens, {{input: 0.1, output: 0.4}}, not {dict(price)!r}"
        )
    if budget is not None and (not budget > 0 or not price):
        raise ConfigError("llm.budget must be above 0, and needs llm.price: {input: …, output: …}")


def quote(sampled: Usage, price: Mapping[str, float], done: int, left: int) -> str:
    """What the rest of a stage will take, in one line, from a sample of it.

    Args:
        sampled: What the sample used.
        price: See :class:`Meter`.
        done: Calls that are answered, the sample's included.
        left: Calls that are not.
    """
    if not left:
        return f"all {done:,} calls are answered: nothing is left to pay for"
    share = left / max(sampled.calls, 1)
    rest = Usage(left, round(sampled.tokens_in * share), round(sampled.tokens_out * share), sampled.seconds * share)
    text = (
        f"{left:,} calls are left of {done + left:,}: about {rest.tokens_in:,} tokens in, {rest.tokens_out:,} out, "
        f"{_duration(rest.seconds)}"
    )
    if price:
        text += f", {money(rest, price):.4g} by llm.price"
    return f"{text} (from a sample of {sampled.calls})"


def is_usage(key: str) -> bool:
    """Whether a journal's key is of what was used, not of an answer."""
    return key.startswith(_MARK)


def money(usage: Usage, price: Mapping[str, float]) -> float:
    """The price of some tokens; 0 without a price table."""
    return (usage.tokens_in * price.get("input", 0.0) + usage.tokens_out * price.get("output", 0.0)) / _MILLION


def total(records: Iterable[Mapping[str, float]]) -> Usage:
    """The sum of what a journal recorded."""
    names = {item.name for item in fields(Usage)}
    found = Usage()
    for record in records:
        found += Usage(**{name: value for name, value in record.items() if name in names})  # type: ignore[arg-type]
    return found


def facts(usage: Usage, price: Mapping[str, float], kept: int, what: str) -> dict[str, float]:
    """What a manifest records as ``cost``: the sums, money where prices are known, and both per kept row.

    Seconds are not among them: a manifest holds no clock time, so that the same work gives the same bytes.

    Args:
        usage: Of the stage.
        price: See :class:`Meter`.
        kept: Rows that the stage kept.
        what: What a row is: ``query``, ``group``.
    """
    found: dict[str, float] = {key: value for key, value in asdict(usage).items() if key != "seconds"}
    if price:
        found["money"] = round(money(usage, price), 6)
    if kept:
        found[f"tokens_per_kept_{what}"] = round((usage.tokens_in + usage.tokens_out) / kept, 1)
        if price:
            found[f"money_per_kept_{what}"] = round(money(usage, price) / kept, 8)
    return found


def summary(usage: Usage, price: Mapping[str, float]) -> str:
    """The sums in one line, for the log."""
    text = f"{usage.calls:,} calls, {usage.tokens_in:,} tokens in, {usage.tokens_out:,} out, {_duration(usage.seconds)}"
    text += f", {usage.without_text:,} answers without text" if usage.without_text else ""
    return f"{text}, {money(usage, price):.4g} by llm.price" if price else text


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
