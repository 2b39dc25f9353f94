import math
import re
import subprocess
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest

from helpers.fake_llm import FakeLLM
from helpers.labeling import LIKELIHOOD, HashedJudge, label_by, label_file, scattered
from helpers.paths import SHARED_DATA, TESTS
from lce_trainer.errors import ConfigError, LabelError
from lce_trainer.groups.schema import GROUPS_FEATURES, validate_groups
from lce_trainer.model.reranker import Reranker
from lce_trainer.synthesis.journal import Journal
from lce_trainer.synthesis.labeling import LabelConfig, check_judge, label_candidates, load_judge, standardize
from lce_trainer.synthesis.prompts import Prompt
from lce_trainer.synthesis.retrieval.bm25 import BM25Index
from lce_trainer.synthesis.retrieval.hybrid import FirstStage, MineConfig
from lce_trainer.synthesis.retrieval.mining import mine_candidates

VERDICT = Prompt("verdict.jinja", "Passage: {{ passage }}\nQuery: {{ query }}\nAnswered:")
PASSAGES = datasets.Dataset.from_dict(
    {"passage_id": list("abcdef"), "text": [f"{name} one two three" for name in "abcdef"]}
)


def mined(found, query_ids=("q",), source="a"):
    n = len(query_ids)
    return datasets.Dataset.from_dict(
        {
            "query_id": list(query_ids),
            "query": [f"what is {query_id}" for query_id in query_ids],
            "source_passage_id": [source] * n,
            "passage_ids": [list(found)] * n,
            "found_by": [["bm25"] * len(found)] * n,
            "ranks": [list(range(1, len(found) + 1))] * n,
        }
    )


def likelihoods(scores, query="what is q"):
    return FakeLLM(
        scores={
            (LIKELIHOOD.render(passage=f"{name} one two three", examples=[]), f" {query}"): score
            for name, score in scores.items()
        }
    )


def verdicts(said):
    return FakeLLM(
        choices={
            VERDICT.render(passage=f"{name} one two three", query="what is q", examples=[]): (
                None if yes is None else [yes, 1 - yes]
            )
            for name, yes in said.items()
        }
    )


def label(tmp_path, llm, config=None, *, found="abcdef", prompt=LIKELIHOOD, seed=0):
    with Journal(tmp_path / "journal.jsonl") as journal:
        config = replace(config or LabelConfig(), random=0)
        tables, counts, facts = label_by(llm, mined(found), PASSAGES, config, journal, seed, prompt)
    return tables["train"], counts, facts


def in_deviations(*scores):
    """Scores less their mean, over their standard deviation."""
    return [(score - np.mean(scores)) / np.std(scores) for score in scores]


def test_what_explains_the_query_as_well_as_its_source_is_no_negative(tmp_path):
    llm = likelihoods({"a": -2.0, "b": -3.0, "c": -1.5, "d": -2.0, "e": -2.1, "f": -4.0})
    all_scores = in_deviations(-2.0, -3.0, -1.5, -2.0, -2.1, -4.0)
    groups, counts, facts = label(tmp_path, llm)
    assert groups.features == GROUPS_FEATURES
    assert groups.to_list() == [
        {
            "query_id": "q",
            "query": "what is q",
            "passage_ids": ["a", "b", "e", "f"],
            "passages": [f"{name} one two three" for name in "abef"],
            "labels": [1.0, 0.0, 0.0, 0.0],
            "scores": pytest.approx([all_scores[place] for place in (0, 1, 4, 5)]),
        }
    ]
    assert counts == {
        "queries": 1,
        "pairs_judged": 6,
        "source_rejected": 0,
        "source_abstained": 0,
        "promoted": 0,
        "dropped_as_good_as_source": 2,
        "kept_as_good_as_source": 0,
        "dropped_abstained": 0,
        "dropped_undecided": 0,
        "negatives_not_taken": 0,
        "groups_without_negative": 0,
        "negatives": 3,
        "groups": 1,
    }
    assert facts["source_first"] == {"judge": 0.0, "teacher": 0.0}


def test_margins_drop_what_is_near_and_promote_what_is_better(tmp_path):
    llm = likelihoods({"a": -2.0, "b": -3.0, "c": -1.4, "d": -2.0, "e": -2.1, "f": -4.0})
    # One standard deviation of these is 0.85 nats.
    groups, counts, _ = label(tmp_path, llm, LabelConfig(drop_margin=0.5, promote_margin=0.5))
    assert groups["passage_ids"][0] == ["a", "c", "b", "f"]
    assert groups["labels"][0] == [1.0, 1.0, 0.0, 0.0]
    assert (counts["promoted"], counts["dropped_as_good_as_source"]) == (1, 2)


