"""Packed and padded, whole and read-only last layers: one function, in float64, for every family."""

import copy
import logging
import pickle

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
)

from helpers.packed import CONFIGS, LENGTHS, SMALL, STILL, flat, make_batch, make_model
from helpers.tiny import WORDS, build_model
from lce_trainer.model.packed.packing import _filler, disable_packing, enable_packing, pack_pairs, packs
from lce_trainer.model.packed.packing import packed_scores as scores_of
from lce_trainer.model.yes_no import pair_logits, set_answer_ids


def packed_scores(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    assert pack_pairs(flat(batch), model.config, model.device)[0]["input_ids"].shape == (1, sum(LENGTHS))
    return scores_of(model, flat(batch), model.config, model.device)


def gradients(model, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (scores * torch.linspace(-1, 2, len(scores), dtype=scores.dtype)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_equal(model, scores: torch.Tensor, padded: torch.Tensor, wanted: dict[str, torch.Tensor]) -> None:
    """Packed scores, and the gradients they give, are those of the padded pass."""
    assert padded.std() > 1e-3
    torch.testing.assert_close(scores, padded, rtol=0, atol=1e-9)
    got = gradients(model, scores)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_logits_and_gradients_are_the_padded_ones(family):
    model = make_model(family)
    batch = make_batch(model)
    padded = model(**batch).logits[:, 0]
    wanted = gradients(model, padded)
    assert enable_packing(model)
    check_equal(model, packed_scores(model, batch), padded, wanted)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral, sliding"])
def test_a_packed_language_model_answers_as_a_padded_one(family):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=torch.float64).eval()
    assert not enable_packing(model)  # nothing says how it answers
    set_answer_ids(model.config, [7, 9])
    batch = make_batch(model)
    padded = pair_logits(model, batch, model)
    wanted = gradients(model, padded)
    assert enable_packing(model)
    check_equal(model, packed_scores(model, batch), padded, wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "modernbert, mean", "qwen3"])
def test_a_copy_packs_by_itself(family, copied):
    model = make_model(family)
    batch = make_batch(model)
    assert enable_packing(model)
    again = copied(model)
    with torch.no_grad():
        before = packed_scores(model, batch)
        for parameter in model.parameters():
            parameter.zero_()
        assert packs(again)
        torch.testing.assert_close(packed_scores(again, batch), before, rtol=0, atol=1e-12)


def test_a_model_that_shares_its_config_with_one_that_packs_is_padded():
    model = make_model("bert")
    assert enable_packing(model)
    assert packs(model) and not packs(type(model)(model.config))
    disable_packing(model)
    assert not packs(model)


def test_undone_a_model_attends_as_before():
    model = make_model("bert")
    model.set_attn_implementation("eager")
    assert enable_packing(model)
    disable_packing(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_layers_that_are_watched_are_called(family):
    model = make_model(family)
    batch = make_batch(model)
    assert enable_packing(model)
    before = packed_scores(model, batch)
    calls = []
    names = ("query", "key", "value", "q_lin", "k_lin", "v_lin")
    for name, module in model.named_modules():
        if name.endswith(names):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    torch.testing.assert_close(packed_scores(model, batch), before, rtol=0, atol=1e-12)
    assert len(calls) == len(set(calls)) == 9


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_that_can_pack_still_takes_padded_input_and_can_be_undone(family):
    model = make_model(family)
    batch = make_batch(model)
    with torch.no_grad():
        before = model(**batch).logits
        assert enable_packing(model)
        torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=1e-12)
        disable_packing(model)
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_neighbour_in_the_row_changes_nothing(family):
    model = make_model(family)
    assert enable_packing(model)
    batch = make_batch(model)
    with torch.no_grad():
        before = packed_scores(model, batch)
        batch["input_ids"][1, :30] = 7
        after = packed_scores(model, batch)
    assert before[1] != after[1]
    others = [i for i in range(len(LENGTHS)) if i != 1]
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=1e-12)


def test_gradient_checkpointing_changes_nothing():
    model = make_model("bert")
    batch = make_batch(model)
    enable_packing(model)
    wanted = gradients(model, packed_scores(model, batch))
    model.gradient_checkpointing_enable()
    model.train()
    got = gradients(model, packed_scores(model, batch))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "qwen3"])
def test_a_long_row_is_filled_up_and_the_filler_changes_nothing(family):
    model = make_model(family)
    lengths = [5, 40, 33, 12] * 11 + [38]  # 1028 tokens
    real = torch.arange(40) < torch.tensor(lengths)[:, None]
    words = torch.randint(5, 60, real.shape, generator=torch.Generator().manual_seed(1))
    batch = {
        "input_ids": torch.where(real, words, model.config.pad_token_id),
        "attention_mask": real.long(),
    }
    padded = model(**batch).logits[:, 0]
    wanted = gradients(model, padded)
    assert enable_packing(model)
    rows = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, out: rows.append(tuple(out.shape[:2])))
    packed = scores_of(model, flat(batch, lengths), model.config, model.device)
    hook.remove()
    assert rows == [(1, 1056)]
    check_equal(model, packed, padded, wanted)


def test_long_rows_have_few_lengths_and_little_filler():
    filled = {tokens: tokens + _filler(tokens, 256) for tokens in range(1, 8193)}
    assert all(filled[tokens] == tokens for tokens in range(1, 1025))
    assert all(size < tokens * (1 + 1 / 32) for tokens, size in filled.items())
    assert len({size for tokens, size in filled.items() if tokens > 1024}) == 3 * 32
    assert _filler(100_001, 48) < 48  # no longer than a pair may be


def test_dropout_acts_in_a_packed_row():
    torch.manual_seed(0)
    model = build_model(dropout=0.3).train()
    assert enable_packing(model) and model.training
    batch = {"input_ids": torch.randint(4, 4 + len(WORDS), (8, 30)), "attention_mask": torch.ones(8, 30)}
    scores = [packed_scores(model, batch | {"input_ids": batch["input_ids"]}) for _ in range(2)]
    assert (scores[0] - scores[1]).abs().max() > 1e-4


def test_other_families_fall_back_to_padding_and_say_so_once(caplog):
    config = DebertaV2Config(**SMALL, **STILL, relative_attention=True, pos_att_type=["p2c", "c2p"])
    caplog.set_level(logging.INFO, logger="lce_trainer")
    model = AutoModelForSequenceClassification.from_config(config)
    assert not enable_packing(model)
    assert caplog.text.count("cannot be packed: padding") == 1
    batch = pad_pairs_of(model)
    assert model(**batch).logits.shape == (2, 1)


def pad_pairs_of(model) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[4, 5, 6], [4, 5, model.config.pad_token_id]])
    return {"input_ids": ids, "attention_mask": (ids != model.config.pad_token_id).long()}


def test_a_model_whose_packed_scores_differ_falls_back(caplog):
    model = build_model().eval()
    # Positions by an own rule, as a changed copy of a model might have.
    embed = model.bert.embeddings.forward
    model.bert.embeddings.forward = lambda *args, position_ids=None, **kwargs: embed(*args, **kwargs)
    assert not enable_packing(model)
    assert "packed" in caplog.text and "padding" in caplog.text
    assert model.config._attn_implementation == "sdpa"


def test_what_is_saved_is_the_stock_model(tmp_path):
    model = build_model()
    enable_packing(model)
    model.save_pretrained(tmp_path)
    assert "lce_packed" not in (tmp_path / "config.json").read_text()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
