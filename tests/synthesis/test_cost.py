"""What answers cost: counted in the journal, stopped at a budget, quoted from a sample."""

import pytest

from lce_trainer.errors import ConfigError, LLMError
from lce_trainer.synthesis.cost import Meter, QuoteReadyError, Usage, check_prices, facts, money
from lce_trainer.synthesis.journal import Journal, answer_all

PRICE = {"input": 2.0, "output": 10.0}


class Paid:
    """Ten tokens in and one out for each answer."""

    def __init__(self):
        self.usage = Usage()

    def __call__(self, batch, each):
        self.usage += Usage(calls=len(batch), tokens_in=10 * len(batch), tokens_out=len(batch))
        return [number * number for number in batch]


def run(path, llm, **settings):
    keys = [f"k{number}" for number in range(40)]
    batches = [list(range(start, start + 10)) for start in range(0, 40, 10)]
    with Journal(path) as journal:
        journal.meter = Meter(lambda: llm.usage, journal.usage, PRICE, **settings)
        return answer_all(journal, keys, batches, llm, "asking"), journal.usage


def test_a_budget_stops_before_it_is_exceeded_and_the_next_run_goes_on(tmp_path):
    batch = money(Usage(10, 100, 10), PRICE)
    first, second = Paid(), Paid()
    with pytest.raises(LLMError, match=r"llm\.budget is .* is spent.*raise llm\.budget and run the same command"):
        run(tmp_path / "journal.jsonl", first, budget=2.5 * batch)
    assert first.usage.calls == 20
    answers, usage = run(tmp_path / "journal.jsonl", second, budget=4 * batch * 1.001)
    assert answers == [number * number for number in range(40)]
    assert second.usage.calls == 20
    assert usage == Usage(calls=40, tokens_in=400, tokens_out=40)


def test_what_an_earlier_stage_spent_counts(tmp_path):
    with pytest.raises(LLMError, match="is spent"):
        run(tmp_path / "journal.jsonl", Paid(), budget=1.0, spent=1.0)


def test_a_dry_run_answers_a_sample_and_quotes_the_rest(tmp_path):
    llm = Paid()
    with pytest.raises(
        QuoteReadyError, match=r"36 calls are left of 40: about 360 tokens in, 36 out, 0 s, 0\.00108 by"
    ):
        run(tmp_path / "journal.jsonl", llm, sample=4)
    assert llm.usage.calls == 4
    _, usage = run(tmp_path / "journal.jsonl", llm)
    assert usage.calls == 40


@pytest.mark.parametrize(
    ("price", "budget"),
    [({"input": 1.0}, None), ({"input": -1.0, "output": 0.0}, None), ({}, 1.0), (PRICE, 0.0), (PRICE, float("nan"))],
)
def test_a_price_table_or_budget_that_cannot_be_used_is_refused(price, budget):
    with pytest.raises(ConfigError, match=r"llm\.(price|budget)"):
        check_prices(price, budget)


def test_a_manifest_holds_the_sums_and_what_a_kept_row_cost():
    assert facts(Usage(4, 1000, 100, 9.0, 1), PRICE, 2, "query") == {
        "calls": 4,
        "tokens_in": 1000,
        "tokens_out": 100,
        "without_text": 1,
        "money": 0.003,
        "tokens_per_kept_query": 550.0,
        "money_per_kept_query": 0.0015,
    }
