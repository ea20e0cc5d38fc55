"""The activations of the fused ops and their derivatives, in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "gelu")

# After these the sign of z decides the derivative, so one bit per element is enough for backward.
MASKED_ACTIVATIONS = ("relu", "leaky_relu")
# These need z itself again, so a residual that went into z has to be saved.
SMOOTH_ACTIVATIONS = ("silu", "gelu")


def activate(z: Tensor, activation: str, negative_slope: float | Tensor) -> Tensor:
    """act(z); gelu is the exact one, z * Phi(z). NaN stays NaN under each of them.

    Args:
        activation: one of ACTIVATIONS, or "prelu" with a slope that is a tensor.
    """
    if isinstance(negative_slope, Tensor):
        return F.prelu(z, negative_slope.to(z.dtype).reshape(1))
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    if activation == "silu":
        return F.silu(z)
    if activation == "gelu":
        return F.gelu(z)
    return z


def activation_derivative(
    z: Tensor, passes: Tensor | None, activation: str, negative_slope: float
) -> Tensor | None:
    """d act / d z, elementwise; None stands for 1 everywhere.

    Args:
        z: the argument of the activation.
        passes: bool, like ``z``: where the gradient passes unchanged (the saved mask); None to
            take it from ``z``: everywhere but where z <= 0, so that a NaN passes.
    """
    if activation == "identity":
        return None
    if activation in MASKED_ACTIVATIONS:
        if passes is None:
            passes = ~(z <= 0)
        blocked = negative_slope if activation == "leaky_relu" else 0.0
        return torch.where(passes, torch.ones_like(z), blocked)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    return cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
