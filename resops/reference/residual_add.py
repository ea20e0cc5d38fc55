"""Weighted residual addition and activation: the definition, in plain PyTorch.

    y = act( alpha * x + beta * residual )

x is (N, *). Each weight is a number, a tensor of one element, one value per sample (N,) or a tensor
like x. docs/math/residual_add.md derives the backward pass and lists the weightings in use.

:func:`residual_add` is the definition and is differentiated by autograd. The functions below it
have the names and signatures of ``torch.ops.resops``: they are the oracle of the kernels, and,
being made of differentiable operations, their double backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import MASKED_ACTIVATIONS, activate, activation_derivative
from .layout import empty_output

Weight = float | Tensor


def residual_add(
    x: Tensor,
    residual: Tensor,
    alpha: Weight,
    beta: Weight | str,
    activation: str,
    negative_slope: float,
    alpha_backward: Weight | None = None,
    beta_backward: Weight | str | None = None,
) -> Tensor:
    """act(alpha * x + beta * residual), computed in fp32 (fp64 for fp64) and rounded once.

    ``beta="complement"`` is 1 - alpha. With ``alpha_backward`` and ``beta_backward`` the gradients
    of x and residual are those of the sum that has these weights, at the activation's derivative
    of the forward pass.
    """
    if alpha_backward is None or beta_backward is None:
        z = _weighted_sum(x, residual, alpha, beta)
    else:
        with torch.no_grad():
            values = _weighted_sum(x, residual, alpha, beta)
        z = _WithGradientOf.apply(values, _weighted_sum(x, residual, alpha_backward, beta_backward))
    return activate(z, activation, negative_slope).to(x.dtype)


class _WithGradientOf(torch.autograd.Function):
    """The values of one tensor with the gradient of another."""

    @staticmethod
    def forward(values: Tensor, differentiated: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def weight_kind(weight: Tensor, x: Tensor) -> str | None:
    """ "scalar", "per_sample", "elementwise", or None where the size fits none of them.

    Where two fit, the results are the same.
    """
    if weight.numel() == 1:
        return "scalar"
    if weight.shape in (x.shape[:1], torch.Size([*x.shape[:1], *[1] * (x.dim() - 1)])):
        return "per_sample"
    return "elementwise" if weight.shape == x.shape else None


def _broadcast(weight: Weight, x: Tensor) -> Weight:
    """``weight`` in the accumulation type, in a size that broadcasts against ``x``."""
    if not isinstance(weight, Tensor):
        return weight
    kind = weight_kind(weight, x)
    if kind == "elementwise":
        return _wide(weight)
    return _wide(weight).reshape(x.size(0) if kind == "per_sample" else 1, *[1] * (x.dim() - 1))


def _weighted_sum(x: Tensor, residual: Tensor, alpha: Weight, beta: Weight | str) -> Tensor:
    a = _broadcast(alpha, x)
    b = 1 - a if isinstance(beta, str) else _broadcast(beta, x)
    return a * _wide(x) + b * _wide(residual)


def _like_output(t: Tensor, x: Tensor) -> Tensor:
    """``t`` in the dtype and the memory layout that the output of ``x`` has."""
    y = empty_output(x)
    if t.dtype == y.dtype and t.stride() == y.stride():
        return t
    if torch.is_grad_enabled() and t.requires_grad:
        return t.to(y.dtype)
    return y.copy_(t)


def mask_size(x: Tensor) -> tuple[int, int]:
    """(N, ceil(L / 8)) with L the elements of a sample: one bit each, in rows of whole bytes."""
    return x.size(0), (math.prod(x.shape[1:]) + 7) // 8


def pack_mask(bits: Tensor, like: Tensor) -> Tensor:
    """uint8 mask with one bit per element of ``bits`` (bool), lowest bit first; a row holds a
    sample in the memory order of ``like``, which is dense."""
    rows, columns = mask_size(like)
    if bits.numel() == 0:
        return torch.zeros(rows, columns, dtype=torch.uint8, device=bits.device)
    in_order = bits if like.is_contiguous() else bits.movedim(1, -1)
    flat = in_order.reshape(rows, -1).to(torch.uint8)
    flat = F.pad(flat, (0, -flat.size(1) % 8)).view(rows, columns, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (flat * weights).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The bool tensor, of ``like``'s size, whose bits :func:`pack_mask` stored."""
    if like.numel() == 0:
        return torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = ((mask.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : math.prod(like.shape[1:])]
    if like.is_contiguous():
        return bits.reshape(like.shape).to(torch.bool)
    return bits.reshape(like.size(0), *like.shape[2:], like.size(1)).movedim(-1, 1).to(torch.bool)


def residual_add_forward(
    x: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    alpha_value: float,
    beta_value: float,
    complement: bool,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """y, like x, and the mask: one bit per element after relu and leaky_relu, else empty."""
    a = alpha_value if alpha is None else alpha
    b = "complement" if complement else beta_value if beta is None else beta
    z = _weighted_sum(x, residual, a, b)
    y = _like_output(activate(z, activation, negative_slope), x)
    if activation in MASKED_ACTIVATIONS:
        return y, pack_mask(~(z <= 0), y)
    return y, torch.empty(0, dtype=torch.uint8, device=x.device)


def _reduce(t: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The sum over whatever ``weight`` was broadcast along, in the weight's size and dtype."""
    kind = weight_kind(weight, x)
    if kind == "elementwise":
        return _like_output(t, x)
    if kind == "per_sample":
        t = t.reshape(x.size(0), math.prod(x.shape[1:])).sum(1)
    else:
        t = t.sum()
    return t.reshape(weight.shape).to(weight.dtype)


def residual_add_backward(
    grad_y: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    alpha_value: float,
    beta_value: float,
    complement: bool,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, alpha and beta; those not in ``output_mask`` are empty.

    With g = grad_y * act'(z):  grad_x = alpha * g, grad_residual = beta * g, and grad_alpha and
    grad_beta are the sums of g * x and g * residual over whatever the weight was broadcast along
    (of g * (x - residual) for alpha and its complement).

    Args:
        grad_y: in the memory order of y, in which the mask's bits are.
        x, residual: where a weight's gradient or a smooth activation needs them.
    """
    a = _broadcast(alpha_value if alpha is None else alpha, grad_y)
    b = 1 - a if complement else _broadcast(beta_value if beta is None else beta, grad_y)
    g = _wide(grad_y)
    if activation in MASKED_ACTIVATIONS:
        assert mask is not None
        passes = unpack_mask(mask, empty_output(grad_y))
        blocked = g * negative_slope if activation == "leaky_relu" else torch.zeros_like(g)
        g = torch.where(passes, g, blocked)
    elif activation != "identity" and any(output_mask):
        assert x is not None and residual is not None
        z = a * _wide(x) + b * _wide(residual)
        derivative = activation_derivative(z, None, activation, negative_slope)
        assert derivative is not None
        g = g * derivative

    wide = g.dtype
    grad_x, grad_residual = grad_y.new_empty(0), grad_y.new_empty(0)
    grad_alpha, grad_beta = (
        grad_y.new_empty(0, dtype=wide if w is None else w.dtype) for w in (alpha, beta)
    )
    if output_mask[0]:
        grad_x = _like_output(a * g, grad_y)
    if output_mask[1]:
        grad_residual = _like_output(b * g, grad_y)
    if output_mask[2]:
        assert alpha is not None and x is not None
        factor = _wide(x)
        if complement:
            assert residual is not None
            factor = factor - _wide(residual)
        grad_alpha = _reduce(g * factor, alpha, grad_y)
    if output_mask[3]:
        assert beta is not None and residual is not None
        grad_beta = _reduce(g * _wide(residual), beta, grad_y)
    return grad_x, grad_residual, grad_alpha, grad_beta
