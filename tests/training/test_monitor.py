import logging

import pytest
import torch
from datasets import Dataset

from helpers.tiny import build_model, build_tokenizer
from helpers.trainers import make_trainer
from lce_trainer.errors import EvaluationError, TrainingError
from lce_trainer.groups.convert import to_groups
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.checks import check_eval, usable_groups


def groups(*rows: tuple[str, list[str], list[float]]) -> Dataset:
    queries, passages, labels = zip(*rows, strict=True)
    return Dataset.from_dict({"query": list(queries), "passages": list(passages), "labels": list(labels)})


TRAIN = groups(
    ("red fish", ["a fish is red", "a bird", "a stone"], [1, 0, 0]),
    ("blue bird", ["a bird", "a fish is red", "a leaf"], [2, 1, 0]),
)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="lce_trainer")

    def of(rows: Dataset) -> list[str]:
        caplog.clear()
        check_eval(rows, "dev", TRAIN)
        return [record.message for record in caplog.records]

    return of


def test_queries_are_the_same_whatever_their_case_and_outer_spaces(said):
    dev = groups((" Red FISH ", ["new", "newer"], [1, 0]), ("green tree", ["new", "newer"], [1, 0]))
    assert said(dev) == ["dev: 1 of its 2 queries are also trained on, so its figures are too high"]


def test_passages_are_counted_and_so_are_those_relevant_in_both(said):
    dev = groups(
        ("q1", ["a bird", "a stone", "new"], [1, 0, 0]),  # a positive there too
        ("q2", ["a leaf", "new", "newer"], [1, 0, 0]),  # a negative there
        ("q3", ["a fish is red", "A bird"], [0, 1]),
    )
    assert said(dev) == [
        "dev: 4 of its 8 passages are also trained on, and 1 of its 3 relevant ones as positives: its figures hold for "
        "these documents, and may be lower for new ones"
    ]


def test_what_has_nothing_in_common_says_nothing(said):
    assert said(groups(("q1", ["new", "newer"], [1, 0]))) == []


def test_only_what_is_trained_on_counts(said, caplog):
    dev = groups(("q1", ["a leaf", "new"], [1, 0]))
    check_eval(dev, "dev", TRAIN.select([0]))
    assert not caplog.records
    check_eval(dev.select([0, 0]), "dev", TRAIN.select([1]))
    assert "2 of its 4 passages are also trained on, and 0 of its 2 relevant ones" in caplog.text


def test_groups_without_a_positive_are_counted(said):
    assert said(groups(("q1", ["x", "y"], [0, 0]), ("q2", [], []), ("q3", ["x"], [1]))) == [
        "dev: 2 of 3 groups hold no positive; they count as 0"
    ]


def test_a_passage_that_competes_with_itself_is_counted_and_to_groups_mends_it(caplog, tmp_path):
    torn = groups(
        ("q1", ["a fish", "a bird", "a fish"], [1, 0, 0]),
        ("q2", ["a fish", "a bird", "a bird"], [1, 0, 0]),  # twice a negative
        ("q3", ["a leaf", "a leaf", "a stone"], [2, 2, 1]),  # twice the same grade
        ("q4", ["a stone", "a leaf", "a leaf", "a leaf"], [0, 1, 2, 3]),
        ("q5", ["a fish", "a tree"], [0, 1]),  # a positive elsewhere
        ("q6", ["a tree", "a bird", "a bird"], [1, -1, 0]),
    )
    args = LCETrainingArguments(str(tmp_path))
    for rows in (torn, torn.select(range(6)[::-1])):
        caplog.clear()
        kept, counts = usable_groups(rows, args)
        assert len(kept) == counts["groups"] == 6
        assert "2 of 6 groups hold the same passage as a positive and with a lower label" in caplog.text
    usable_groups(groups(*[("q", ["a", "b"], [1, 0])] * 100, ("q", ["a", "a"], [1, 0])), args)
    assert "1 of 101 groups hold the same passage" in caplog.text
    caplog.clear()
    mended, _ = usable_groups(to_groups(torn)[0], args)
    assert len(mended) == 6 and mended[3]["passages"] == ["a leaf", "a stone"] and mended[3]["labels"] == [3, 0]
    assert "same passage" not in caplog.text


@pytest.mark.parametrize("scores", [None, [None, None], [0.5, None], [0.5, float("nan")]])
def test_scores_of_which_no_group_has_two_are_no_teacher(scores, tmp_path):
    args = LCETrainingArguments(str(tmp_path), distillation_weight=0.5)
    rows = groups(*[("q", ["a", "b"], [1, 0])] * 3)
    with pytest.raises(TrainingError, match="no group has scores of two passages or more"):
        usable_groups(rows.add_column("scores", [scores] * 3), args)
    assert len(usable_groups(rows.add_column("scores", [scores, [0.5, 0.25], None]), args)[0]) == 3


@pytest.mark.parametrize("named", [True, False])
def test_an_evaluation_that_gives_nan_names_its_queries(named, tmp_path):
    model = build_model()
    word = build_tokenizer().convert_tokens_to_ids("moon")
    model.bert.embeddings.word_embeddings.weight.data[word] = torch.nan
    rows = groups(("red fish", ["a", "b"], [1, 0]), ("blue fish", ["tree", "moon"], [1, 0]))
    rows = rows.add_column("query_id", ["first", "second"]) if named else rows
    trainer = make_trainer(tmp_path, None, model=model, eval_dataset=rows)
    with pytest.raises(EvaluationError, match="queries 'second' has" if named else "queries 'blue fish' has"):
        trainer.evaluate()


def test_a_query_that_the_retriever_finds_nothing_for_counts_as_zero(tmp_path):
    found = groups(("red fish", ["a", "b"], [1, 0]), ("blue fish", [], []))
    both, one = (make_trainer(tmp_path, None, eval_dataset=rows).evaluate() for rows in (found, found.select([0])))
    for measure in ("eval_ndcg@10", "eval_mrr@10", "eval_map@10"):
        assert both[measure] == one[measure] / 2 > 0
    assert both["eval_loss"] == one["eval_loss"]


@pytest.mark.parametrize("score", [float("inf"), float("-inf")])
def test_a_score_that_is_infinite_is_an_error_if_it_is_distilled_from(score, tmp_path):
    scores = [[0.5, 0.1, None], None, [0.2, score, 0.3]]
    rows = Dataset.from_list([{**TRAIN[0], "query_id": f"q{i}", "scores": scores[i]} for i in range(3)])
    args = LCETrainingArguments(str(tmp_path), distillation_weight=0.5)
    with pytest.raises(TrainingError, match=r"query 'q2': one of its scores is infinite.*: write null"):
        usable_groups(rows, args)
    assert len(usable_groups(rows.select([0, 1]), args)[0]) == 2
    assert len(usable_groups(rows, LCETrainingArguments(str(tmp_path)))[0]) == 3


def test_a_batch_that_is_never_full_is_an_error_where_the_last_one_is_dropped(tmp_path):
    args = LCETrainingArguments(str(tmp_path), dataloader_drop_last=True, per_device_train_batch_size=3)
    with pytest.raises(TrainingError, match="dataloader_drop_last leaves nothing of 2 groups, for a batch has 3"):
        usable_groups(TRAIN, args)