FALSE_NEGATIVES = [
    (LIKELIHOOD, "likelihood", None, "a", "bef", {"dropped_as_good_as_source": "cd"}),
    (LIKELIHOOD, "likelihood", "drop", "a", "bef", {"dropped_as_good_as_source": "cd"}),
    (LIKELIHOOD, "likelihood", "keep", "a", "bcdef", {"kept_as_good_as_source": "cd"}),
    (LIKELIHOOD, "likelihood", "promote", "ac", "bef", {"promoted": "c", "dropped_as_good_as_source": "d"}),
    (VERDICT, "verdict", None, "acd", "bf", {"promoted": "cd", "undecided": "e"}),
    (VERDICT, "verdict", "promote", "acd", "bf", {"promoted": "cd", "undecided": "e"}),
    (VERDICT, "verdict", "drop", "a", "bf", {"dropped_as_good_as_source": "cd", "undecided": "e"}),
    (VERDICT, "verdict", "keep", "a", "bcdf", {"kept_as_good_as_source": "cd", "undecided": "e"}),
]


@pytest.mark.parametrize(("prompt", "judge", "mode", "positives", "negatives", "reasons"), FALSE_NEGATIVES)
def test_what_is_as_relevant_as_the_source_is_dropped_promoted_or_kept_and_recorded(
    tmp_path, prompt, judge, mode, positives, negatives, reasons
):
    llm = likelihoods({"a": -2.0, "b": -3.0, "c": -1.5, "d": -2.0, "e": -2.1, "f": -4.0})
    if judge == "verdict":
        llm = verdicts({"a": 0.9, "b": 0.1, "c": 0.8, "d": 0.7, "e": 0.5, "f": 0.0})
    config = LabelConfig(judge=judge, false_negatives=mode, random=0)
    with Journal(tmp_path / "j") as journal:
        tables, counts, _ = label_by(llm, mined("abcdef"), PASSAGES, config, journal, 0, prompt)
    (group,) = tables["train"].to_list()
    assert group["passage_ids"] == [*positives, *negatives]
    assert group["labels"] == [1.0] * len(positives) + [0.0] * len(negatives)
    judged = {row["passage_id"]: row for row in tables["judged"]}
    assert len(judged) == 6  # whatever became of them
    for reason, passages in reasons.items():
        assert "".join(key for key in judged if judged[key]["reason"] == reason) == passages
        assert counts.get(reason, counts.get(f"dropped_{reason}")) == len(passages)
    for name in ("promoted", "dropped_as_good_as_source", "kept_as_good_as_source"):
        assert counts[name] == len(reasons.get(name, ""))
    assert judged["a"]["reason"] == "source"
    assert judged["c"]["label"] == ("positive" if "c" in positives else "negative" if "c" in negatives else "left out")


def test_a_margin_for_promoting_without_promoting_is_refused():
    with pytest.raises(ConfigError, match=r"label\.promote_margin is for label\.false_negatives=promote, and that is"):
        LabelConfig(promote_margin=0.5, false_negatives="drop")


def test_a_verdict_between_the_thresholds_or_none_is_dropped(tmp_path):
    llm = verdicts({"a": 0.9, "b": 0.6, "c": 0.3, "d": None, "e": 0.45, "f": 0.0})
    groups, counts, _ = label(tmp_path, llm, LabelConfig(judge="verdict"), prompt=VERDICT)
    assert groups["passage_ids"][0] == ["a", "b", "c", "f"]
    assert groups["labels"][0] == [1.0, 1.0, 0.0, 0.0]
    odds = in_deviations(*(np.log(p / (1 - p)) for p in (0.9, 0.6, 0.3, 0.45, 1e-4)))
    assert groups["scores"][0] == pytest.approx([odds[place] for place in (0, 1, 2, 4)])
    assert counts == {
        "queries": 1,
        "pairs_judged": 6,
        "source_rejected": 0,
        "source_abstained": 0,
        "promoted": 1,
        "dropped_as_good_as_source": 0,
        "kept_as_good_as_source": 0,
        "dropped_abstained": 1,
        "dropped_undecided": 1,
        "negatives_not_taken": 0,
        "groups_without_negative": 0,
        "negatives": 2,
        "groups": 1,
    }


