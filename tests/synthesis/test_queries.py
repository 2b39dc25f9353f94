import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from helpers.fake_llm import FakeLLM
from helpers.paths import TESTS
from helpers.queries import PROMPT, build_passages, generate, generate_file, plan
from lce_trainer.errors import LLMError
from lce_trainer.synthesis.journal import Journal
from lce_trainer.synthesis.prompts import load_prompt
from lce_trainer.synthesis.queries import (
    QUERIES_FEATURES,
    GenerateConfig,
    clean_query,
    cut_words,
    generate_queries,
    plan_batches,
)
from lce_trainer.synthesis.retrieval.bm25 import BM25Index
from lce_trainer.synthesis.retrieval.hybrid import FirstStage


def test_each_query_names_its_source_prompt_and_model(tmp_path):
    passages = build_passages(20)
    queries, counts, _ = generate(tmp_path, passages, FakeLLM(completions=plan(passages)), GenerateConfig(queries=20))
    assert queries.features == QUERIES_FEATURES
    assert counts["written"] == counts["kept"] == len(queries) == 20
    assert len(set(queries["query_id"])) == 20
    for row in queries:
        assert f"topic{row['source_passage_id'][1:]}" in row["query"].split()
        assert (row["style"], row["prompt_digest"], row["model"]) == ("query", PROMPT.digest, "fake")


def test_killed_generation_resumes_to_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    generate_file(whole, None)
    code = "import sys, pathlib, helpers.queries as q; q.generate_file(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    for batches in (1, 2):
        run = subprocess.run(
            [sys.executable, "-c", code, str(killed), str(batches)],
            cwd=TESTS,
            capture_output=True,
            text=True,
        )
        assert run.returncode == -9, run.stderr
        assert not (killed / "queries.parquet").exists()
    assert len((killed / "asked.jsonl").read_text().splitlines()) == 3 * 128
    generate_file(killed, None)
    asked = (killed / "asked.jsonl").read_text().splitlines()
    assert sorted(asked) == sorted((whole / "asked.jsonl").read_text().splitlines())
    assert len(asked) == len(set(asked)) == 400
    assert (killed / "queries.parquet").read_bytes() == (whole / "queries.parquet").read_bytes()


def test_more_queries_go_on_where_fewer_ended(tmp_path):
    passages = build_passages()
    few, *_ = generate(tmp_path, passages, FakeLLM(completions=plan(passages)), GenerateConfig(queries=70))
    llm = FakeLLM(completions=plan(passages))
    more, *_ = generate(tmp_path, passages, llm, GenerateConfig(queries=200))
    assert len(llm.asked) == 130
    assert more.select(range(len(few))).to_list() == few.to_list()


def test_sources_are_drawn_uniformly(tmp_path):
    passages = build_passages(200)
    first_stage = FirstStage(len(passages), BM25Index.build(passages, tmp_path / "bm25"), None)
    lengths = {key: len(text) for key, text in zip(passages["passage_id"], passages["text"], strict=True)}
    means = []
    for seed in range(30):
        with Journal(tmp_path / f"{seed}.jsonl") as journal:
            llm = FakeLLM(completions=plan(passages))
            queries, *_ = generate_queries(
                passages, llm, PROMPT, GenerateConfig(queries=50), seed, journal, first_stage
            )
        assert len(set(queries["source_passage_id"])) == 50
        means.append(np.mean([lengths[key] for key in queries["source_passage_id"]]))
    values = np.array(list(lengths.values()))
    assert abs(np.mean(means) - values.mean()) < 4 * values.std() / np.sqrt(30 * 50)


@pytest.mark.parametrize("change", [{"seed": 6}, {"temperature": 0.1}, {"name": "another"}, {"max_new_tokens": 9}])
def test_whatever_an_answer_depends_on_is_asked_anew_when_it_changes(tmp_path, change):
    passages = build_passages(10)
    generate(tmp_path, passages, FakeLLM(completions=plan(passages)), GenerateConfig(queries=10))
    llm = FakeLLM(completions=plan(passages), name=change.get("name", "fake"))
    config = GenerateConfig(queries=10, **{k: v for k, v in change.items() if k not in ("seed", "name")})
    generate(tmp_path, passages, llm, config, seed=change.get("seed", 5))
    assert len(llm.asked) == 10


