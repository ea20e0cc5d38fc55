"""The formulas of docs/math/residual_add.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .formulas import (
    ACTIVATIONS,
    act,
    assert_close,
    checks,
    curvature,
    derivative,
    grads,
    random,
)

N, REST = 4, (3, 5)
WEIGHTINGS = {"scalar": (1,), "per_sample": (N, 1, 1), "elementwise": (N, *REST)}


def reduce(t: Tensor, weight: Tensor) -> Tensor:
    """R of the page: the sum over whatever ``weight`` was broadcast along."""
    if weight.numel() == 1:
        return t.sum().view(weight.shape)
    if weight.shape == t.shape:
        return t
    return t.sum((1, 2)).view(weight.shape)


def join_inputs(size: tuple[int, ...]) -> dict[str, Tensor]:
    shape = (N, *REST)
    inputs = {
        "x": 1 + random(*shape, seed=80),
        "r": random(*shape, seed=81) - 1,
        "alpha": 0.3 + random(*size, seed=82),
        "beta": 0.7 + random(*size, seed=83),
        "grad_y": random(*shape, seed=84),
    }
    return {name: t.requires_grad_() for name, t in inputs.items()}


@checks("R1", "R2", "R3")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_join(weighting: str, activation: str) -> None:
    t = join_inputs(WEIGHTINGS[weighting])
    x, r, alpha, beta = t["x"], t["r"], t["alpha"], t["beta"]
    z = alpha * x + beta * r
    auto = grads(act(z, activation), (x, r, alpha, beta), t["grad_y"].detach())
    with torch.no_grad():
        g = t["grad_y"] * derivative(z, activation)
        assert_close(alpha * g, auto[0])
        assert_close(beta * g, auto[1])
        assert_close(reduce(g * x, alpha), auto[2])
        assert_close(reduce(g * r, beta), auto[3])
        if weighting == "scalar":  # R1 element by element
            flat = [(float(a), float(c)) for a, c in zip(x.flatten(), r.flatten(), strict=True)]
            loop = [float(alpha) * a + float(beta) * c for a, c in flat]
            assert_close(torch.tensor(loop, dtype=torch.float64), z.flatten())


@checks("R4")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_join_complement(weighting: str, activation: str) -> None:
    t = join_inputs(WEIGHTINGS[weighting])
    x, r, alpha = t["x"], t["r"], t["alpha"]
    z = alpha * x + (1 - alpha) * r
    auto = grads(act(z, activation), (x, r, alpha), t["grad_y"].detach())
    with torch.no_grad():
        assert_close(r + alpha * (x - r), z)
        g = t["grad_y"] * derivative(z, activation)
        assert_close(alpha * g, auto[0])
        assert_close((1 - alpha) * g, auto[1])
        assert_close(reduce(g * (x - r), alpha), auto[2])


@checks("R5")
def test_variance_of_the_sum() -> None:
    pair = random(2, 200, seed=85)
    x, r = pair[0], 0.3 * pair[0] + pair[1]
    cov = ((x - x.mean()) * (r - r.mean())).mean()
    for a, b in ((1.0, 1.0), (2**-0.5, 2**-0.5), (0.2, 1.0)):
        expected = (a * x + b * r).var(unbiased=False)
        variance = a**2 * x.var(unbiased=False) + b**2 * r.var(unbiased=False) + 2 * a * b * cov
        assert_close(variance, expected)


@checks("R6")
@pytest.mark.parametrize("survival", [0.2, 0.5, 0.9])
def test_stochastic_depth_expectation(survival: float) -> None:
    x, r = random(7, seed=86), random(7, seed=87)
    draws = ((0.0, 1 - survival), (1.0, survival))

    def expectation(f: Callable[[float], Tensor]) -> Tensor:
        return torch.stack([probability * f(gamma) for gamma, probability in draws]).sum(0)

    assert_close(survival * x + r, expectation(lambda gamma: gamma * x + r))
    assert_close(x + r, expectation(lambda gamma: gamma / survival * x + r))
    of_relu = expectation(lambda gamma: F.relu(gamma * x + r))
    assert (of_relu >= F.relu(survival * x + r) - 1e-15).all()


@checks("R7")
def test_different_weights_forward_and_backward() -> None:
    t = join_inputs((N, 1, 1))
    x, r = t["x"].detach(), t["r"].detach()
    alpha, other = t["alpha"].detach(), t["beta"].detach()
    grad_y = t["grad_y"].detach()
    z = alpha * x + (1 - alpha) * r
    g = grad_y * derivative(z, "relu")
    # The function whose gradient this is: backward weights, mask of the forward pass.
    a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
    mask = (z > 0).double()
    auto = grads(mask * (other * a + (1 - other) * b), (a, b), grad_y)
    assert_close(other * g, auto[0])
    assert_close((1 - other) * g, auto[1])


@checks("R8")
def test_shakedrop_weights() -> None:
    survival = 0.7
    low, high = -1.0, 0.4
    xi = torch.linspace(low, high, 1001, dtype=torch.float64)  # symmetric grid: exact mean
    for gamma, expected in ((1.0, torch.ones_like(xi)), (0.0, xi)):
        assert_close(gamma + xi - gamma * xi, expected)
    mean_alpha = survival * torch.ones_like(xi).mean() + (1 - survival) * xi.mean()
    formula = torch.tensor(survival + (1 - survival) * (low + high) / 2, dtype=torch.float64)
    assert_close(formula, mean_alpha)


@checks("R9")
def test_highway_gate() -> None:
    t = join_inputs((N, *REST))
    x, r = t["x"], t["r"]
    gate = t["alpha"]
    alpha = torch.sigmoid(gate)
    (auto,) = grads(alpha * x + (1 - alpha) * r, [gate], t["grad_y"].detach())
    with torch.no_grad():
        g = t["grad_y"]
        assert_close(g * (x - r) * alpha * (1 - alpha), auto)


@checks("R10", "R11", "R12", "R13")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_join_second_derivative(weighting: str, activation: str) -> None:
    size = WEIGHTINGS[weighting]
    t = join_inputs(size)
    inputs = (t["x"], t["r"], t["alpha"], t["beta"])
    z = t["alpha"] * t["x"] + t["beta"] * t["r"]
    first = torch.autograd.grad(act(z, activation), inputs, t["grad_y"], create_graph=True)
    p, q = random(N, *REST, seed=88), random(N, *REST, seed=89)
    v_a, v_b = random(*size, seed=90), random(*size, seed=91)
    scalar = (p * first[0]).sum() + (q * first[1]).sum()
    scalar = scalar + (v_a * first[2]).sum() + (v_b * first[3]).sum()
    auto = torch.autograd.grad(scalar, (t["grad_y"], *inputs))
    with torch.no_grad():
        x, r, alpha, beta = inputs
        slope = derivative(z, activation)
        g = t["grad_y"] * slope
        G = alpha * p + beta * q + v_a * x + v_b * r
        k = G * t["grad_y"] * curvature(z, activation)
        assert_close(slope * G, auto[0])
        assert_close(v_a * g + alpha * k, auto[1])
        assert_close(v_b * g + beta * k, auto[2])
        assert_close(reduce(p * g + k * x, alpha), auto[3])
        assert_close(reduce(q * g + k * r, beta), auto[4])


@checks("R14", "R15", "R16")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_join_second_derivative_complement(weighting: str, activation: str) -> None:
    size = WEIGHTINGS[weighting]
    t = join_inputs(size)
    inputs = (t["x"], t["r"], t["alpha"])
    z = t["alpha"] * t["x"] + (1 - t["alpha"]) * t["r"]
    first = torch.autograd.grad(act(z, activation), inputs, t["grad_y"], create_graph=True)
    p, q = random(N, *REST, seed=92), random(N, *REST, seed=93)
    v_a = random(*size, seed=94)
    scalar = (p * first[0]).sum() + (q * first[1]).sum() + (v_a * first[2]).sum()
    auto = torch.autograd.grad(scalar, (t["grad_y"], *inputs))
    with torch.no_grad():
        x, r, alpha = inputs
        slope = derivative(z, activation)
        g = t["grad_y"] * slope
        G = alpha * p + (1 - alpha) * q + v_a * (x - r)
        k = G * t["grad_y"] * curvature(z, activation)
        assert_close(slope * G, auto[0])
        assert_close(v_a * g + alpha * k, auto[1])
        assert_close(-v_a * g + (1 - alpha) * k, auto[2])
        assert_close(reduce((p - q) * g + k * (x - r), alpha), auto[3])