@pytest.mark.parametrize(("source", "reason"), [(None, "abstained"), (0.59, "rejected"), (0.0, "rejected")])
def test_a_query_whose_source_the_judge_does_not_stand_by_is_dropped(tmp_path, source, reason):
    llm = verdicts({"a": source, "b": 0.0, "c": 0.9})
    with pytest.raises(LabelError, match=f"no group is left .*1 source {reason}"):
        label(tmp_path, llm, LabelConfig(judge="verdict"), prompt=VERDICT, found="bc")


def test_groups_without_a_negative_are_dropped_and_the_last_one_is_an_error(tmp_path):
    llm = likelihoods({"a": -2.0, "b": -1.0})
    with pytest.raises(LabelError, match=r"no group is left .*1 groups without negative"):
        label(tmp_path, llm, found="b")


def test_the_source_is_judged_though_the_retriever_missed_it(tmp_path):
    groups, _, _ = label(tmp_path, likelihoods({"a": -1.0, "b": -2.0, "c": -3.0}), found="bc")
    assert groups["passage_ids"][0] == ["a", "b", "c"]


def test_candidates_of_another_corpus_are_an_error_that_names_the_row(tmp_path):
    with pytest.raises(LabelError, match="candidates row 0 names a passage that is not among the 6 passages"):
        label(tmp_path, likelihoods({}), found="bz")


def test_a_score_that_is_not_finite_is_an_error_that_names_the_query(tmp_path):
    with pytest.raises(LabelError, match="fake scored the query 'what is q' nan"):
        label(tmp_path, likelihoods({"a": -1.0, "b": math.nan}), found="b")


def test_a_long_passage_is_cut_for_the_judge_and_whole_in_the_group(tmp_path):
    llm = FakeLLM(
        scores={
            (LIKELIHOOD.render(passage=f"{name} one", examples=[]), " what is q"): score
            for name, score in {"a": -1.0, "b": -2.0}.items()
        }
    )
    groups, _, _ = label(tmp_path, llm, LabelConfig(max_passage_words=2), found="b")
    assert groups["passages"][0] == ["a one two three", "b one two three"]


def test_no_more_candidates_are_judged_and_no_more_negatives_kept_than_asked_for(tmp_path):
    passages, found = scattered(100)
    config = LabelConfig(candidates=9, random=0, negatives=3, drop_margin=-9.0)
    with Journal(tmp_path / "j") as journal:
        tables, counts, _ = label_by(HashedJudge(), found, passages, config, journal)
    groups = tables["train"]
    assert counts["pairs_judged"] == 9 * 100
    assert {len(labels) for labels in groups["labels"]} == {4}
    assert counts["negatives_not_taken"] == 5 * 100


def test_groups_are_the_same_however_many_are_built_at_once(tmp_path, monkeypatch):
    passages, found = scattered(60)
    with Journal(tmp_path / "j") as journal:
        whole = label_by(HashedJudge(), found, passages, LabelConfig(), journal)[0]["train"]
        monkeypatch.setattr("lce_trainer.synthesis.labeling._WINDOW", 7)
        parts = label_by(HashedJudge(), found, passages, LabelConfig(), journal)[0]["train"]
    # Some queries have no negative, so windows and queries do not line up.
    assert 40 < len(whole) < 60
    assert parts.to_list() == whole.to_list()


def test_nothing_to_judge_is_an_error(tmp_path):
    with Journal(tmp_path / "j") as journal, pytest.raises(LabelError, match="no candidates to judge"):
        label_by(FakeLLM(), mined("b").select([]), PASSAGES, LabelConfig(), journal)


@pytest.mark.parametrize("match_length", [True, False])
def test_candidates_are_taken_from_the_top_and_from_deeper(tmp_path, match_length):
    passages, found = scattered(100)
    config = LabelConfig(candidates=12, random=0, negatives=11, drop_margin=-9.0, match_length=match_length)
    with Journal(tmp_path / "j") as journal:
        tables, _, _ = label_by(HashedJudge(), found, passages, config, journal)
    groups = tables["train"]
    ranks = []
    for row, mine in zip(groups, found, strict=True):
        ranks.append([mine["passage_ids"].index(key) for key in row["passage_ids"] if key in mine["passage_ids"]])
    flat = np.concatenate(ranks)
    assert np.mean(flat < 12) > 0.45
    assert np.mean(flat >= 25) > 0.2
    assert np.mean([row[0] == 0 for row in ranks]) > 0.9