def test_sampling_seeds_are_stable_and_differ_by_passage_and_number(tmp_path):
    passages = build_passages(40)
    llm = FakeLLM(completions=plan(passages))
    generate(tmp_path, passages, llm, GenerateConfig(queries=40, per_passage=3))
    assert len(set(llm.seeds)) == 120
    assert all(0 <= seed < 2**63 for seed in llm.seeds)
    # Of (5, "p0", 0): it must not change with the version of Python or numpy.
    assert 1288695871932803117 in llm.seeds


def test_any_prefix_of_the_batches_is_a_fair_sample():
    """Of pairs whose passages are unlike in length and in how many queries they meet."""
    rng = np.random.default_rng(0)
    meets = rng.geometric(0.3, 150)
    passage = np.repeat(np.arange(150), meets)
    lengths = rng.lognormal(4, 1, 150).astype(int)

    def bias(plan_of):
        """Mean of what the first batches hold, less the mean of all, in standard errors, by prefix."""
        worst = 0.0
        for measure in (lengths, meets):
            sums, counts = [], []
            for seed in range(400):
                shuffled = np.random.default_rng((1, seed)).permutation(passage)
                plan = plan_of(shuffled.tolist(), seed)[:12]
                sums.append(np.cumsum([measure[shuffled[batch]].sum() for batch in plan]))
                counts.append(np.cumsum([len(batch) for batch in plan]))
            # The ratio of the sums is unbiased where the mean of the ratios is not.
            off = np.array(sums) - measure[passage].mean() * np.array(counts)
            worst = max(worst, np.abs(off.mean(axis=0) / (off.std(axis=0) / 20 + 1e-9)).max())
        return worst

    def as_they_appear(shuffled, seed):
        order = np.argsort([shuffled.index(one) for one in shuffled], kind="stable")
        return [order[i : i + 16] for i in range(0, len(order), 16)]

    def shortest_first(shuffled, seed):
        order = np.argsort(lengths[shuffled], kind="stable")
        return [order[i : i + 16] for i in range(0, len(order), 16)]

    assert bias(lambda shuffled, seed: plan_batches(shuffled, seed, size=16, window=2)) < 4
    assert bias(as_they_appear) > 10
    assert bias(shortest_first) > 10


def test_batches_hold_every_item_once_and_what_belongs_together():
    belongs = np.random.default_rng(0).integers(0, 150, 500).tolist() + ["large"] * 40
    batches = plan_batches(belongs, seed=1, size=16, window=1000)
    assert sorted(item for batch in batches for item in batch) == list(range(540))
    assert max(map(len, batches)) == 16
    assert np.mean([len(batch) for batch in batches]) > 13
    pieces = Counter(group for batch in batches for group in {belongs[item] for item in batch})
    assert pieces.pop("large") in (3, 4)
    assert set(pieces.values()) == {1}


def test_half_of_what_is_done_are_windows_done_whole():
    batches = plan_batches(range(2000), seed=1, size=16, window=2)
    for done in range(1, len(batches)):
        items = sorted(item for batch in batches[:done] for item in batch)
        whole = next((place for place, item in enumerate(items) if place != item), len(items))
        assert whole >= len(items) / 2 - 32


def test_more_items_leave_whole_windows_as_they_are():
    belongs = np.random.default_rng(0).integers(0, 100, 500).tolist()
    few, more = plan_batches(belongs[:300], 1, size=16, window=4), plan_batches(belongs, 1, size=16, window=4)
    first = next(place for place, batch in enumerate(more) if max(batch) >= 64 + 128)
    assert first > 8 and few[:first] == more[:first]


