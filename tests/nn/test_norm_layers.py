"""Norms by name, no norm, and standardised convolutions."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resops
from resops.nn import BiasAct, GroupNorm1Act, GroupNormAct, StdConv2d, create_norm_act
from resops.nn.norm_layers import NormThenAct
from tests.dispatch import counted_calls
from tests.torchvision_ops import timm

STOCK: dict[str, Any] = {
    "batch": nn.BatchNorm2d,
    "group": functools.partial(nn.GroupNorm, 8),
    "layer": functools.partial(nn.GroupNorm, 1),
    "instance": functools.partial(nn.InstanceNorm2d, affine=True),
}


@pytest.mark.parametrize("made_from", ["name", "norm of torch"])
@pytest.mark.parametrize("name", STOCK)
def test_equals_the_norm_of_torch(name: str, made_from: str) -> None:
    stock = STOCK[name](24).double()
    layer = name if made_from == "name" else STOCK[name]
    norm = create_norm_act(layer, 24, "silu").double()
    for p in stock.parameters():
        nn.init.normal_(p)
    norm.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(norm.state_dict(), strict=True)
    x, residual = (torch.randn(2, 24, 3, 4, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(norm(x, residual), F.silu(stock(x) + residual))
    bare = create_norm_act(layer, 24, "silu", apply_act=False).double()
    bare.load_state_dict(stock.state_dict())
    torch.testing.assert_close(bare(x), stock(x))


@pytest.mark.parametrize("name", ["batch", "group", "layer", "instance", "none"])
def test_three_dimensions(name: str) -> None:
    norm = create_norm_act(name, 8, dimensions=3)
    y = norm(torch.randn(2, 8, 2, 3, 4))
    assert y.shape == (2, 8, 2, 3, 4) and (y >= 0).all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bias(shared: bool, dtype: torch.dtype, native: None) -> None:
    """One pass; gradients as autograd's own."""
    layer: Any = BiasAct(5, shared=shared)
    assert layer.bias.shape == ((1,) if shared else (5,))
    assert list(layer.state_dict()) == ["bias"]
    nn.init.normal_(layer.bias)
    x, residual = (torch.randn(3, 5, 2, 4).to(dtype) for _ in range(2))
    layer = layer.double() if dtype == torch.float64 else layer
    with counted_calls() as calls:
        y = layer(x, residual)
    assert calls["batch_norm_forward"] == 1 and y.dtype == dtype
    assert layer.bias is not None
    bias = layer.bias.detach().double().expand(5).clone().requires_grad_()
    expected = F.relu(x.double() + bias.view(1, 5, 1, 1) + residual.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    (grad,) = torch.autograd.grad(y.sum(), layer.bias)
    (by_channel,) = torch.autograd.grad(expected.sum(), bias)
    torch.testing.assert_close(
        grad.double(), by_channel.sum(0, keepdim=True) if shared else by_channel
    )


def test_group_norm_by_groups_of_channels() -> None:
    assert GroupNormAct(24, group_size=8).num_groups == 3
    assert GroupNorm1Act(24).num_groups == 1
    assert create_norm_act("group", 48).num_groups == 16  # what divides both 32 and 48
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        GroupNormAct(24)


def test_a_norm_that_is_no_norm_of_ours() -> None:
    """It runs as it is; the residual and the activation are one op after it."""
    norm = create_norm_act(lambda channels: nn.LocalResponseNorm(2), 4)
    x, residual = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    expected = F.relu(nn.LocalResponseNorm(2)(x) + residual)
    torch.testing.assert_close(norm(x, residual), expected)
    torch.testing.assert_close(norm(x), F.relu(nn.LocalResponseNorm(2)(x)))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"norm_layer must be None, a class or one of .*'x'"):
        create_norm_act("x", 4)
    with pytest.raises(ValueError, match=r"norm_layer must be .*but got 'ghost_batch'"):
        create_norm_act("ghost_batch", 4, dimensions=3)


@pytest.mark.models
def test_standardised_convolution_is_timms() -> None:
    ours = StdConv2d(6, 4, 3, padding=1, groups=2).double()
    theirs = timm().layers.StdConv2d(6, 4, 3, groups=2, bias=True).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    with resops.backend("reference"):
        torch.testing.assert_close(ours(x), y)


def test_without_a_norm_the_input_stays() -> None:
    layer = NormThenAct(None, "relu")
    x = torch.randn(2, 4, 3, 3)
    before = x.clone()
    assert torch.equal(layer(x), before.relu()) and torch.equal(x, before)


def test_what_a_norm_function_made_is_taken_over() -> None:
    def frozen(channels: int) -> nn.Module:
        norm = nn.BatchNorm2d(channels, dtype=torch.float64)
        nn.init.zeros_(norm.weight).requires_grad_(False)
        return norm.eval()

    layer: Any = create_norm_act(frozen, 4, "relu")
    assert type(layer) is resops.nn.BatchNormAct2d and not layer.training
    assert layer.weight is not None and layer.running_mean is not None
    assert layer.weight.dtype == layer.running_mean.dtype == torch.float64
    assert not layer.weight.requires_grad and not layer.weight.any()


def test_no_norm_comes_whole_from_the_meta_device() -> None:
    layer = resops.nn.BiasAct(4, device="meta").to_empty(device="cpu")
    layer.load_state_dict({"bias": torch.arange(4.0)}, strict=True)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(layer(x), (x + torch.arange(4.0).view(4, 1, 1)).relu())