def test_the_pool_of_a_query_does_not_depend_on_the_other_queries(tmp_path):
    passages, found = scattered(60)
    few, more = HashedJudge(), HashedJudge()
    with Journal(tmp_path / "j") as journal:
        label_by(few, found.select(range(40)), passages, LabelConfig(candidates=12, random=0), journal)
        label_by(more, found, passages, LabelConfig(candidates=12, random=0), journal)
    assert (few.asked, more.asked) == (40 * 12, 20 * 12)


def test_killed_labeling_resumes_to_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    label_file(whole, None)
    code = "import sys, pathlib, helpers.labeling; helpers.labeling.label_file(pathlib.Path(sys.argv[1]), 3)"
    run = subprocess.run([sys.executable, "-c", code, str(killed)], cwd=TESTS, capture_output=True)
    assert run.returncode == -9, run.stderr
    assert 3 * 120 < len((killed / "asked.jsonl").read_text().splitlines()) <= 3 * 128
    label_file(killed, None)
    asked = (killed / "asked.jsonl").read_text().splitlines()
    assert sorted(asked) == sorted((whole / "asked.jsonl").read_text().splitlines())
    assert len(asked) == len(set(asked)) == 60 * 12
    assert (killed / "groups.parquet").read_bytes() == (whole / "groups.parquet").read_bytes()


@pytest.fixture(scope="module")
def medquad(tmp_path_factory):
    """A part of MedQuAD, and what BM25 finds for the first sentences of 400 of its passages."""
    corpus = SHARED_DATA / "medquad" / "corpus.parquet"
    if not corpus.is_file():
        pytest.skip(f"needs the MedQuAD corpus at {corpus}")
    table = datasets.Dataset.from_parquet(str(corpus)).shuffle(seed=0).select(range(4000))
    passages = table.rename_column("doc_id", "passage_id").select_columns(["passage_id", "text"])
    passages = passages.add_column("doc_id", passages["passage_id"][:])
    index = BM25Index.build(passages, tmp_path_factory.mktemp("bm25"))
    return passages, FirstStage(len(passages), index, None)


def first_sentences(passages, rows):
    taken = passages.select(rows)
    return datasets.Dataset.from_dict(
        {
            "query_id": [f"q{row}" for row in rows],
            "query": [" ".join(text.partition(". ")[0].split()[:15]) for text in taken["text"]],
            "source_passage_id": taken["passage_id"][:],
        }
    )


def length_auc(medquad, rows, tmp_path, **options):
    passages, first_stage = medquad
    found, _ = mine_candidates(first_sentences(passages, rows), passages, first_stage, MineConfig())
    judge, config = HashedJudge(options.pop("lean", 0.0)), LabelConfig(candidates=12, random=0, negatives=7, **options)
    with Journal(tmp_path / f"{sorted(options.items())}.jsonl") as journal:
        tables, _, facts = label_by(judge, found, passages, config, journal)
    groups = tables["train"]
    checked, counts = validate_groups(groups)
    assert checked.to_list() == groups.to_list()
    assert counts["groups"] > 0.8 * len(rows)
    return facts["shortcut_auc"]


@pytest.mark.parametrize("lean", [0.0, 0.2, -0.2])
def test_length_does_not_tell_positives_from_negatives_on_medquad(medquad, tmp_path, lean):
    probe = length_auc(medquad, np.random.default_rng(0).permutation(4000)[:400], tmp_path, lean=lean)
    assert set(probe) == {"length", "words", "popularity"}
    assert probe["length"] < 0.55


def test_matching_lengths_mends_sources_that_are_too_short(medquad, tmp_path):
    lengths = np.array([len(text.split()) for text in medquad[0]["text"]])
    short = np.flatnonzero(lengths < np.quantile(lengths, 0.4))
    rows = np.random.default_rng(0).permutation(short)[:400]
    naive = length_auc(medquad, rows, tmp_path, match_length=False)["length"]
    matched = length_auc(medquad, rows, tmp_path, match_length=True)["length"]
    assert naive > 0.7
    assert matched < 0.6


