"""The activations of the fused ops and their derivatives, inside kernels."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of a kernel are pointers and numbers, typed when it is compiled)

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "gelu")
MASKED = ("relu", "leaky_relu")  # the sign of their argument, one bit, is enough for backward
SMOOTH = ("silu", "gelu")  # these need their argument again


@triton.jit
def _gelu_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    # z <= 0 is false where z is NaN: NaN passes. (tl.maximum would drop it.)
    if ACTIVATION == "relu":
        y = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z <= 0, z * slope, z)
    elif ACTIVATION == "silu":
        y = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        y = z * _gelu_cdf(z)
    else:
        y = z
    return y


@triton.jit
def blocked_gradient(g, blocked, slope, ACTIVATION: tl.constexpr):
    """g * act'(z) of relu and leaky_relu, ``blocked`` where z <= 0."""
    if ACTIVATION == "relu":
        return tl.where(blocked, 0.0, g)
    else:
        return tl.where(blocked, g * slope, g)


@triton.jit
def smooth_gradient(g, z, ACTIVATION: tl.constexpr):
    """g * act'(z) of silu and gelu."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(z)
        derivative = s * (1.0 + z * (1.0 - s))
    else:
        derivative = _gelu_cdf(z) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    return g * derivative
