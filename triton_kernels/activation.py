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
def _normal_cdf(z, exp_half_square):
    """Phi(z); exp(-z^2 / 2) is there already.

    Far below 0, 1 + erf would leave rounding alone: where a channel has no larger derivative, as it
    can be in evaluation, its gradients were wrong in the third digit. There it is exp(-z^2 / 2)
    times a polynomial in t = 1 / (1 + |z| / 2), fitted to it for z <= -3: relative error 2e-6,
    which the derivative, in units of its terms, sees as a third of a rounding.
    """
    t = 1.0 / (1.0 + 0.5 * tl.abs(z))
    p = -0.13441617 * t + 0.0668123589
    p = p * t + 0.147921072
    p = p * t + 0.19953024
    p = p * t + 0.199470812
    return tl.where(z > -3, 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)), p * t * exp_half_square)


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
        y = z * _normal_cdf(z, tl.exp(-0.5 * z * z))
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
        exp_half_square = tl.exp(-0.5 * z * z)
        derivative = _normal_cdf(z, exp_half_square) + z * exp_half_square * 0.3989422804014327
    return g * derivative
