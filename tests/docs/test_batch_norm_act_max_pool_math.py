"""The formulas of docs/math/batch_norm_act_max_pool.md."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .formulas import ACTIVATIONS, EPS, act, assert_close, checks, derivative, grads, random

WINDOWS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 1), (5, 2, 2)]  # K, T, P, of both dimensions


def windows_of(height: int, k: int, t: int, p: int) -> list[list[int]]:
    """What each window along one dimension sees, by trying every place that it could begin at."""
    found: list[list[int]] = []
    for o in itertools.count():
        if o * t - p + k > height + p:
            return found
        found.append([e for e in range(o * t - p, o * t - p + k) if 0 <= e < height])
    raise AssertionError


def first_maximum(a: Tensor, rows: list[int], columns: list[int]) -> tuple[int, int]:
    places = list(itertools.product(rows, columns))
    best = max(float(a[u, v]) for u, v in places)
    return next((u, v) for u, v in places if float(a[u, v]) == best)


@checks("P1", "P2", "P3")
@pytest.mark.parametrize(("k", "t", "p"), WINDOWS)
def test_windows_and_indices(k: int, t: int, p: int) -> None:
    height, width = 7, 8
    # Few values, so that there are ties.
    a = torch.randint(0, 4, (height, width), generator=torch.Generator().manual_seed(k)).double()
    y, flat = F.max_pool2d_with_indices(a[None, None], k, t, p)
    down, across = windows_of(height, k, t, p), windows_of(width, k, t, p)
    assert len(down) == math.floor((height + 2 * p - k) / t) + 1 == y.size(2)
    assert len(across) == math.floor((width + 2 * p - k) / t) + 1 == y.size(3)
    for o1, o2 in itertools.product(range(len(down)), range(len(across))):
        u, v = first_maximum(a, down[o1], across[o2])
        assert float(y[0, 0, o1, o2]) == float(a[u, v])
        assert int(flat[0, 0, o1, o2]) == u * width + v
        index = (u - (o1 * t - p)) * k + v - (o2 * t - p)
        assert 0 <= index < k * k
        assert (o1 * t - p + index // k, o2 * t - p + index % k) == (u, v)


@checks("P4", "P5")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward(activation: str) -> None:
    k, t, p = 3, 2, 1
    x = (random(2, 3, 5, 6, seed=140) + 1).requires_grad_()
    w, b = (random(3, seed=s).requires_grad_() for s in (141, 142))
    channel = (1, 3, 1, 1)

    mean = x.mean((0, 2, 3), keepdim=True)
    s = 1 / torch.sqrt(((x - mean) ** 2).mean((0, 2, 3), keepdim=True) + EPS)
    xhat = (x - mean) * s
    z = w.view(channel) * xhat + b.view(channel)
    y, flat = F.max_pool2d_with_indices(act(z, activation), k, t, p)
    grad_y = random(*y.shape, seed=143)
    auto = grads(y, (x, w, b), grad_y)
    with torch.no_grad():
        grad_a = torch.zeros_like(x)
        for n, c, o1, o2 in itertools.product(*map(range, y.shape)):
            e = int(flat[n, c, o1, o2])
            grad_a[n, c, e // x.size(3), e % x.size(3)] += grad_y[n, c, o1, o2]
        g = grad_a * derivative(z, activation)
        assert_close(g.sum((0, 2, 3)), auto[2])
        assert_close((g * xhat).sum((0, 2, 3)), auto[1])
        means = g.mean((0, 2, 3), keepdim=True), (g * xhat).mean((0, 2, 3), keepdim=True)
        assert_close(w.view(channel) * s * (g - means[0] - xhat * means[1]), auto[0])


@checks("P6")
@pytest.mark.parametrize(("k", "t", "p"), [*WINDOWS, (1, 1, 0), (1, 4, 0), (4, 1, 2)])
def test_windows_that_see_an_element(k: int, t: int, p: int) -> None:
    height = 9
    windows = windows_of(height, k, t, p)
    for h in range(height):
        low, high = math.floor((h + p - k) / t) + 1, math.floor((h + p) / t)
        seen = [o for o in range(low, high + 1) if 0 <= o < len(windows)]
        assert seen == [o for o, elements in enumerate(windows) if h in elements]
        assert all(0 <= h + p - o * t < k for o in seen)
