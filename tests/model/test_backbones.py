"""Every family of models that is supported: trains exactly, is saved, and scores alike in every loader."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from helpers.backbones import MAX_LENGTH, MAX_QUERY_LENGTH, WAYS, make_trainer, pairs_of_all_lengths
from helpers.tiny import WORDS, ids_of_pairs
from helpers.tiny_models import DECODERS, FAMILIES, POSITIONS, tiny_model
from lce_trainer.errors import TrainingError
from lce_trainer.model.loading import longest_input
from lce_trainer.model.pairs import encode_groups, pad_pairs
from lce_trainer.model.reranker import Reranker
from lce_trainer.model.scoring import scoring_batches


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
        ids |= dict(zip(rows.tolist(), ids_of_pairs(batch), strict=True))
    assert [ids[i] for i in range(len(pairs))] == ids_of_pairs(encoded)
    assert 0 < cut.sum() < len(pairs)
    assert encoded.lengths.max() == MAX_LENGTH


def test_the_longest_input_is_read_and_no_longer_one(trained):
    _, folder = trained
    reranker = Reranker.from_pretrained(folder, max_length=POSITIONS)
    assert longest_input(reranker.model) == POSITIONS
    assert np.isfinite(reranker.score([("moon", " ".join(WORDS * 10))])).all()
    (_, batch), *_ = scoring_batches(reranker.tokenizer, [("moon", " ".join(WORDS * 10))], POSITIONS, 1000)
    assert batch.lengths.tolist() == [POSITIONS]
    with pytest.raises(TrainingError, match=f"reads {POSITIONS} tokens at most"):
        Reranker.from_pretrained(folder, max_length=POSITIONS + 1)


def test_a_pad_token_is_set_and_padding_is_on_the_right(trained):
    _, folder = trained
    reranker = Reranker.from_pretrained(folder)
    assert reranker.tokenizer.pad_token_id is not None
    assert reranker.model.config.pad_token_id == reranker.tokenizer.pad_token_id
    assert AutoTokenizer.from_pretrained(folder).padding_side == "right"
    (_, pairs), *_ = scoring_batches(reranker.tokenizer, [("moon", "red"), ("moon", "red tree falls")], 100, 1000)
    batch = pad_pairs(reranker.tokenizer, pairs)
    longer, shorter = batch["attention_mask"].tolist()
    assert all(longer) and shorter == sorted(shorter, reverse=True) and not all(shorter)
    assert set(batch["input_ids"][1][batch["attention_mask"][1] == 0].tolist()) == {reranker.tokenizer.pad_token_id}