def test_a_judge_is_measured_on_what_people_labelled(tmp_path):
    human = datasets.Dataset.from_dict(
        {
            "query_id": ["q", "r", "s"],
            "query": ["what is q", "what is r", "what is s"],
            "passages": [["a", "b", "c", "d"], ["a", "b"], ["a", "b"]],
            "labels": [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0], [0.0, 0.0]],
        }
    )
    said = {("a", "q"): -3.0, ("b", "q"): -1.0, ("c", "q"): -2.0, ("d", "q"): -0.5, ("a", "r"): -4.0, ("b", "r"): -5.0}
    llm = FakeLLM(
        scores={
            (LIKELIHOOD.render(passage=text, examples=[]), f" what is {query}"): score
            for (text, query), score in said.items()
        }
    )
    with Journal(tmp_path / "j") as journal:
        report = check_judge(human, load_judge(LabelConfig(), llm, LIKELIHOOD), journal)
        again = check_judge(human, load_judge(LabelConfig(), FakeLLM(), LIKELIHOOD), journal)
    # Pooled: -1 beats -3, -2, -5 and -4 beats -5, of 2 x 4 pairs. Within: 2 of 3 and 1 of 1.
    assert (
        report
        == again
        == {
            "pairs": 6,
            "queries": 2,
            "auc": 0.5,
            "auc_within_query": pytest.approx((2 / 3 + 1) / 2),
            "first_is_right": 0.5,
            "first_is_right_by_chance": pytest.approx((1 / 4 + 1 / 2) / 2),
            "abstained": 0.0,
        }
    )


def test_a_judge_that_abstains_gets_no_credit(tmp_path):
    human = datasets.Dataset.from_dict(
        {
            "query_id": ["q"],
            "query": ["what is q"],
            "passages": [["a one two three", "b one two three"]],
            "labels": [[1.0, 0.0]],
        }
    )
    with Journal(tmp_path / "j") as journal:
        llm = verdicts({"a": None, "b": None})
        report = check_judge(human, load_judge(LabelConfig(judge="verdict"), llm, VERDICT), journal)
    assert (report["auc"], report["first_is_right"], report["abstained"]) == (0.5, 0.0, 1.0)


def test_no_human_labels_to_compare_with_is_no_error(tmp_path):
    human = datasets.Dataset.from_dict({"query": ["q"], "passages": [["a"]], "labels": [[1.0]]})
    with Journal(tmp_path / "j") as journal:
        assert check_judge(human, load_judge(LabelConfig(), FakeLLM(), LIKELIHOOD), journal) == {
            "pairs": 0,
            "queries": 0,
        }


GRADE = Prompt("grade.jinja", "Passage: {{ passage }}\nQuery: {{ query }}\nGrade:")


def test_a_grade_is_the_expected_one(tmp_path):
    masses = {"a": [0.0, 0.0, 0.5, 0.5], "b": [0.5, 0.5, 0.0, 0.0], "c": [0.0, 1.0, 0.0, 0.0], "d": None}
    llm = FakeLLM(
        choices={
            GRADE.render(passage=f"{name} one two three", query="what is q", examples=[]): answer
            for name, answer in masses.items()
        }
    )
    with Journal(tmp_path / "j") as journal:
        tables, counts, _ = label_by(
            llm, mined("bcd"), PASSAGES, LabelConfig(judge="grade", random=0), journal, 0, GRADE
        )
    judged = {row["passage_id"]: (row["judge_score"], row["label"]) for row in tables["judged"]}
    assert judged == {"a": (2.5, "positive"), "b": (0.5, "negative"), "c": (1.0, "left out"), "d": (None, "left out")}
    assert (counts["dropped_abstained"], counts["dropped_undecided"]) == (1, 1)


PAIRWISE = Prompt("pairwise.jinja", "Query: {{ query }}\nA: {{ first }}\nB: {{ second }}\nBetter:")


class Battles:
    """A model that prefers the better of two passages, and whichever stands first by so many nats besides."""

    name = identity = "battles"

    def __init__(self, strength, liking=0.0, abstains_at=None, sharpness=1.0):
        self.strength, self.liking, self.abstains_at, self.sharpness = strength, liking, abstains_at, sharpness
        self.asked = []

    def reads(self, prompt):
        return str(prompt)

    def choose(self, prompts, options, each=None):
        assert [list(forms) for forms in options] == [[" A", "A"], [" B", "B"]]
        self.asked += prompts
        return [self.answer(*re.findall(r"^[AB]: (\S+)", prompt, re.MULTILINE)) for prompt in prompts]

    def answer(self, first, second):
        if self.abstains_at in (first, second):
            return None
        odds = self.sharpness * (self.strength[first] - self.strength[second]) + self.liking
        return [1 / (1 + math.exp(-odds)), 1 / (1 + math.exp(odds))]


