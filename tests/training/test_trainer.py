import itertools
import json
import logging
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from helpers.tiny import WORDS, build_model, build_tokenizer, ids_of_pairs
from helpers.trainers import easy_groups, make_groups, make_trainer, weights
from lce_trainer.errors import GroupsError, TrainingError
from lce_trainer.model.reranker import Reranker
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.loss import lce_loss
from lce_trainer.training.trainer import LCETrainer

# ---- what is learned


@pytest.mark.parametrize(("weight", "first"), [(0.0, 0), (1.0, 1)], ids=["labels", "scores"])
def test_distillation_follows_the_scores_and_not_the_labels(weight, first, tmp_path):
    """The right passage has the word red, the teacher's favourite has the word green."""
    draw = random.Random(3)
    drawn = [draw.choices(WORDS[3:], k=4) for _ in range(32)]
    texts = [["red " + a, "green " + b, c, d] for a, b, c, d in drawn]
    groups = Dataset.from_dict(
        {"query": ["what"] * 32, "passages": texts, "labels": [[1, 0, 0, 0]] * 32, "scores": [[0.0, 5.0, 0, 0]] * 32}
    )
    run = {"distillation_weight": weight, "distillation_temperature": 2.0, "num_train_epochs": 3}
    trainer = make_trainer(tmp_path, groups, **run)

    def times_first():
        return sum(int(np.argmax(scores)) == first for scores in trainer.predict(groups).predictions)

    assert times_first() < 20
    trainer.train()
    assert times_first() == 32


