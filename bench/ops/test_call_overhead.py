"""Host time of one call, on a tensor so small that nothing else is left to see.

Run by hand, with pytest-benchmark: ``python -m pytest bench/ops --benchmark-columns=median,iqr``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from resops.functional import batch_norm_act, residual_add


def _tensor() -> Tensor:
    x = torch.randn(2, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def _eager(x: Tensor, residual: Tensor, p: list[Tensor]) -> Tensor:
    y = F.batch_norm(x, p[0], p[1], p[2], p[3], True)
    y += residual
    return F.relu_(y)


def _fused(x: Tensor, residual: Tensor, p: list[Tensor]) -> Tensor:
    return batch_norm_act(x, p[0], p[1], p[2], p[3], True, residual=residual)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("call", [_eager, _fused], ids=["eager", "resops"])
@pytest.mark.benchmark(group="batch norm + add + ReLU")
def test_batch_norm(
    benchmark: BenchmarkFixture, call: Callable[..., Tensor], backward: bool
) -> None:
    x, residual = _tensor(), _tensor()
    stats = [torch.zeros(8), torch.ones(8)]
    params = [torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)]
    grad = torch.ones_like(x)

    def step() -> Tensor:
        y = call(x, residual, stats + params)
        if backward:
            torch.autograd.grad(y, [x, residual, *params], grad)
        return y

    expected = _eager(x, residual, [torch.zeros(8), torch.ones(8), *params])
    torch.testing.assert_close(benchmark(step), expected)


@pytest.mark.parametrize("name", ["eager", "resops"])
@pytest.mark.benchmark(group="add + ReLU")
def test_residual_add(benchmark: BenchmarkFixture, name: str) -> None:
    x, residual = _tensor(), _tensor()
    calls: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: F.relu_(x + residual),
        "resops": lambda: residual_add(x, residual, activation="relu"),
    }
    torch.testing.assert_close(benchmark(calls[name]), F.relu(x + residual))