def battle(tmp_path, llm, found="bcdef", seed=0, **options):
    config = LabelConfig(judge="pairwise", random=0, **options)
    with Journal(tmp_path / "battles.jsonl") as journal:
        return label_by(llm, mined(found), PASSAGES, config, journal, seed, PAIRWISE)


def test_battles_rank_the_candidates_whichever_place_the_model_likes(tmp_path):
    strength = {"a": 2.0, "b": 0.0, "c": 3.0, "d": -1.0, "e": 1.0, "f": -2.0}
    fair, biased = Battles(strength), Battles(strength, liking=1.5)
    (tmp_path / "biased").mkdir()
    tables, counts, facts = battle(tmp_path, fair, opponents=2)
    others, _, _ = battle(tmp_path / "biased", biased, opponents=2)
    assert len(fair.asked) == len(set(fair.asked)) == 6 * 2  # each meets two, in both orders
    judged = {row["passage_id"]: row for row in tables["judged"]}
    by_score = sorted(judged, key=lambda key: judged[key]["judge_score"])
    assert by_score == list("fdbeac")
    assert others["judged"]["judge_score"] == pytest.approx(tables["judged"]["judge_score"], abs=1e-6)
    # As under the other judges whose scores mean nothing by themselves: c beats the source, and is no negative.
    assert [key for key in "abcdef" if judged[key]["label"] == "negative"] == list("bdef")
    assert (counts["dropped_as_good_as_source"], facts["source_first"]["judge"]) == (1, 0.0)
    assert sum(row["judge_score"] for row in tables["judged"]) == pytest.approx(0, abs=1e-6)


def test_battles_are_journaled_and_each_is_asked_once(tmp_path):
    strength = dict(zip("abcdef", [2.0, 0.0, 1.0, -1.0, 1.0, -2.0], strict=True))
    first, again = Battles(strength), Battles(strength)
    tables, _, _ = battle(tmp_path, first)
    repeated, _, _ = battle(tmp_path, again)
    assert len(first.asked) == 6 * 4 and not again.asked
    assert repeated["train"].to_list() == tables["train"].to_list()


def test_a_candidate_whose_battles_have_no_answer_is_left_out_and_one_source_drops_its_query(tmp_path):
    strength = dict(zip("abcdef", [2.0, 0.0, 1.0, -1.0, 1.0, -2.0], strict=True))
    tables, _, _ = battle(tmp_path, Battles(strength, abstains_at="c"))
    judged = {row["passage_id"]: (row["judge_score"], row["label"]) for row in tables["judged"]}
    assert judged["c"] == (None, "left out") and "c" not in tables["train"]["passage_ids"][0]
    with pytest.raises(LabelError, match="no group is left"):
        (tmp_path / "source").mkdir()
        battle(tmp_path / "source", Battles(strength, abstains_at="a"))


def test_opponents_are_an_even_number():
    for opponents in (0, 3):
        with pytest.raises(ConfigError, match=r"label\.opponents must be an even number, 2 or more, not"):
            LabelConfig(opponents=opponents)


def test_a_pairwise_judge_is_measured_on_what_people_labelled_within_each_query(tmp_path):
    human = datasets.Dataset.from_dict(
        {"query_id": ["q"], "query": ["q"], "passages": [["a", "b", "c"]], "labels": [[0.0, 1.0, 0.0]]}
    )
    judge = load_judge(LabelConfig(judge="pairwise"), Battles({"a": 0.0, "b": 2.0, "c": 1.0}), PAIRWISE)
    with Journal(tmp_path / "j") as journal:
        assert check_judge(human, judge, journal)["auc_within_query"] == 1.0


def test_a_reranker_can_be_the_judge(tmp_path, tiny_reranker):
    config = LabelConfig(judge="reranker", reranker=str(tiny_reranker), random=0, drop_margin=-9.0)
    judge = load_judge(config, FakeLLM(), None)
    with Journal(tmp_path / "j") as journal:
        tables, _, _ = label_candidates(mined("bc"), PASSAGES, judge, None, config, 0, journal)
    pairs = [("what is q", f"{name} one two three") for name in "abc"]
    assert tables["judged"]["judge_score"] == pytest.approx(Reranker.from_pretrained(tiny_reranker).score(pairs))
    with pytest.raises(ConfigError, match=r"needs label\.reranker"):
        load_judge(LabelConfig(judge="reranker"), FakeLLM(), None)