@pytest.mark.parametrize(
    ("written", "query"),
    [
        (" what is a moon\n\nPassage: next", "what is a moon"),
        ("\n\nwhat is  a moon", "what is a moon"),
        ('"what is a moon?"', "what is a moon?"),
        ("“what is a moon”", "what is a moon"),
        ("1. what is a moon", "what is a moon"),
        ("- (2) what is a moon", "what is a moon"),
        ("Query: what is a moon", "what is a moon"),
        ("Search query 1: 'what is a moon'", "what is a moon"),
        ("**Question: what is a moon**", "what is a moon"),
        ('"what is a moon', "what is a moon"),
        ("what does *args mean", "what does *args mean"),
        ("3 phases of the moon", "3 phases of the moon"),
        ("query a database", "query a database"),
        ("what is the moon's age", "what is the moon's age"),
        ('how to print "hello"', 'how to print "hello"'),
        ("3.5 inch disk", "3.5 inch disk"),
        ("  \n ", ""),
    ],
)
def test_a_query_is_the_first_line_without_bullet_number_label_or_quotes(written, query):
    assert clean_query(written) == query


def test_every_reason_to_drop_is_counted(tmp_path):
    passages = build_passages(9)
    text = passages["text"]
    answers = {
        0: "what is topic0",
        1: " \n ",
        2: "?!.",
        3: "topic3",
        4: " ".join(["what is topic4"] * 9),
        5: "explain " + " ".join(text[5].split()[:6]),
        6: "why does Green tea stay green?",
        7: "foxtrot of nothing",
        8: "What is TOPIC0",
    }
    prompt = load_prompt("query")
    prompts = {prompt.render(passage=one, examples=[]): [answers[i]] for i, one in enumerate(text)}
    # Query 8 duplicates query 0 but leads to passage 0 only, so the round trip has to be off to see it.
    config = GenerateConfig(queries=9, max_copied_words=5, roundtrip_k=0)
    _, counts, _ = generate(tmp_path, passages, FakeLLM(completions=prompts), config, prompt=prompt)
    assert counts == {
        "written": 9,
        "kept": 2,
        "dropped_empty": 2,
        "dropped_reply": 0,
        "dropped_too_short": 1,
        "dropped_too_long": 1,
        "dropped_copied": 1,
        "dropped_echo": 1,
        "dropped_roundtrip": 0,
        "dropped_duplicate": 1,
    }
    config = GenerateConfig(queries=9, max_copied_words=5, roundtrip_k=1)
    queries, counts, _ = generate(tmp_path, passages, FakeLLM(completions=prompts), config, prompt=prompt)
    assert queries["query"][:] == ["what is topic0"]
    assert counts["dropped_roundtrip"] == 2
    assert sum(counts.values()) == 2 * counts["written"]


def test_copying_as_many_words_as_allowed_is_kept(tmp_path):
    passages = build_passages(6)
    config = GenerateConfig(queries=6, max_copied_words=5, roundtrip_k=0)
    copies = plan(passages, lambda i: [" ".join(passages["text"][i].split()[: 5 if i % 2 else 6]).upper()])
    long = sum(i % 2 == 0 and len(text.split()) > 5 for i, text in enumerate(passages["text"]))
    _, counts, _ = generate(tmp_path, passages, FakeLLM(completions=copies), config)
    assert counts["dropped_copied"] == long > 0
    assert counts["kept"] == 6 - long


def test_an_example_of_the_users_that_comes_back_is_an_echo(tmp_path):
    passages = build_passages(4)
    examples = [{"passage": "x", "query": "how far is the moon"}]
    prompts = {
        PROMPT.render(passage=text, examples=examples): ["How far is the moon?" if i else "what is topic0"]
        for i, text in enumerate(passages["text"])
    }
    config = GenerateConfig(queries=4, examples=examples, roundtrip_k=0)
    _, counts, _ = generate(tmp_path, passages, FakeLLM(completions=prompts), config)
    assert (counts["kept"], counts["dropped_echo"]) == (1, 3)


def test_a_model_that_writes_nothing_usable_is_an_error_that_says_so(tmp_path):
    passages = build_passages(4)
    llm = FakeLLM(completions=plan(passages, lambda i: ["..."]))
    with pytest.raises(LLMError, match=r"none of the 4 queries that fake wrote is usable \(4 empty"):
        generate(tmp_path, passages, llm, GenerateConfig(queries=4))


def test_a_long_passage_is_shown_to_its_first_words_with_its_white_space():
    assert cut_words("Title\na b  c d", 3) == "Title\na b"
    assert cut_words("a b", 3) == "a b"
    assert cut_words("", 3) == ""
