"""``batch_norm`` with PReLU: leaky_relu whose slope is learned.

y = z where z > 0, else slope * z (He, Zhang, Ren and Sun, "Delving Deep into Rectifiers", 2015,
Eq. 1). The slope's gradient is the sum of grad_y * z over z <= 0. With z = weight * xhat + bias
that is the sum over channels of weight * sum(g * xhat) + bias * sum(g), where g is grad_y at
z <= 0 and 0 elsewhere: the two sums are those of ``batch_norm_backward_reduce`` for relu with
-weight and -bias, whose z is -z. So nothing is saved beside what leaky_relu saves.

With a residual, z has it as a third term, and sum(g * residual) is added: the same reduction over
the residual in the place of x, where relu is given the complement of the mask. The residual is
saved for that, beside the mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch
from .._autograd import is_plain_call
from ..reference import batch_norm as reference
from ..reference.activation import activate
from .batch_norm import batch_norm, check_tensor, phases_of
from .sync_batch_norm import sync_batch_norm


class BatchNormPReLUFunction(torch.autograd.Function):
    """For eager calls on CPU tensors; saved are x, mean, invstd, weight, bias and the slope, and
    with a residual that and the mask."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        slope: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        backend: str,
    ) -> Tensor:
        phases = phases_of(backend)
        y, mean, invstd, mask = phases.batch_norm_forward(
            x,
            residual,
            weight,
            bias,
            running_mean,
            running_var,
            training,
            momentum,
            eps,
            "leaky_relu",
            float(slope),
        )
        ctx.save_for_backward(x, residual, weight, bias, slope, mean, invstd, mask)
        ctx.call = (phases, training, eps)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        phases, training, eps = ctx.call
        if torch.is_grad_enabled():  # create_graph=True
            grads = _differentiable_backward(ctx, grad_y, training, eps)
            return (*grads, *[None] * 6)
        x, residual, weight, bias, slope, mean, invstd, mask = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias, need_slope = ctx.needs_input_grad[:5]
        statistics = (weight, bias, mean, invstd)
        grad_x, grad_residual, grad_weight, grad_bias = phases.batch_norm_backward(
            grad_y,
            x,
            None,
            mask,
            *statistics,
            training,
            "leaky_relu",
            float(slope),
            [need_x, need_residual, need_weight, need_bias],
        )
        grad_slope = None
        if need_slope:
            total = _slope_gradient(phases, grad_y, x, residual, *statistics, mask)
            grad_slope = total.to(slope.dtype).view_as(slope)
        return (
            grad_x if need_x else None,
            grad_residual if need_residual else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            grad_slope,
            *[None] * 6,
        )


def _slope_gradient(
    phases: Any,
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor,
) -> Tensor:
    """The sum of grad_y * z over z <= 0, a double."""
    reduce = phases.batch_norm_backward_reduce
    negative = None  # bits of z <= 0
    scale, shift = weight, bias
    if residual is None:
        scale = torch.full_like(mean, -1.0) if weight is None else -weight
        shift = None if bias is None else -bias
    else:
        negative = mask.bitwise_not()
    sum_grad, sum_grad_xhat = reduce(
        grad_y, x, None, negative, scale, shift, mean, invstd, "relu", 0.0
    )
    total = (sum_grad_xhat.double() if weight is None else weight.double() * sum_grad_xhat).sum()
    if bias is not None:
        total += (bias.double() * sum_grad).sum()
    if residual is not None:
        # With mean 0 and variance 1, xhat is the residual itself.
        zero, one = torch.zeros_like(mean), torch.ones_like(invstd)
        _, with_residual = reduce(
            grad_y, residual, None, negative, None, None, zero, one, "relu", 0.0
        )
        total += with_residual.double().sum()
    return total


def _differentiable_backward(
    ctx: Any, grad_y: Tensor, training: bool, eps: float
) -> tuple[Tensor | None, ...]:
    """The gradients with a graph of their own: those of the composition of PyTorch's ops."""
    x, residual, weight, bias, slope, mean, invstd, _ = ctx.saved_tensors
    if training:
        z = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    else:
        z, _ = reference.batch_norm_apply(x, None, weight, bias, mean, invstd, "identity", 0.0)
    if residual is not None:
        z = z + residual
    inputs = (x, residual, weight, bias, slope)
    needed = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    found = iter(
        torch.autograd.grad(activate(z, "prelu", slope), needed, grad_y, create_graph=True)
    )
    return tuple(
        next(found) if need else None for _, need in zip(inputs, ctx.needs_input_grad, strict=False)
    )


def batch_norm_prelu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    residual: Tensor | None,
    slope: Tensor,
    process_group: Any,
) -> Tensor:
    """:func:`resops.functional.batch_norm_act` with activation="prelu".

    One op on CPU tensors. For CUDA tensors, of which no host should wait for the slope, and where
    the slope is learned with statistics of several processes or a residual of another dtype,
    PyTorch's own PReLU follows the op.
    """
    check_tensor("batch_norm_act", "input", x)
    check_tensor("batch_norm_act", "negative_slope", slope)
    if slope.numel() != 1:
        raise RuntimeError(
            f"negative_slope should contain one element for prelu, but got size {list(slope.shape)}"
        )
    statistics = (running_mean, running_var)
    backend = _dispatch.choose("batch_norm", x)
    fits = (
        backend != "reference"
        and x.device.type == slope.device.type == "cpu"
        and is_plain_call((x, residual, weight, bias, *statistics, slope))
    )
    learned = torch.is_grad_enabled() and slope.requires_grad
    group = process_group if training else None
    one_dtype = residual is None or residual.dtype == x.dtype
    if fits and learned and one_dtype and group is None:
        y: Tensor = BatchNormPReLUFunction.apply(
            x, residual, weight, bias, slope, *statistics, training, momentum, eps, backend
        )
        return y
    one_op = fits and not learned
    epilogue: dict[str, Any] = {
        "residual": residual,
        "activation": "leaky_relu" if one_op else "identity",
        "negative_slope": float(slope) if one_op else 0.0,
    }
    if group is None:
        z = batch_norm(x, *statistics, weight, bias, training, momentum, eps, **epilogue)
    else:
        z = sync_batch_norm(
            x, *statistics, weight, bias, momentum, eps, **epilogue, process_group=group
        )
    return z if one_op else activate(z, "prelu", slope)
