"""Joins with random weights: the values that they take, their gradients and their expectations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resops.nn import ResDrop, ShakeDrop, ShakeShake


def weights(y: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    """The weight of every sample's branch, where the sum is y = a * x + residual."""
    found = ((y - residual) / x).flatten(1)
    torch.testing.assert_close(found, found[:, :1].expand_as(found), rtol=1e-6, atol=1e-7)
    return found[:, 0].detach().round(decimals=9)


def pair(samples: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(samples, 3, 2, dtype=torch.float64) + 1
    return x.requires_grad_(), torch.randn_like(x).requires_grad_()


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_res_drop(mode: str) -> None:
    join = ResDrop(0.3, mode=mode)
    x, residual = pair(2000)
    y = join(x, residual)
    drawn = weights(y, x, residual)
    assert set(drawn.tolist()) <= {0.0, 1.0}
    if mode == "row":
        # Five standard deviations of a mean of 2000 draws.
        assert abs(float(drawn.mean()) - 0.7) < 5 * (0.21 / 2000) ** 0.5
    else:
        assert drawn.unique().numel() == 1
    torch.testing.assert_close(join.eval()(x, residual), 0.7 * x + residual)


def test_shake_drop() -> None:
    """Weights are 1 or on [-1, 1] forward, and 1 or on [0, 1] backward, for the same samples."""
    join = ShakeDrop(0.4, mode="row")
    x, residual = pair(2000)
    y = join(x, residual)
    y.sum().backward()
    assert x.grad is not None and residual.grad is not None
    forward, backward = weights(y, x, residual), x.grad[:, 0, 0]
    shaken = ~torch.isclose(forward, torch.ones_like(forward))
    assert abs(float(shaken.double().mean()) - 0.4) < 5 * (0.24 / 2000) ** 0.5
    assert forward[shaken].min() < -0.9 and forward.max() <= 1
    assert 0 <= backward[shaken].min() < 0.1 < 0.9 < backward[shaken].max() < 1
    assert (backward[~shaken] == 1).all() and (residual.grad == 1).all()
    assert abs(float(torch.corrcoef(torch.stack([forward[shaken], backward[shaken]]))[0, 1])) < 0.2
    torch.testing.assert_close(join.eval()(x, residual), 0.6 * x + residual)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_shake_shake(mode: str) -> None:
    join = ShakeShake(mode)
    x, other = pair(500)
    y = join(x, other)
    y.sum().backward()
    assert x.grad is not None and other.grad is not None
    forward = weights(y - other, x - other, torch.zeros_like(x))
    backward = x.grad[:, 0, 0]
    torch.testing.assert_close(x.grad + other.grad, torch.ones_like(x))
    assert forward.unique().numel() == backward.unique().numel() == (500 if mode == "row" else 1)
    assert forward.min() >= 0 and forward.max() <= 1 and not torch.allclose(forward, backward)
    torch.testing.assert_close(join.eval()(x, other), (x + other) / 2)


def test_activation_and_16_bits() -> None:
    x, residual = torch.randn(4, 8, 3).bfloat16(), torch.randn(4, 8, 3).bfloat16()
    for join in (ResDrop(0.5, "relu"), ShakeDrop(0.5, "relu"), ShakeDrop(1.0, "leaky_relu")):
        y = join(x, residual)
        assert y.dtype == torch.bfloat16 and y.isfinite().all()
        if join.activation == "relu":
            assert (y >= 0).all()


def test_wrong_arguments() -> None:
    for kind in (ResDrop, ShakeDrop):
        with pytest.raises(ValueError, match="drop_prob must be between 0 and 1, but got 2"):
            kind(2.0)
        with pytest.raises(ValueError, match="activation must be None or one of identity"):
            kind(0.5, "tanh")
        with pytest.raises(ValueError, match="mode must be 'row' or 'batch', but got 'all'"):
            kind(0.5, mode="all")
    with pytest.raises(ValueError, match="mode must be 'row' or 'batch'"):
        ShakeShake("all")


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_shake_drop_refuses_what_it_cannot_differentiate(activation: str) -> None:
    with pytest.raises(ValueError, match="activation must be None"):
        ShakeDrop(0.5, activation)
