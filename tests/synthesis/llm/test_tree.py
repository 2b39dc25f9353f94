"""Prefix trees: every sequence gets what it would get alone, and what is shared goes through the model once."""

import logging

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lce_trainer.synthesis.llm.decode import decode, decode_plainly, sample
from lce_trainer.synthesis.llm.tree import common_prefix, cut_batches, last_logits, prefix_cache, takes_trees

SHAPE = {
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
SLIDING = {"sliding_window": 8, "head_dim": 8}
TAKES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": SLIDING,
    "phi3": {"sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {
        **SLIDING,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
# Positions as a bias of the mask, positions ignored, and no attention at all.
REFUSES = {"bloom": {"n_layer": 3, "n_head": 4}, "mamba": {"state_size": 4}}
# These compute attention weights in float32 whatever the model's dtype is.
SINGLE = {"gemma2", "gpt_oss", "bloom", "mamba"}


def build(family):
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **SHAPE | {**TAKES, **REFUSES}[family])
    dtype = torch.float32 if family in SINGLE else torch.float64
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = 2
    return model, 2e-4 if family in SINGLE else 1e-9


def forest(seed=0, start=30):
    """Sequences that share one beginning, then passages, then parts of queries; some twice, one inside another."""
    rng = np.random.default_rng(seed)

    def draw(low, high):
        return rng.integers(3, 330, rng.integers(low, high)).tolist()

    common = draw(start, start + 1)
    found = []
    for _ in range(5):
        passage = common + draw(18, 40)
        words = draw(3, 4)
        found += [passage + words + draw(1, 9), passage + words + draw(1, 9), passage + draw(2, 9)]
    found += [found[0], found[1][:-1], common + draw(2, 5), [*common, 5]]
    return [found[i] for i in rng.permutation(len(found))]


def alone(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def read(model, sequences, counts, past, budget, trees):
    cache = prefix_cache(model, sequences[0][:past]) if past else None
    found = {}
    for logits, places in last_logits(model, sequences, counts, cache, past, budget, trees):
        for index, at in places.items():
            assert index not in found
            found[index] = logits[at]
    assert sorted(found) == list(range(len(sequences)))
    return found


@pytest.mark.parametrize("family", TAKES)
@pytest.mark.parametrize("past", [0, 30])
def test_a_tree_gives_what_each_sequence_gets_alone(family, past):
    model, close = build(family)
    assert takes_trees(model)
    sequences = forest()
    counts = [1 + i % (len(ids) - 30) for i, ids in enumerate(sequences)]
    for budget in (1, 150, 10**6):
        found = read(model, sequences, counts, past, budget, trees=True)
        for index, (ids, count) in enumerate(zip(sequences, counts, strict=True)):
            expected = alone(model, ids)[-count:]
            assert torch.allclose(found[index], expected, rtol=close, atol=close)


@pytest.mark.parametrize("family", REFUSES)
def test_a_model_that_cannot_take_trees_is_told_and_gets_each_sequence_alone(family, caplog):
    model, close = build(family)
    with caplog.at_level(logging.INFO):
        assert not takes_trees(model)
    assert f"{type(model).__name__} does not take packed prefix trees" in caplog.text
    sequences = forest()
    found = read(model, sequences, [2] * len(sequences), 0, 150, trees=False)
    assert all(
        torch.allclose(found[i], alone(model, ids)[-2:], rtol=close, atol=close) for i, ids in enumerate(sequences)
    )


def test_a_model_whose_mask_leaks_is_found_out(monkeypatch):
    model, _ = build("llama")
    assert takes_trees(model)
    monkeypatch.setattr("lce_trainer.synthesis.llm.tree._ancestors", lambda row, width: np.tri(width, dtype=bool))
    assert not takes_trees(model)


def test_a_model_that_ignores_positions_is_found_out(monkeypatch):
    model, _ = build("llama")
    plain = type(model.model.rotary_emb).forward
    monkeypatch.setattr(
        type(model.model.rotary_emb),
        "forward",
        lambda self, x, position_ids: plain(self, x, torch.arange(x.shape[1])[None].expand(len(x), -1)),
    )
    assert not takes_trees(model)


def test_shared_tokens_and_logits_are_computed_once():
    model, _ = build("llama")
    sequences = forest()
    tokens, rows = [], []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: tokens.append(args[0].numel()))
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    read(model, sequences, [4 if len(ids) > 40 else 1 for ids in sequences], 30, 1, trees=True)
    nodes = {tuple(ids[:end]) for ids in sequences for end in range(31, len(ids) + 1)}
    wanted = {
        tuple(ids[:end]) for ids in sequences for end in range(len(ids) + 1 - (4 if len(ids) > 40 else 1), len(ids) + 1)
    }
    assert sum(tokens) - 30 == len(nodes)
    assert sum(rows) - 1 == len(wanted)
    assert len(nodes) < 0.5 * sum(len(ids) - 30 for ids in sequences)


def test_a_long_row_is_cut_and_its_beginning_computed_again():
    model, close = build("llama")
    rng = np.random.default_rng(0)
    passage = rng.integers(3, 330, 60).tolist()
    sequences = [passage + rng.integers(3, 330, 8).tolist() for _ in range(130)]
    widths = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    found = read(model, sequences, [8] * 130, 0, 1, trees=True)
    assert len(widths) == 2 and max(widths) <= 68 + 512
    for index in (0, 62, 63, 64, 129):
        assert torch.allclose(found[index], alone(model, sequences[index])[-8:], atol=close)


def test_no_forward_pass_makes_more_logits_than_it_may(monkeypatch):
    model, close = build("llama")
    monkeypatch.setattr("lce_trainer.synthesis.llm.tree._LOGIT_BYTES", 10 * 330 * 8)
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, output: rows.append(output.shape[1]))
    sequences = forest()
    found = read(model, sequences, [2] * len(sequences), 30, 10**6, trees=True)
    assert max(rows) <= 10 and len(rows) > 3
    assert torch.allclose(found[3], alone(model, sequences[3])[-2:], atol=close)


