"""The formulas of docs/math/batch_norm.md: statistics, other definitions, what the phases give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .formulas import (
    EPS,
    U,
    assert_close,
    checks,
    grads,
    mean,
    random,
    running,
    total,
)
from .test_batch_norm_math import Channels


def two_pass(x: Tensor) -> tuple[float, Tensor, Tensor]:
    mu = x.mean()
    return float(x.numel()), mu, ((x - mu) ** 2).sum()


def one_pass_error(x: Tensor) -> float:
    """Relative error of sum x^2 - (sum x)^2 / n in fp32, added up one element after the other."""
    square = plain = np.float32(0)
    for value in x.numpy():
        square, plain = square + value * value, plain + value
    _, _, M2 = two_pass(x.double())
    return abs(float(square - plain * plain / np.float32(len(x))) - float(M2)) / float(M2)


@checks("B41")
def test_one_pass_variance_fails_as_printed() -> None:
    n = 256
    deviations = random(n, seed=20)
    for ratio in (1.0, 30.0, 1000.0):
        x = (ratio + deviations).float()
        exact = x.double()
        _, mu, M2 = two_pass(exact)
        kappa_squared = float((exact**2).sum() / M2)
        assert math.isclose(kappa_squared, float(1 + mu**2 * n / M2), rel_tol=1e-12)
        error = one_pass_error(x)
        assert error <= 2 * n * U * kappa_squared
        if ratio == 1000.0:  # a stable algorithm is at n * U at most; this one is far beyond
            assert error > 10 * n * U
    # mean / std = 2 ** 12: nothing is left
    assert one_pass_error((4096 + deviations).float()) > 0.1


@checks("B42", "B43")
@pytest.mark.parametrize("K", [0.0, 2.5, -3.0])
def test_shifted_sums(K: float) -> None:
    x = 2 + random(40, seed=21)
    n, mu, M2 = two_pass(x)
    delta = x - K
    assert_close(K + delta.sum() / n, mu)
    assert_close((delta**2).sum() - delta.sum() ** 2 / n, M2, scale=float((delta**2).sum()))


def test_shifted_sums_survive_what_one_pass_does_not() -> None:
    x = (4096 + random(256, seed=20)).float()
    _, _, M2 = two_pass(x.double())
    delta = x - x[0]
    shifted = (delta**2).sum() - delta.sum() ** 2 / 256
    assert abs(float(shifted.double() - M2)) < 256 * U * float(M2)


@checks("B44", "B45")
def test_an_element_is_a_good_shift() -> None:
    for seed in range(20):
        x = 100 + random(30, seed=seed) ** 3
        x[0] += 1000.0  # an outlier comes near the bound
        n, mu, M2 = two_pass(x)
        var = M2 / n
        assert ((x - mu) ** 2 <= (n - 1) * var * (1 + 1e-12)).all()
        assert_close((1 + (mu - x) ** 2 / var).mean(), torch.tensor(2.0, dtype=torch.float64))
    spike = torch.zeros(30, dtype=torch.float64)
    spike[3] = 1.0  # attains the bound
    n, mu, M2 = two_pass(spike)
    assert_close(((spike - mu) ** 2).max(), (n - 1) * M2 / n)


Part = tuple[float, Tensor, Tensor]  # n, mean, M2


def merge(a: Part, b: Part) -> Part:
    (nA, muA, MA), (nB, muB, MB) = a, b
    n, delta = nA + nB, muB - muA
    return n, muA + delta * nB / n, MA + MB + delta**2 * nA * nB / n


@checks("B46", "B47")
def test_merge_of_two() -> None:
    x = 5 + random(50, seed=22)
    for cut in (1, 7, 49):
        a, b = x[:cut], x[cut:] * 2
        n, mu, M2 = merge(two_pass(a), two_pass(b))
        expected_n, expected_mu, expected_M2 = two_pass(torch.cat([a, b]))
        assert n == expected_n
        assert_close(mu, expected_mu)
        assert_close(M2, expected_M2)


def test_merge_with_an_empty_part() -> None:
    zero = torch.zeros((), dtype=torch.float64)
    part = two_pass(5 + random(8, seed=25))
    assert merge((0.0, zero, zero), part) == part


def test_merge_of_one_element_is_welfords_update() -> None:
    x = 5 + random(9, seed=26)
    zero = torch.zeros((), dtype=torch.float64)
    merged: Part = (0.0, zero, zero)
    mu, M2 = zero, zero
    for k, value in enumerate(x, start=1):
        merged = merge(merged, (1.0, value, zero))
        before = value - mu
        mu = mu + before / k
        M2 = M2 + before * (value - mu)
        assert_close(merged[1], mu)
        assert_close(merged[2], M2, scale=1.0)


@checks("B48")
def test_merge_of_many() -> None:
    parts = [k + random(n, seed=30 + k) for k, n in enumerate((1, 5, 2, 19))]
    n = [p[0] for p in map(two_pass, parts)]
    mu = [p[1] for p in map(two_pass, parts)]
    M2 = [p[2] for p in map(two_pass, parts)]
    total_n, expected_mu, expected_M2 = two_pass(torch.cat(parts))
    merged = torch.stack([nk * m for nk, m in zip(n, mu, strict=True)]).sum() / sum(n)
    spread = [nk * (m - merged) ** 2 for nk, m in zip(n, mu, strict=True)]
    assert sum(n) == total_n
    assert_close(merged, expected_mu)
    assert_close(torch.stack(M2).sum() + torch.stack(spread).sum(), expected_M2)


@checks("B49", "B50")
def test_errors_in_the_statistics() -> None:
    x = 3 + random(25, seed=23)
    n, mu, M2 = two_pass(x)
    for eta in (1e-1, -3e-1):
        assert_close(((x - mu - eta) ** 2).sum(), M2 + n * eta**2)
    log_var = torch.log(M2 / n).requires_grad_()
    (slope,) = torch.autograd.grad(torch.log((log_var.exp() + EPS) ** -0.5), log_var)
    assert_close(-0.5 * (M2 / n) / (M2 / n + EPS), slope)


@checks("B51")
def test_a_rounded_mean_shifts_xhat_by_kappa() -> None:
    for offset in (-0.3, 17.0, 5000.0):
        x = offset + random(64, seed=24)
        n, mu, M2 = two_pass(x)
        s = (M2 / n + EPS) ** -0.5
        eta = mu.float().double() - mu
        assert 0 < eta.abs() <= U * mu.abs()
        shift = (x - mu - eta) * s - (x - mu) * s
        assert_close(shift, (-eta * s).expand(64), scale=float(mu.abs() * s))
        kappa = x.abs().mean() * s
        assert mu.abs() * s <= kappa <= torch.sqrt((x**2).sum() / M2)
    x = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)  # eps = 0: the last bound is attained
    n, mu, M2 = two_pass(x)
    assert_close(x.abs().mean() * (M2 / n) ** -0.5, torch.sqrt((x**2).sum() / M2))


@checks("B52", "B53", "B54")
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0])
def test_running_statistics(momentum: float) -> None:
    module = torch.nn.BatchNorm1d(3, momentum=momentum).double()
    running(module)[0].add_(2)
    start = [t.clone() for t in running(module)]
    one_step: list[Tensor] = [t.clone() for t in start]
    statistics: list[list[Tensor]] = []
    for k, size in enumerate((5, 9, 2)):
        x = k + random(size, 3, seed=40 + k)
        module(x)
        mu, var, M = x.mean(0), x.var(0, unbiased=False), size
        statistics.append([mu, M / (M - 1) * var])
        one_step[0] = (1 - momentum) * one_step[0] + momentum * mu
        one_step[1] = (1 - momentum) * one_step[1] + momentum * M / (M - 1) * var
    for i, expected in enumerate(running(module)):
        assert_close(one_step[i], expected)
        k = len(statistics)
        unrolled = (1 - momentum) ** k * start[i]
        for j, t in enumerate(statistics, start=1):
            unrolled = unrolled + momentum * (1 - momentum) ** (k - j) * t[i]
        assert_close(unrolled, expected)


@checks("B55")
def test_cumulative_average() -> None:
    module = torch.nn.BatchNorm1d(3, momentum=None).double()
    running(module)[0].add_(100)
    batches = [k + random(size, 3, seed=50 + k) for k, size in enumerate((4, 11, 3))]
    for x in batches:
        module(x)
    assert_close(torch.stack([x.mean(0) for x in batches]).mean(0), running(module)[0])
    unbiased = torch.stack([x.var(0, unbiased=True) for x in batches])
    assert_close(unbiased.mean(0), running(module)[1])


@checks("B56", "B57")
def test_epsilon_outside_the_root() -> None:
    channels = Channels()
    x, w = channels.x, channels.w
    sigma = torch.sqrt(x.var(1, unbiased=False, keepdim=True))
    z = w * (x - mean(x)) / (sigma + EPS) + channels.b
    (auto,) = grads(z, [x], channels.grad_y.detach())
    with torch.no_grad():
        t, g = 1 / (sigma + EPS), channels.grad_y
        xhat = (x - mean(x)) * t
        formula = w * t * (g - mean(g) - xhat * mean(g * xhat) * (sigma + EPS) / sigma)
        assert_close(formula, auto)
        outside = torch.sqrt(sigma**2 + EPS) - sigma
        assert_close(1 / (sigma + outside), (sigma**2 + EPS) ** -0.5)


def test_epsilon_of_a_constant_channel() -> None:
    x = torch.full((1, 6), 3.0, dtype=torch.float64, requires_grad=True)
    z = (x - mean(x)) / (torch.sqrt(mean((x - mean(x)) ** 2)) + 1e-5)
    assert not torch.autograd.grad(z[0, 0], x)[0].isfinite().all()
    y = F.batch_norm(x.view(6, 1), None, None, training=True)
    assert torch.autograd.grad(y[0, 0], x)[0].isfinite().all()


@checks("B58")
def test_synchronised() -> None:
    channels = Channels(M=15)
    (auto,) = grads(channels.forward("silu"), [channels.x], channels.grad_y.detach())
    v = channels.values("silu")
    parts = [slice(0, 4), slice(4, 4), slice(4, 15)]  # uneven, one empty
    M = sum(v["x"][:, part].size(1) for part in parts)
    sum_g = sum(total(v["g"][:, part]) for part in parts)
    sum_gx = sum(total((v["g"] * v["xhat"])[:, part]) for part in parts)
    for part in parts:
        g, xhat = v["g"][:, part], v["xhat"][:, part]
        local = v["w"] * v["s"] * (g - sum_g / M - xhat * sum_gx / M)
        if local.numel():
            assert_close(local, auto[:, part], scale=float(auto.abs().max()))


@checks("B59")
def test_ghost_batches() -> None:
    x = (2 + random(12, 3, 5, seed=60)).requires_grad_()
    w = random(3, seed=61).requires_grad_()
    b = random(3, seed=62).requires_grad_()
    grad_y = random(12, 3, 5, seed=63)
    y = torch.cat([F.batch_norm(part, None, None, w, b, True, 0.0, EPS) for part in x.chunk(3)])
    auto = grads(y, (x, w, b), grad_y)
    with torch.no_grad():
        # (12, 3, 5) -> (3 channels * 3 ghosts, 4 * 5 elements)
        def rows(t: Tensor) -> Tensor:
            return t.view(3, 4, 3, 5).permute(2, 0, 1, 3).reshape(9, 20)

        xg, g = rows(x), rows(grad_y)
        s = (xg.var(1, unbiased=False, keepdim=True) + EPS) ** -0.5
        xhat = (xg - mean(xg)) * s
        weight = w.repeat_interleave(3).view(9, 1)
        assert_close(weight * s * (g - mean(g) - xhat * mean(g * xhat)), rows(auto[0]))
        assert_close((g * xhat).sum(1).view(3, 3).sum(1), auto[1])
        assert_close(g.sum(1).view(3, 3).sum(1), auto[2])


@checks("B60", "B61")
@pytest.mark.parametrize(("rho_max", "theta_max"), [(1e9, 1e9), (1.5, 0.2)])
def test_batch_renormalisation(rho_max: float, theta_max: float) -> None:
    channels = Channels()
    x, w, b = channels.x, channels.w, channels.b
    mu, var = channels.statistics()
    s = (var + EPS) ** -0.5
    mu_r, sigma_r = (0.95 * mu + 0.1).detach(), (0.6 / s).detach()
    rho = (1 / (s * sigma_r)).clamp(1 / rho_max, rho_max).detach()
    theta = ((mu - mu_r) / sigma_r).clamp(-theta_max, theta_max).detach()
    xhat = (x - mu) * s
    z = w * (rho * xhat + theta) + b
    if rho_max == 1e9:
        assert_close(z, w * (x - mu_r) / sigma_r + b)
    else:
        assert (rho == rho_max).any() and (theta.abs() == theta_max).any()
    auto = grads(z, (x, w, b), channels.grad_y.detach())
    with torch.no_grad():
        g = channels.grad_y
        apply = (w * rho) * xhat + (w * theta + b)
        assert_close(apply, z)
        assert_close(w * rho * s * (g - mean(g) - xhat * mean(g * xhat)), auto[0])
        assert_close(rho * total(g * xhat) + theta * total(g), auto[1])
        assert_close(total(g), auto[2])


@checks("B62")
@pytest.mark.parametrize("G", [1, 2, 6])
def test_group_normalisation(G: int) -> None:
    N, C, S = 3, 6, 5
    x = (1 + 2 * random(N, C, S, seed=70)).requires_grad_()
    w = random(C, seed=71).requires_grad_()
    b = random(C, seed=72).requires_grad_()
    grad_y = random(N, C, S, seed=73)
    y = F.group_norm(x, G, w, b, EPS)
    if G == C:
        assert_close(F.instance_norm(x, None, None, w, b, eps=EPS), y)
    if G == 1:
        normalised = F.layer_norm(x, [C, S], eps=EPS)
        assert_close(normalised * w[:, None] + b[:, None], y)
    auto = grads(y, (x, w, b), grad_y)
    with torch.no_grad():

        def rows(t: Tensor) -> Tensor:
            return t.reshape(N * G, C // G * S)

        s = (rows(x).var(1, unbiased=False, keepdim=True) + EPS) ** -0.5
        xhat = (rows(x) - mean(rows(x))) * s
        h = rows(w[:, None] * grad_y)
        assert_close(s * (h - mean(h) - xhat * mean(h * xhat)), rows(auto[0]))
        assert_close((grad_y * xhat.view(N, C, S)).sum((0, 2)), auto[1])
        assert_close(grad_y.sum((0, 2)), auto[2])
