"""Dropout drawn in bulk: what it drops, what it keeps, and whose random numbers it takes; linear layers by oneDNN."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers.tiny import build_model
from lce_trainer.model.packed import cpu
from lce_trainer.model.packed.cpu import BulkDropout, FusedLinear, FusedLinearGelu, is_plain, linear, speed_up
from lce_trainer.model.packed.packing import disable_packing, enable_packing


def in_bulk(p: float = 0.3) -> nn.Module:
    model = nn.Sequential(nn.Dropout(p))
    speed_up(model)
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


@pytest.fixture
def fused(monkeypatch) -> list[bool]:
    """Whether each product that oneDNN made had GELU in it."""
    calls, made = [], cpu._fused
    for dtype in (torch.float32, torch.bfloat16):
        cpu._fusing_works(dtype)  # whose own products do not count

    def counted(states, weight, bias, gelu=False):
        calls.append(gelu)
        return made(states, weight, bias, gelu)

    monkeypatch.setattr(cpu, "_fused", counted)
    return calls


def fuses(dtype: torch.dtype) -> None:
    if not cpu._fusing_works(dtype):
        pytest.skip("this PyTorch or CPU does not fuse")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_without_gradient_are_torchs_and_fused(dtype, fused):
    fuses(dtype)
    model = build_model().to(dtype).eval()
    states = torch.randn(7, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = model.bert.encoder.layer[0]
    wanted = [layer.intermediate(states).detach(), layer.attention.self.query(states).detach()]
    speed_up(model)
    with torch.no_grad():
        got = [layer.intermediate(states), layer.attention.self.query(states)]
    assert fused == [True, False]
    for right, found in zip(wanted, got, strict=True):
        assert float((found - right).norm() / right.norm()) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("trained", ["all", "states", "weights", "no bias"])
def test_gradients_of_float32_layers_are_those_of_float64(trained, fused):
    fuses(torch.float32)
    layer = nn.Linear(64, 48, bias=trained != "no bias").requires_grad_(trained != "states")
    states = torch.randn(3, 5, 64, requires_grad=trained != "weights")
    exact, wide = copy.deepcopy(layer).double(), states.detach().double().requires_grad_(states.requires_grad)
    speed_up(nn.Sequential(layer))
    for module, given in ((layer, states), (exact, wide)):
        made = module(given)
        (made * torch.linspace(-1, 2, made.numel(), dtype=made.dtype).view(made.shape)).sum().backward()
    assert fused == [False] * (1 + states.requires_grad)  # the product itself, and its gradient by the states
    for got, wanted in ((states, wide), *zip(layer.parameters(), exact.parameters(), strict=True)):
        assert (got.grad is None) == (wanted.grad is None) == (not got.requires_grad)
        if got.grad is not None:
            assert float((got.grad - wanted.grad).norm() / wanted.grad.norm()) <= 4 * torch.finfo(torch.float32).eps


def test_another_dtype_that_has_a_gradient_and_autocast_are_torchs_own(fused):
    layer = nn.Linear(8, 4)
    speed_up(nn.Sequential(layer))
    states = torch.randn(3, 8)
    for dtype in (torch.bfloat16, torch.float64):
        layer.to(dtype)(states.to(dtype)).sum().backward()
        assert layer.weight.grad is not None
        layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(states).dtype == torch.bfloat16
        with torch.no_grad():
            assert layer(states).dtype == torch.bfloat16
    with torch.no_grad():
        layer.double()(states.double())
        assert not fused
        layer.float()(states)
    assert fused == [False] or not cpu._fusing_works(torch.float32)


def test_an_operation_that_is_missing_or_wrong_is_not_used(monkeypatch):
    states, weight, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    wanted = nn.functional.linear(states, weight, bias)
    for broken in (lambda *_: (_ for _ in ()).throw(AttributeError("no such operation")), lambda s, w, *_: s @ w.T):
        monkeypatch.setattr(cpu, "_fused", broken)
        cpu._fusing_works.cache_clear()
        with torch.no_grad():
            assert torch.equal(linear(states, weight, bias), wanted)
    cpu._fusing_works.cache_clear()


def test_another_activation_is_left_alone_and_a_watched_layer_is_called(fused):
    model = build_model()
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    speed_up(model)
    first, second = (layer.intermediate for layer in model.bert.encoder.layer[:2])
    assert "forward" not in first.__dict__ and isinstance(second.forward, FusedLinearGelu)
    calls = []
    second.dense.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        second(torch.randn(2, 32))
    assert calls == [1] and not is_plain(second.dense)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_packs_is_sped_up_and_so_is_its_copy(copied):
    model = build_model(dropout=0.1)
    assert enable_packing(model)
    kinds = {nn.Dropout: BulkDropout, nn.Linear: FusedLinear}
    modules = [module for module in copied(model).modules() if type(module) in kinds]
    assert {type(module) for module in modules} == set(kinds)
    assert all(type(module.forward) is kinds[type(module)] and module.forward.module is module for module in modules)
    disable_packing(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