def test_batches_are_of_like_length_and_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 200, 300).tolist()
    batches = list(cut_batches(lengths, 1000))
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert max(padded) <= 1000
    assert sum(padded) < 1.1 * sum(lengths)
    assert [len(batch) for batch in cut_batches([5, 3], 1)] == [1, 1]


def test_the_common_prefix_ends_where_the_first_differs_or_is_read():
    assert common_prefix([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9]], [9, 9, 9]) == 2
    assert common_prefix([[1, 2, 3], [1, 2, 3]], [2, 1]) == 1
    assert common_prefix([[1, 2]], [2]) == common_prefix([], []) == 0


def greedy(model, ids, count):
    ids = list(ids)
    start = len(ids)
    while len(ids) < start + count and (len(ids) == start or ids[-1] != 2):
        ids.append(int(alone(model, ids)[-1].argmax()))
    return ids[start:]


def likeliest(logits, rows, step):
    return sample(logits, [0] * len(rows), step, 0.0, 1.0)


@pytest.mark.parametrize(("family", "past"), [("gemma3_text", 0), *((family, 30) for family in [*TAKES, *REFUSES])])
def test_what_is_written_is_what_each_prompt_gets_alone(family, past):
    model, _ = build(family)
    prompts = forest(seed=1)[:8]
    if family in REFUSES:
        written = decode_plainly(model, prompts, 12, likeliest, lambda tokens: False)
    else:
        cache = prefix_cache(model, prompts[0][:past]) if past else None
        written = decode(model, prompts, cache, past, 12, likeliest, lambda tokens: False, 150)
    expected = [greedy(model, ids, 12) for ids in prompts]
    same = sum(tokens == wanted for tokens, wanted in zip(written, expected, strict=True))
    assert same >= len(prompts) - (1 if family in SINGLE else 0)  # float32 ties


def test_rows_that_ended_leave_and_one_prompt_is_read_once():
    model, _ = build("llama")
    prompts = forest(seed=1)

    def ended(tokens):
        return len(tokens) > tokens[0] % 11

    expected = [
        next((tokens[:end] for end in range(1, 25) if ended(tokens[:end])), tokens)
        for tokens in (greedy(model, ids, 24) for ids in prompts)
    ]
    sizes = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: sizes.append(tuple(args[0].shape)))
    written = decode(model, prompts, None, 0, 24, likeliest, ended, 10**6)
    assert written == expected
    assert sizes[0][0] == len(set(map(tuple, prompts))) < len(prompts)
    rows = [size[0] for size in sizes[1:]]
    assert all(size[1] == 1 for size in sizes[1:])
    assert rows == sorted(rows, reverse=True) and rows[-1] < 0.5 * rows[0]
    assert sum(rows) < 1.4 * sum(len(tokens) - 1 for tokens in expected)