def test_the_encoder_can_be_the_judge_and_no_llm_is_called(tmp_path):
    config = LabelConfig(judge="encoder", random=0, false_negatives="keep", match_length=False)
    judge = load_judge(config, FakeLLM(), None)
    with Journal(tmp_path / "j") as journal:
        dense = Cosines(0.5, 0.6, 0.1, 0.2, 0.0, 0.0)
        tables, counts, facts = label_candidates(mined("bcd"), PASSAGES, judge, dense, config, 0, journal)
        with pytest.raises(LabelError, match=r"label\.judge=encoder needs an encoder"):
            label_candidates(mined("bcd"), PASSAGES, judge, None, config, 0, journal)
    cosines = np.array([0.5, 0.6, 0.1, 0.2])
    (group,) = tables["train"]
    assert group["passage_ids"] == ["a", "b", "c", "d"]
    assert group["scores"] == pytest.approx((cosines - cosines.mean()) / cosines.std(), abs=1e-5)
    assert group["labels"] == [1.0, 0.0, 0.0, 0.0]
    assert counts["kept_as_good_as_source"] == 1
    assert facts["source_first"] == {"judge": 0.0, "encoder": 0.0, "teacher": 0.0}


class Cosines:
    """An index that knows the cosine of each passage of ``PASSAGES``."""

    def __init__(self, *cosines):
        self.cosines = np.array(cosines, dtype=np.float32)

    def similarity(self, queries, query, passage):
        return self.cosines[passage]


def test_the_teacher_is_encoder_and_judge_together(tmp_path):
    llm = likelihoods({"a": -1.0, "b": -3.0, "c": -2.0, "d": -4.0})
    config = LabelConfig(judge_weight=0.5, random=0, drop_margin=-9.0)
    judge = load_judge(config, llm, LIKELIHOOD)
    with Journal(tmp_path / "j") as journal:
        dense = Cosines(0.5, 0.6, 0.1, 0.2, 0.0, 0.0)
        tables, _, facts = label_candidates(mined("bcd"), PASSAGES, judge, dense, config, 0, journal)
    fused = np.array(in_deviations(0.5, 0.6, 0.1, 0.2)) + 0.5 * np.array(in_deviations(-1.0, -3.0, -2.0, -4.0))
    assert tables["judged"]["teacher_score"] == pytest.approx(in_deviations(*fused), abs=1e-6)
    assert facts["source_first"] == {"judge": 1.0, "encoder": 0.0, "teacher": 1.0}


@pytest.mark.parametrize("judge", ["encoder", "likelihood"])
def test_bm25_counts_in_the_teacher_beside_encoder_and_judge(tmp_path, judge):
    found = {"cosine": (0.5, 0.6, 0.1, 0.2), "judge": (-1.0, -3.0, -2.0, -4.0), "bm25": (0.0, 2.0, 9.0, 1.0)}
    config = LabelConfig(judge=judge, judge_weight=0.5, random=0, drop_margin=-9.0)
    llm = likelihoods(dict(zip("abcd", found["judge"], strict=True)))
    with Journal(tmp_path / "j") as journal:
        tables, _, facts = label_candidates(
            mined("bcd"),
            PASSAGES,
            load_judge(config, llm, LIKELIHOOD),
            Cosines(*found["cosine"], 0.0, 0.0),
            config,
            0,
            journal,
            (Cosines(*found["bm25"], 0.0, 0.0), 0.25),
        )
    parts = {name: np.array(in_deviations(*values)) for name, values in found.items()}
    fused = parts["cosine"] + 0.25 * parts["bm25"] + (0.5 * parts["judge"] if judge == "likelihood" else 0)
    assert tables["judged"]["teacher_score"] == pytest.approx(in_deviations(*fused), abs=1e-6)
    assert tables["judged"]["bm25"] == pytest.approx(found["bm25"])
    assert facts["source_first"]["bm25"] == 0.0


@pytest.mark.parametrize("weight", [-0.1, float("inf"), float("nan")])
def test_a_weight_of_bm25_that_is_none_is_refused(weight):
    with pytest.raises(ConfigError, match=r"label\.bm25_weight must be 0 or more"):
        LabelConfig(bm25_weight=weight)


