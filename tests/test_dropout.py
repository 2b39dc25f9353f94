"""Dropout drawn in bulk: what it drops, what it keeps, and whose random numbers it takes."""

import copy
import pickle

import pytest
import torch
from conftest import build_model
from torch import nn

from lce_trainer.dropout import BulkDropout, draw_in_bulk
from lce_trainer.packing import disable_packing, enable_packing


def in_bulk(p: float = 0.3) -> nn.Module:
    model = nn.Sequential(nn.Dropout(p))
    draw_in_bulk(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_drops_its_part_and_scales_the_rest_forward_and_backward(dtype):
    torch.manual_seed(0)
    states = torch.ones(300, 1000, dtype=dtype, requires_grad=True)
    out = in_bulk()(states)
    out.sum().backward()
    dropped = out == 0
    # 300,000 draws: five standard deviations are 0.0042.
    assert abs(float(dropped.float().mean()) - 0.3) < 0.0042
    torch.testing.assert_close(out[~dropped].mean().double(), torch.tensor(1 / 0.7).double(), rtol=1e-2, atol=0)
    assert out.dtype == dtype and torch.equal(states.grad, out)
    # Neither rows nor columns are dropped together.
    assert float(dropped.float().mean(0).std()) < 0.04 and float(dropped.float().mean(1).std()) < 0.03


def test_its_numbers_are_those_of_torchs_generator():
    module, states = in_bulk(), torch.ones(50, 50)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = module(states), module(states)
    torch.set_rng_state(before)
    assert torch.equal(module(states), first) and not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_or_nothing_is_left_to_torch(p):
    torch.manual_seed(0)
    assert torch.equal(in_bulk(p)(torch.ones(4, 4)), torch.full((4, 4), 1 - p))


def test_an_evaluated_model_drops_nothing():
    assert torch.equal(in_bulk().eval()(torch.ones(4, 4)), torch.ones(4, 4))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_packs_draws_in_bulk_and_so_does_its_copy(copied):
    model = build_model(dropout=0.1)
    assert enable_packing(model)
    dropouts = [module for module in copied(model).modules() if isinstance(module, nn.Dropout)]
    assert dropouts and all(isinstance(module.forward, BulkDropout) for module in dropouts)
    assert all(module.forward.module is module for module in dropouts)
    disable_packing(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
