"""Ghost batch norm and batch renormalisation against their papers' formulas, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resops.nn import BatchNormAct2d, BatchRenormAct2d, GhostBatchNormAct2d
from tests.dispatch import counted_calls

pytestmark = pytest.mark.usefixtures("native")


def wild(norm: Any) -> Any:
    norm.double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 3)
    return norm


def batch(samples: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 3, 4, 5, dtype=torch.float64) * 2 + 1
    return x.requires_grad_(), torch.randn_like(x, requires_grad=True)


def assert_same(
    found: Tensor, expected: Tensor, leaves: list[Tensor], others: list[Tensor]
) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    grad = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(expected, others, grad),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("samples", "sizes"), [(8, [4, 4]), (7, [4, 3]), (9, [3, 3, 3]), (4, [4])])
def test_ghosts_are_normalised_one_after_the_other(samples: int, sizes: list[int]) -> None:
    norm = wild(GhostBatchNormAct2d(3, virtual_batch_size=4, act_layer="silu"))
    stock = nn.BatchNorm2d(3).double()
    stock.load_state_dict(norm.state_dict())
    x, residual = batch(samples)
    with counted_calls() as calls:
        y = norm(x, residual)
    assert calls["batch_norm_forward"] == len(sizes)
    expected = torch.cat([stock(ghost) for ghost in x.split(sizes)]) + residual
    leaves = [x, residual]
    assert_same(y, F.silu(expected), [*leaves, *norm.parameters()], [*leaves, *stock.parameters()])
    for key, value in stock.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[key], value, rtol=1e-12, atol=1e-12, msg=key)
    torch.testing.assert_close(norm.eval()(x), F.silu(stock.eval()(x)))


def renormalised(norm: Any, x: Tensor) -> Tensor:
    """Ioffe, 2017, Algorithm 1, for statistics that are not updated yet."""
    dims = (0, 2, 3)
    mean, var = x.mean(dims), x.var(dims, correction=0)
    sigma_batch, sigma = (var + norm.eps).sqrt(), (norm.running_var + norm.eps).sqrt()
    r = (sigma_batch / sigma).detach().clamp(1 / norm.r_max, norm.r_max)
    d = ((mean - norm.running_mean) / sigma).detach().clamp(-norm.d_max, norm.d_max)

    def per_channel(t: Tensor) -> Tensor:
        return t.view(1, -1, 1, 1)

    xhat = (x - per_channel(mean)) / per_channel(sigma_batch)
    xhat = xhat * per_channel(r) + per_channel(d)
    return xhat * per_channel(norm.weight) + per_channel(norm.bias)


@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.2, 0.1), (100.0, 100.0)], ids=str)
def test_renormalisation_is_the_formula(limits: tuple[float, float]) -> None:
    norm = wild(BatchRenormAct2d(3, *limits, act_layer="silu"))
    x, residual = batch(4)
    expected = F.silu(renormalised(norm, x) + residual)
    plain = BatchNormAct2d(3).double()
    plain.load_state_dict(norm.state_dict())
    plain(x)
    leaves = [x, residual, *norm.parameters()]
    assert_same(norm(x, residual), expected, leaves, leaves)
    for key, value in plain.state_dict().items():  # updated as batch norm does
        torch.testing.assert_close(norm.state_dict()[key], value, msg=key)


def test_without_limits_training_is_evaluation() -> None:
    """r and d undo the batch's statistics: the point of the paper."""
    norm = wild(BatchRenormAct2d(3, 1e6, 1e6))
    x, _ = batch(4)
    torch.testing.assert_close(copy.deepcopy(norm)(x), norm.eval()(x), rtol=1e-9, atol=1e-9)


def test_with_the_narrowest_limits_it_is_batch_norm() -> None:
    norm = wild(BatchRenormAct2d(3, 1.0, 0.0))
    plain = BatchNormAct2d(3).double()
    plain.load_state_dict(norm.state_dict())
    x, _ = batch(4)
    torch.testing.assert_close(norm(x), plain(x), rtol=1e-12, atol=1e-12)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="virtual_batch_size must be positive, but got 0"):
        GhostBatchNormAct2d(3, 0)
    with pytest.raises(ValueError, match=r"r_max must be at least 1 .* but got 0\.5 and 0"):
        BatchRenormAct2d(3, 0.5, 0)
    with pytest.raises(ValueError, match="batch renormalisation needs running statistics"):
        BatchRenormAct2d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        BatchRenormAct2d(3)(torch.randn(1, 3, 1, 1))