def weighed(tmp_path, helpful, seed=0, n=150):
    """Labels of n queries, each from a document of its own, under a judge that helps the encoder in part of them."""
    rng = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(n * 4)]
    passages = datasets.Dataset.from_dict(
        {"passage_id": names, "text": names, "doc_id": [f"d{i // 4}" for i in range(n * 4)]}
    )
    found = datasets.Dataset.from_dict(
        {
            "query_id": [f"q{i}" for i in range(n)],
            "query": [f"query {i}" for i in range(n)],
            "source_passage_id": names[::4],
            "passage_ids": [names[i * 4 + 1 : i * 4 + 4] for i in range(n)],
        }
    )
    is_source = np.arange(n * 4) % 4 == 0
    dense = Cosines(*(rng.normal(size=n * 4) + 1.5 * is_source))
    judged = rng.normal(size=n * 4) + helpful * is_source
    scores = {
        (LIKELIHOOD.render(passage=name, examples=[]), f" query {row // 4}"): float(judged[row])
        for row, name in enumerate(names)
    }
    config = LabelConfig(judge_weight="auto", random=0)
    with Journal(tmp_path / "j") as journal:
        judge = load_judge(config, FakeLLM(scores=scores), LIKELIHOOD)
        tables, _, facts = label_candidates(found, passages, judge, dense, config, seed, journal)
    return tables["judged"], facts


@pytest.mark.parametrize(("helpful", "least", "most"), [(1.5, 0.4, 1.5), (0.0, 0.0, 0.3), (-1.5, 0.0, 0.0)])
def test_the_weight_of_the_judge_is_the_one_that_puts_sources_of_held_out_documents_first(
    tmp_path, helpful, least, most, caplog
):
    caplog.set_level("INFO")
    judged, facts = weighed(tmp_path, helpful)
    choice = facts["judge_weight"]
    assert least <= choice["chosen"] <= most
    assert list(choice["source_mrr"]) == [f"{tenths / 10:g}" for tenths in range(16)]
    assert choice["source_mrr"][f"{choice['chosen']:g}"] == max(choice["source_mrr"].values())
    assert (choice["documents"], choice["queries"]) == (100, 100)  # a tenth would be too few to measure on
    assert f"label.judge_weight=auto: {choice['chosen']:g}, by the mean reciprocal rank" in caplog.text
    rows = judged.to_list()[:4]
    cosines, scores = (np.array([row[name] for row in rows]) for name in ("cosine", "judge_score"))
    fused = np.array(in_deviations(*cosines)) + choice["chosen"] * np.array(in_deviations(*scores))
    assert [row["teacher_score"] for row in rows] == pytest.approx(in_deviations(*fused), abs=1e-5)


def test_a_judge_that_knows_every_source_is_given_the_lowest_weight_that_suffices(tmp_path):
    _, facts = weighed(tmp_path, 100.0)
    chosen, curve = facts["judge_weight"]["chosen"], facts["judge_weight"]["source_mrr"]
    assert 0 < chosen < 1.5 or curve["1.4"] < curve["1.5"]
    assert all(mrr < curve[f"{chosen:g}"] for weight, mrr in curve.items() if float(weight) < chosen)


def test_without_an_encoder_there_is_no_weight_to_choose(tmp_path):
    llm = likelihoods({"a": -1.0, "b": -3.0, "c": -2.0})
    _, _, facts = label(tmp_path, llm, LabelConfig(judge_weight="auto"), found="bc")
    assert "judge_weight" not in facts


def test_easy_negatives_are_drawn_from_the_whole_corpus(tmp_path):
    passages, found = scattered(50)
    with Journal(tmp_path / "j") as journal:
        config = LabelConfig(candidates=8, random=3, drop_margin=-9.0)
        tables, _, _ = label_by(HashedJudge(), found, passages, config, journal)
    easy = 0
    for row, mine in zip(tables["train"], found, strict=True):
        others = set(row["passage_ids"]) - {mine["source_passage_id"]}
        assert len(others & set(mine["passage_ids"])) == 4
        easy += len(others - set(mine["passage_ids"]))
    assert 2.5 < easy / 50 <= 3


def test_scores_are_compared_within_their_query():
    values, query = np.array([1.0, 3.0, np.nan, 5.0, 5.0, 10.0]), np.array([0, 0, 0, 1, 1, 2])
    np.testing.assert_array_equal(standardize(values, query), [-1.0, 1.0, np.nan, 0.0, 0.0, 0.0])