def test_through_a_run_positives_take_turns_and_negatives_come_once_whatever_happens_to_it(tmp_path):
    """Three positives and six negatives a query, of which an epoch shows one and two; interrupted in the second one."""
    texts = [[f"{where} {word}" for word in WORDS[i : i + 9]] for i, where in enumerate(["a", "of", "in", "on"])]
    labels = [[1, 1, 1] + [0] * 6] * 4
    groups = Dataset.from_dict({"query": ["what", "is", "the", "how"], "passages": texts, "labels": labels})
    run = {"group_size": 3, "num_train_epochs": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    run |= {"save_strategy": "steps", "save_steps": 3}
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        trainer, shown = make_trainer(tmp_path, groups, **run), []
        step = trainer.training_step
        trainer.training_step = lambda model, batch, groups, shown=shown, step=step: (
            shown.append([(batch.query_ids[0], tuple(ids)) for ids in ids_of_pairs(batch.pairs)])
            or step(model, batch, groups)
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(shown)
    whole, resumed = runs
    assert len(whole) == 12 and resumed == whole[6:]
    ids = {
        (row["query_id"], text): tuple(trainer.processing_class(row["query"], text)["input_ids"])
        for row in trainer.train_dataset
        for text in row["passages"]
    }
    for row in trainer.train_dataset:
        name, pairs = row["query_id"], [ids[row["query_id"], text] for text in row["passages"]]
        visits = [[pairs.index(pair) for _, pair in step] for step in whole if step[0][0] == name]
        assert sorted(positive for positive, *_ in visits) == [0, 1, 2]
        assert sorted(itertools.chain(*[negatives for _, *negatives in visits])) == [3, 4, 5, 6, 7, 8]


def test_groups_without_scores_or_with_one_learn_from_their_labels(tmp_path):
    scored = make_trainer(tmp_path, make_groups(4), distillation_weight=0.7)
    batch = scored._prepare_inputs(scored.data_collator(list(scored.train_dataset)))
    grid, teacher = torch.randn(batch.mask.shape), batch.by_group(batch.teacher_scores, np.nan)
    losses = scored._group_losses(grid, batch.target, batch.mask, teacher)
    labels_only = lce_loss(grid, batch.target, batch.mask, 1.0, "none")
    known = (~teacher.isnan()).sum(dim=1)
    assert known.tolist() == [0, 4, 1, 0]
    assert ((losses == labels_only) == (known < 2)).all()


def test_the_curves_are_logged_and_learning_is_announced(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lce_trainer")
    trainer = make_trainer(tmp_path, easy_groups(160), logging_steps=4)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert first["loss_if_guessing"] == pytest.approx(np.log(4))
    assert last["loss"] < 0.5 < first["loss"]
    assert last["accuracy@1"] == 1 and last["margin"] > 0
    assert 0 <= first["padding"] < 0.2 and first["pairs_per_second"] > 0 and first["cut_pairs"] == 0
    assert "where guessing costs 1.386" in caplog.text
    assert "learning: step" in caplog.text and "nothing is being learned" not in caplog.text


def test_a_run_that_learns_nothing_says_so_with_causes(tmp_path, caplog):
    draw = random.Random(2)
    texts = [draw.sample(WORDS, 4) for _ in range(160)]
    groups = Dataset.from_dict({"query": ["what"] * 160, "passages": texts, "labels": [[1.0, 0, 0, 0]] * 160})
    make_trainer(tmp_path, groups, learning_rate=0.0, logging_steps=4).train()
    assert caplog.text.count("nothing is being learned") == 1
    assert "learning_rate" in caplog.text


def test_a_collapsed_model_is_reported(tmp_path, caplog):
    model = build_model()
    torch.nn.init.zeros_(model.classifier.weight)
    make_trainer(tmp_path, easy_groups(8), model=model, learning_rate=0.0, logging_steps=1).train()
    assert caplog.text.count("the model has collapsed") == 1


@pytest.mark.parametrize("unlogged", [{"logging_strategy": "no"}, {"logging_steps": 1000}])
def test_what_goes_wrong_is_said_in_a_run_that_logs_nothing(unlogged, tmp_path, caplog):
    model = build_model()
    torch.nn.init.zeros_(model.classifier.weight)
    make_trainer(tmp_path, easy_groups(8), model=model, learning_rate=0.0, **unlogged).train()
    assert caplog.text.count("the model has collapsed") == 1
    assert caplog.text.count("nothing is being learned yet: step 1:") == 1


def test_a_long_run_without_logs_is_looked_at_on_its_way(tmp_path, caplog):
    model = build_model()
    torch.nn.init.zeros_(model.classifier.weight)
    run = {"logging_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 0.0}
    make_trainer(tmp_path, easy_groups(220), model=model, **run).train()
    assert "step 50: all passages of a query get the same score" in caplog.text
    assert caplog.text.count("nothing is being learned yet: step 50:") == 1


# ---- guards


def test_a_nan_loss_stops_in_its_step_and_names_the_query(tmp_path):
    model, tokenizer = build_model(), build_tokenizer()
    word = tokenizer.convert_tokens_to_ids("moon")
    model.bert.embeddings.word_embeddings.weight.data[word] = torch.nan
    rows = [{"query_id": f"q{i}", "query": "red fish", "passages": ["a", "b"], "labels": [1.0, 0.0]} for i in range(8)]
    rows[5]["passages"] = ["moon", "tree"]
    trainer = make_trainer(tmp_path, Dataset.from_list(rows), model=model, logging_steps=100)
    before = weights(trainer)
    with pytest.raises(TrainingError, match=r"step 1: the loss of queries 'q5' is NaN or infinite"):
        trainer.train()
    assert trainer.state.global_step == 0
    for name, tensor in weights(trainer).items():
        torch.testing.assert_close(tensor, before[name], equal_nan=True)


def test_groups_that_teach_nothing_are_counted_and_none_left_is_an_error(tmp_path):
    rows = {"query": ["a", "b"], "passages": [["x", "y"], ["x", "y"]]}
    trainer = make_trainer(tmp_path, Dataset.from_dict({**rows, "labels": [[1.0, 0.0], [1.0, 1.0]]}))
    assert trainer.counts["groups"] == 1 and trainer.counts["groups_without_negative"] == 1
    with pytest.raises(TrainingError, match="none of 2 groups is usable: 1 have no positive and 1 no negative"):
        make_trainer(tmp_path, Dataset.from_dict({**rows, "labels": [[0.0, 0.0], [1.0, 1.0]]}))


def test_what_does_not_fit_together_is_an_error_before_the_first_step(tmp_path):
    with pytest.raises(TrainingError, match="max_length is 129, but the model reads 128 tokens at most"):
        make_trainer(tmp_path, make_groups(4), max_length=129)
    with pytest.raises(TrainingError, match="no group has scores"):
        make_trainer(tmp_path, easy_groups(4), distillation_weight=0.5)
    with pytest.raises(TrainingError, match=r"must be a datasets\.Dataset of groups, not list"):
        make_trainer(tmp_path, [{"query": "a"}])
    with pytest.raises(TrainingError, match="pass the tokenizer"):
        LCETrainer(build_model(), LCETrainingArguments(str(tmp_path)), train_dataset=make_groups(4))
    with pytest.raises(GroupsError, match="dev: groups need the columns"):
        make_trainer(tmp_path, make_groups(4), eval_dataset={"dev": Dataset.from_dict({"query": ["a"]})})
    uneven = Dataset.from_dict({"query": ["a"], "passages": [["x", "y"]], "labels": [[1.0]]})
    with pytest.raises(GroupsError, match="dev: row 0: 1 labels for 2 passages"):
        make_trainer(tmp_path, make_groups(4), eval_dataset={"dev": uneven})


def test_queries_trained_and_measured_on_are_reported(tmp_path, caplog):
    make_trainer(tmp_path, make_groups(8), eval_dataset=make_groups(8).select([0, 3]))
    assert "2 of its 2 queries are also trained on" in caplog.text


def test_a_checkpoint_is_plain_and_holds_neither_token_nor_pickled_settings(tmp_path):
    trainer = make_trainer(tmp_path, make_groups(8), save_strategy="steps", save_steps=1, hub_token="hf_SECRETSECRET")
    trainer.train()
    trainer.save_model()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files and not any(b"SECRET" in file.read_bytes() for file in files)
    assert not list(tmp_path.rglob("training_args.bin"))
    settings = json.loads((tmp_path / "training_args.json").read_text())
    assert settings["group_size"] == 4 and "output_dir" not in settings
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}
    assert load_file(tmp_path / "model.safetensors").keys() == build_model().state_dict().keys()
    assert Reranker.from_pretrained(tmp_path).max_length == 48


def test_a_model_given_by_name_gets_the_same_new_head_for_the_same_seed(tmp_path):
    base = tmp_path / "base"
    build_model().bert.save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    heads = []
    for seed in (1, 1, 2):
        args = LCETrainingArguments(str(tmp_path), seed=seed, max_length=64, max_query_length=8, report_to="none")
        heads.append(LCETrainer(str(base), args, train_dataset=make_groups(4)).model.classifier.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
