"""What the checks of the formulas in docs/ share: data, comparison, activations, labels.

The right-hand sides in these tests are the printed formulas, written out once more by hand. What
they are compared with comes from autograd, from torch's own op or from a loop, never from another
formula of the same page. Only torch and numpy are needed: the package itself is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-3  # large enough to be seen at 1e-12
SLOPE = 0.1  # negative_slope
U = 2.0**-24  # unit roundoff of fp32
ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "gelu")

CHECKED: dict[str, str] = {}  # label -> the test that checks it


def checks(*labels: str) -> Callable[[Any], Any]:
    """Say that the decorated test checks these labels of the docs."""

    def register(test: Any) -> Any:
        for label in labels:
            assert label not in CHECKED, f"{label} is checked by {CHECKED[label]} already"
            CHECKED[label] = test.__name__
        return test

    return register


def assert_close(actual: Tensor, expected: Tensor, scale: float | None = None) -> None:
    """Equal to 1e-12 of the largest expected value, or of ``scale`` where that value is 0."""
    assert actual.shape == expected.shape
    bound = 1e-12 * (float(expected.detach().abs().max()) if scale is None else scale)
    error = float((actual - expected).detach().abs().max())
    assert error <= bound, f"error {error:.2e}, bound {bound:.2e}"


def running(module: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """The running_mean and running_var of a batch norm that has them."""
    mean, var = module.running_mean, module.running_var
    assert isinstance(mean, Tensor) and isinstance(var, Tensor)
    return mean, var


def random(*size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def act(z: Tensor, activation: str) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu(z, SLOPE)
    if activation == "relu":
        return F.relu(z)
    if activation == "silu":
        return F.silu(z)
    return F.gelu(z) if activation == "gelu" else z.clone()


def cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def pdf(z: Tensor) -> Tensor:
    return torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def derivative(z: Tensor, activation: str) -> Tensor:
    """act'(z) as the table of activations and (B25), (B27) print it."""
    sigmoid = 1 / (1 + torch.exp(-z))
    if activation == "relu":
        return torch.where(z <= 0, 0.0, torch.ones_like(z))
    if activation == "leaky_relu":
        return torch.where(z <= 0, SLOPE, torch.ones_like(z))
    if activation == "silu":
        return sigmoid * (1 + z * (1 - sigmoid))  # B25
    if activation == "gelu":
        return cdf(z) + z * pdf(z)  # B27
    return torch.ones_like(z)


def curvature(z: Tensor, activation: str) -> Tensor:
    """act''(z), (B26) and (B28)."""
    sigmoid = 1 / (1 + torch.exp(-z))
    if activation == "silu":
        return sigmoid * (1 - sigmoid) * (2 + z * (1 - 2 * sigmoid))  # B26
    if activation == "gelu":
        return pdf(z) * (2 - z * z)  # B28
    return torch.zeros_like(z)


def grads(output: Tensor, inputs: Iterable[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, tuple(inputs), grad, retain_graph=True)


def mean(t: Tensor) -> Tensor:
    return t.mean(1, keepdim=True)


def total(t: Tensor) -> Tensor:
    return t.sum(1, keepdim=True)
