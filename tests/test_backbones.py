"""Every family of models that is supported: trains exactly, is saved, and scores alike in every loader."""

import random

import numpy as np
import pytest
import torch
from conftest import WORDS, ids_of_pairs
from datasets import Dataset
from tiny_models import DECODERS, FAMILIES, POSITIONS, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lce_trainer.errors import TrainingError
from lce_trainer.model.loading import longest_input
from lce_trainer.model.pairs import encode_groups
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.scoring import scoring_batches
from lce_trainer.training.arguments import LCETrainingArguments
from lce_trainer.training.trainer import LCETrainer

MAX_LENGTH = 112
MAX_QUERY_LENGTH = 16


def some_groups(n: int) -> Dataset:
    draw = random.Random(4)
    rows = []
    for i in range(n):
        labels = [[1.0, 0, 0], [1.0, 0], [2.0, 1.0, 0, 0]][i % 3]
        rows.append(
            {
                "query_id": f"q{i}",
                "query": " ".join(draw.choices(WORDS, k=draw.randint(1, 6))),
                "passages": [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in labels],
                "labels": labels,
            }
        )
    return Dataset.from_list(rows)


def make_trainer(family: str, folder, model=None, tokenizer="its own", train_dataset=None, **settings) -> LCETrainer:
    defaults = {
        "group_size": 4,
        "max_length": MAX_LENGTH,
        "max_query_length": MAX_QUERY_LENGTH,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": 0.01,
        "max_grad_norm": 0,  # clipping would hide a gradient of the wrong size
        "warmup_steps": 0,
        "per_device_train_batch_size": 6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    more = {name: settings.pop(name) for name in ("peft_config", "callbacks", "eval_dataset") if name in settings}
    if tokenizer == "its own":
        tokenizer = tiny_tokenizer(family)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return LCETrainer(
        model=tiny_model(family) if model is None else model,
        args=LCETrainingArguments(str(folder), **{**defaults, **settings}),
        train_dataset=some_groups(6) if train_dataset is None else train_dataset,
        processing_class=tokenizer,
        **more,
    )


def pairs_of_all_lengths() -> list[tuple[str, str]]:
    """Most fit, some are cut."""
    draw = random.Random(7)
    return [
        (" ".join(draw.choices(WORDS, k=draw.randint(1, 8))), " ".join(draw.choices(WORDS, k=size)))
        for size in [0, 1, 5, 9, 20, 21, 22, 23, 24, 25, 40, 60, 100, 150]
    ]


WAYS = (
    {},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
    {"micro_batch_size": 5},
    {"micro_batch_size": 2},  # groups of 3 and 4 go through the score cache, those of 2 do not
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_does_not_depend_on_how_a_step_is_cut(family, tmp_path):
    ends, losses = [], []
    for way in WAYS:
        trainer = make_trainer(family, tmp_path, **way)
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        losses.append(trainer.train().training_loss)
        assert np.isfinite(losses).all() and trainer.state.global_step == 1
        ends.append(trainer.model.state_dict())
        assert max((ends[-1][name] - before[name]).abs().max() for name in before) > 1e-4
    assert losses == pytest.approx([losses[0]] * len(WAYS), rel=1e-5)
    for end in ends[1:]:
        for name, tensor in end.items():
            torch.testing.assert_close(tensor, ends[0][name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_ends_bit_equal_with_dropout_on(family, tmp_path):
    """In the middle of an epoch; the larger groups go through the score cache."""
    run = {"per_device_train_batch_size": 3, "micro_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    run |= {"save_strategy": "steps", "save_steps": 1}
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-1")):
        trainer = make_trainer(family, tmp_path, tiny_model(family, seed=len(ends), dropout=0.2), **run)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 2
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(tensor, ends[0][name]) for name, tensor in ends[1].items())


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    """A family's name, and the folder of a model of it that has trained a step."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = make_trainer(request.param, folder)
    trainer.train()
    trainer.save_model()
    return request.param, folder


def test_every_loader_gives_the_same_scores(trained):
    from sentence_transformers import CrossEncoder

    family, folder = trained
    pairs = pairs_of_all_lengths()
    scores = Reranker.from_pretrained(folder, device="cpu").score(pairs)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {"padding": True, "truncation": True, "return_tensors": "pt", "return_dict": True}
    if family in DECODERS:
        pairs_that_fit = [i for i, (_, passage) in enumerate(pairs) if len(passage.split()) < 10]
        messages = [
            [{"role": "query", "content": pairs[i][0]}, {"role": "document", "content": pairs[i][1]}]
            for i in pairs_that_fit
        ]
        inputs = tokenizer.apply_chat_template(messages, tokenize=True, **settings)
    else:
        settings.pop("return_dict")
        pairs_that_fit = list(range(len(pairs)))
        inputs = tokenizer([query for query, _ in pairs], [text for _, text in pairs], **settings)
    with torch.no_grad():
        plain = model(**inputs).logits[:, 0].numpy()
    np.testing.assert_allclose(scores[pairs_that_fit], plain, atol=1e-5)
    crossed = CrossEncoder(str(folder), device="cpu").predict(pairs, show_progress_bar=False)
    np.testing.assert_allclose(scores, crossed, atol=1e-5)
    assert scores.std() > 1e-3


def test_training_and_scoring_encode_a_pair_alike(trained):
    _, folder = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = pairs_of_all_lengths()
    encoded, cut = encode_groups(
        tokenizer, [query for query, _ in pairs], [[text] for _, text in pairs], MAX_LENGTH, MAX_QUERY_LENGTH
    )
    ids = {}
    for rows, batch in scoring_batches(tokenizer, pairs, MAX_LENGTH, 1000):
        for row, line, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
            ids[int(row)] = line[mask.bool()].tolist()
    assert [ids[i] for i in range(len(pairs))] == ids_of_pairs(encoded)
    assert 0 < cut < len(pairs)
    assert encoded.lengths.max() == MAX_LENGTH


def test_the_longest_input_is_read_and_no_longer_one(trained):
    _, folder = trained
    reranker = Reranker.from_pretrained(folder, max_length=POSITIONS)
    assert longest_input(reranker.model) == POSITIONS
    assert np.isfinite(reranker.score([("moon", " ".join(WORDS * 10))])).all()
    (_, batch), *_ = scoring_batches(reranker.tokenizer, [("moon", " ".join(WORDS * 10))], POSITIONS, 1000)
    assert batch["input_ids"].shape == (1, POSITIONS)
    with pytest.raises(TrainingError, match=f"reads {POSITIONS} tokens at most"):
        Reranker.from_pretrained(folder, max_length=POSITIONS + 1)


def test_a_pad_token_is_set_and_padding_is_on_the_right(trained):
    _, folder = trained
    reranker = Reranker.from_pretrained(folder)
    assert reranker.tokenizer.pad_token_id is not None
    assert reranker.model.config.pad_token_id == reranker.tokenizer.pad_token_id
    assert AutoTokenizer.from_pretrained(folder).padding_side == "right"
    (_, batch), *_ = scoring_batches(reranker.tokenizer, [("moon", "red"), ("moon", "red tree falls")], 100, 1000)
    longer, shorter = batch["attention_mask"].tolist()
    assert all(longer) and shorter == sorted(shorter, reverse=True) and not all(shorter)
    assert set(batch["input_ids"][1][batch["attention_mask"][1] == 0].tolist()) == {reranker.tokenizer.pad_token_id}
