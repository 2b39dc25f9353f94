"""Attention within the pairs of a packed row, against its definition."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from lce_trainer.model.packed.attention import Packing, attend, attend_by_calls, kernel_problem, make_packing


def test_attention_by_calls_is_attention_pair_by_pair():
    torch.manual_seed(0)
    lengths = [1, 2, 2, 5, 30, 31, 200]
    packing = make_packing(torch.tensor(lengths).numpy(), "cpu")
    query, key, value = torch.randn(3, sum(lengths), 2, 4, dtype=torch.float64)
    wanted = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        weights = torch.einsum("qhd,khd->hqk", q, k).div(2).softmax(-1)
        wanted.append(torch.einsum("hqk,khd->qhd", weights, v))
    torch.testing.assert_close(attend(query, key, value, packing), torch.cat(wanted), rtol=0, atol=1e-12)
    assert len(packing.calls) < len(lengths)


def by_pair(query, key, value, packing: Packing, causal=False, dropout=0.0, scaling=None, window=None):
    """Attention as its definition has it, pair by pair and head by head."""
    contexts, starts = [], packing.starts.tolist()
    for pair, (start, end) in enumerate(pairwise(starts)):
        rows = slice(pair, pair + 1) if len(query) != len(key) else slice(start, end)
        place = torch.arange(end - start, device=query.device)
        mine = place[-(rows.stop - rows.start) :] if causal else place[: rows.stop - rows.start]
        distance = mine[:, None] - place
        seen = torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() < window
        if causal:
            seen = seen & (distance >= 0)
        heads = []
        for head in range(query.shape[1]):
            shared = head * key.shape[1] // query.shape[1]
            products = query[rows, head] @ key[start:end, shared].T * (scaling or query.shape[2] ** -0.5)
            weights = products.masked_fill(~seen, -torch.inf).softmax(-1)
            heads.append(functional.dropout(weights, dropout) @ value[start:end, shared])
        contexts.append(torch.stack(heads, 1))
    return torch.cat(contexts)


def test_a_kernel_is_checked_against_attention_by_calls():
    def forgets_its_window(*states, window=None):
        return by_pair(*states[:-1], None)

    def takes_no_dropout(query, key, value, packing, causal, dropout, scaling, window):
        if dropout:
            raise TypeError("no dropout here")
        return by_pair(query, key, value, packing, causal, dropout, scaling, window)

    def goes_back_wrongly(query, key, value, *rest):
        return by_pair(query, key.detach() + 0 * key, value, *rest)

    for dtype in (torch.float32, torch.bfloat16):
        assert kernel_problem(by_pair, "cpu", dtype) is None
        assert kernel_problem(attend_by_calls, "cpu", dtype) is None
    assert "is off by" in kernel_problem(forgets_its_window, "cpu", torch.bfloat16)
    assert "window 9" in kernel_problem(forgets_its_window, "cpu", torch.bfloat16)
    assert "is off by" in kernel_problem(goes_back_wrongly, "cpu", torch.bfloat16)
    assert "failed (causal False, window None, all queries): no dropout here" in kernel_problem(
        takes_no_dropout, "cpu", torch.bfloat16
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_attention_sees_its_window_and_what_is_before_it(window, causal):
    torch.manual_seed(0)
    lengths = torch.tensor([1, 9, 9, 12, 40]).numpy()
    packing = make_packing(lengths, "cpu", reads_last=causal)
    states = torch.randn(3, int(lengths.sum()), 2, 8, dtype=torch.float64)
    for query in (states[0], states[0][packing.read]):
        given = (query, *states[1:], packing, causal, 0.0, 0.3, window)
        torch.testing.assert_close(attend(*given), by_pair(*given), rtol=0, atol=1e-12)


def test_under_autocast_all_states_have_its_precision():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 9]).numpy()
    packing = make_packing(lengths, "cpu")
    query, key, value = torch.randn(3, 12, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attend(query, key, value.bfloat16(), packing)
        assert torch.equal(mixed, attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), packing))
    assert mixed.dtype == torch.bfloat16


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("one_query", [False, True])
def test_attention_in_bfloat16_rounds_its_input_and_output_alone(window, one_query):
    torch.manual_seed(0)
    lengths = torch.tensor([1, 9, 9, 12, 40]).numpy()
    packing = make_packing(lengths, "cpu")
    half = [tensor.requires_grad_() for tensor in (3 * torch.randn(3, int(lengths.sum()), 2, 8)).bfloat16().unbind()]
    exact = [tensor.detach().double().requires_grad_() for tensor in half]
    contexts = []
    for query, key, value in (exact, half):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=query.dtype == torch.bfloat16):
            context = attend(query[packing.read] if one_query else query, key, value, packing, window=window)
        (context * torch.linspace(-1, 1, context.numel()).view_as(context)).sum().backward()
        contexts.append(context)
    torch.testing.assert_close(contexts[1].double(), contexts[0], rtol=2**-8, atol=1e-4)
    for rough, fine in zip(half, exact, strict=True):
        torch.testing.assert_close(rough.grad.double(), fine.grad, rtol=2**-6, atol=0.03)


def test_attention_with_dropout_keeps_its_mean():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 8, 9]).numpy()
    packing = make_packing(lengths, "cpu")
    query, key, value = torch.randn(3, int(lengths.sum()), 2, 8)
    mean = sum(attend(query, key, value, packing, dropout=0.2) for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, attend(query, key, value, packing), rtol=0, atol=0.06)
