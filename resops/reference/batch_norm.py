"""Batch normalisation with residual and activation: the definition, in plain PyTorch.

    y = act( weight * (x - mean) * invstd + bias [+ residual] ),   invstd = 1 / sqrt(var + eps)

(Ioffe and Szegedy, "Batch Normalization", 2015, Algorithm 1.) x is (N, C, *spatial); mean and the
biased variance are taken per channel over the M = N * S values of the batch when training, and are
the running statistics otherwise. docs/math/batch_norm.md derives the backward pass.

:func:`batch_norm` is the definition and is differentiated by autograd. The functions below it are
the phases that every backend has, with the names and signatures of ``torch.ops.resops``: they are
the oracle of the kernels, and, being made of differentiable operations, their double backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import (
    MASKED_ACTIVATIONS,
    activate,
    activation_derivative,
)
from .layout import empty_output, pack_mask, unpack_mask


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """The composition of PyTorch's own ops that the fused op replaces."""
    if x.dtype in (torch.float16, torch.bfloat16):
        # torch wants all parameters of one dtype; fp32 is the one that it takes for every x.
        weight, bias = (None if p is None else p.float() for p in (weight, bias))
        if running_mean is not None and running_mean.dtype != torch.float32:
            assert running_var is not None
            mean32, var32 = running_mean.float(), running_var.float()
            z = F.batch_norm(x, mean32, var32, weight, bias, training, momentum, eps)
            if training:
                with torch.no_grad():
                    running_mean.copy_(mean32)
                    running_var.copy_(var32)
            return _add_and_activate(z, residual, activation, negative_slope)
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return _add_and_activate(z, residual, activation, negative_slope)


def _add_and_activate(
    z: Tensor, residual: Tensor | None, activation: str, negative_slope: float
) -> Tensor:
    return activate(z if residual is None else z + residual, activation, negative_slope)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return _wide(t).view(1, -1, *[1] * (x.dim() - 2))


def _batch_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _like_output(t: Tensor, x: Tensor) -> Tensor:
    """``t`` in the dtype and the memory layout that the output of ``x`` has."""
    y = empty_output(x)
    if t.dtype == y.dtype and t.stride() == y.stride():
        return t
    if torch.is_grad_enabled() and t.requires_grad:
        return t.to(y.dtype)
    return y.copy_(t)


def batch_norm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and biased variance, fp32 (fp64 for fp64), each (C,). Zeros where M = 0."""
    x = _wide(x)
    if x.numel() == 0:
        return x.new_zeros(x.size(1)), x.new_zeros(x.size(1))
    mean = x.mean(_batch_dims(x))
    var = (x - _per_channel(mean, x)).square().mean(_batch_dims(x))
    return mean, var


def _pre_activation(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
) -> Tensor:
    scale = invstd if weight is None else _wide(weight) * invstd
    z = (_wide(x) - _per_channel(mean, x)) * _per_channel(scale, x)
    if bias is not None:
        z = z + _per_channel(bias, x)
    return z if residual is None else z + _wide(residual)


def batch_norm_apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """y, like x, and the mask (uint8, one bit per element where a residual went through relu or
    leaky_relu, else empty)."""
    z = _pre_activation(x, residual, weight, bias, mean, invstd)
    y = _like_output(activate(z, activation, negative_slope), x)
    if residual is not None and activation in MASKED_ACTIVATIONS:
        return y, pack_mask(~(z <= 0), y)
    return y, torch.empty(0, dtype=torch.uint8, device=x.device)


def batch_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, invstd and mask; when training, the running statistics are updated in place:
    running = (1 - momentum) * running + momentum * batch, with the unbiased batch variance."""
    if training:
        mean, var = batch_norm_statistics(x)
        count = x.numel() // max(x.size(1), 1)
        if running_mean is not None and running_var is not None and count > 0:
            with torch.no_grad():
                unbiased = var * (count / max(count - 1, 1))
                running_mean.copy_((1 - momentum) * running_mean.to(mean.dtype) + momentum * mean)
                running_var.copy_((1 - momentum) * running_var.to(var.dtype) + momentum * unbiased)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = _wide(running_mean).clone(), _wide(running_var)
    invstd = torch.rsqrt(var + eps)
    y, mask = batch_norm_apply(x, residual, weight, bias, mean, invstd, activation, negative_slope)
    return y, mean, invstd, mask


def _grad_z(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Gradient before the activation: grad_y * act'(z)."""
    passes = None
    if mask is not None and mask.numel() > 0:
        passes = unpack_mask(mask, empty_output(x))
    z = _pre_activation(x, residual, weight, bias, mean, invstd)
    derivative = activation_derivative(z, passes, activation, negative_slope)
    return _wide(grad_y) if derivative is None else _wide(grad_y) * derivative


def batch_norm_backward_reduce(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """sum(g) and sum(g * xhat) per channel, (C,) each: the gradients of bias and weight.

    g = grad_y * act'(z) is the gradient before the activation, xhat = (x - mean) * invstd.
    """
    g = _grad_z(grad_y, x, residual, mask, weight, bias, mean, invstd, activation, negative_slope)
    xhat = (_wide(x) - _per_channel(mean, x)) * _per_channel(invstd, x)
    return g.sum(_batch_dims(x)), (g * xhat).sum(_batch_dims(x))


def batch_norm_backward_apply(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mean_grad: Tensor | None,
    mean_grad_xhat: Tensor | None,
    activation: str,
    negative_slope: float,
    need_grad_x: bool,
    need_grad_residual: bool,
) -> tuple[Tensor, Tensor]:
    """grad_x = weight * invstd * (g - mean_grad - xhat * mean_grad_xhat) and grad_residual = g.

    Args:
        mean_grad, mean_grad_xhat: the sums of :func:`batch_norm_backward_reduce` over M, (C,)
            each; None for frozen statistics, whose gradient has the first term only.
    """
    g = _grad_z(grad_y, x, residual, mask, weight, bias, mean, invstd, activation, negative_slope)
    empty = torch.empty(0, dtype=x.dtype, device=x.device)
    grad_x = grad_residual = empty
    if need_grad_residual:
        grad_residual = _like_output(g, x)
    if need_grad_x:
        scale = invstd if weight is None else _wide(weight) * invstd
        if mean_grad is not None and mean_grad_xhat is not None:
            xhat = (_wide(x) - _per_channel(mean, x)) * _per_channel(invstd, x)
            g = g - _per_channel(mean_grad, x) - xhat * _per_channel(mean_grad_xhat, x)
        grad_x = _like_output(g * _per_channel(scale, x), x)
    return grad_x, grad_residual


def batch_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias; those not in ``output_mask`` are empty."""
    sum_grad, sum_grad_xhat = batch_norm_backward_reduce(
        grad_y, x, residual, mask, weight, bias, mean, invstd, activation, negative_slope
    )
    count = max(x.numel() // max(x.size(1), 1), 1)
    grad_x, grad_residual = batch_norm_backward_apply(
        grad_y,
        x,
        residual,
        mask,
        weight,
        bias,
        mean,
        invstd,
        sum_grad / count if training else None,
        sum_grad_xhat / count if training else None,
        activation,
        negative_slope,
        output_mask[0],
        output_mask[1],
    )
    empty = torch.empty(0, dtype=mean.dtype, device=x.device)
    grad_weight = sum_grad_xhat if output_mask[2] else empty
    grad_bias = sum_grad if output_mask[3] else empty
    if weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    if bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return grad_x, grad_residual, grad_weight, grad_bias
