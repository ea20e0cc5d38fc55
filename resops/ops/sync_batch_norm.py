"""``batch_norm`` in training, over the batches of several processes.

The statistics of every process are gathered and merged, in the order of the processes, by Chan's
formula; in the backward pass the two sums are reduced. One collective a pass, and the kernels are
the phases of ``batch_norm`` (docs/math/batch_norm.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from ..reference.activation import SMOOTH_ACTIVATIONS
from .batch_norm import (
    batch_norm,
    check_activation,
    check_arguments,
    check_tensor,
    phases_of,
)


def _merged_statistics(
    mean: Tensor, var: Tensor, count: int, group: Any
) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance over all processes, and the number of values behind them.

    Everything is sent as float64, in which counts are exact and the merge adds no error. A process
    without values has no part in it.
    """
    C, processes = mean.numel(), torch.distributed.get_world_size(group)
    own = mean.new_empty(2 * C + 1, dtype=torch.float64)
    own[:C], own[C : 2 * C], own[2 * C] = mean, var, count
    gathered = own.new_empty(processes * own.numel())
    torch.distributed.all_gather_into_tensor(gathered, own, group=group)
    means, variances, counts = gathered.view(processes, -1).split([C, C, 1], dim=1)
    total = int(counts.sum())
    if total == 0:
        return mean, var, 0
    share = counts / total
    # A process without values may hold anything.
    means, variances = (torch.where(counts > 0, t, 0) for t in (means, variances))
    merged = (share * means).sum(0)
    spread = (share * (variances + (means - merged).square())).sum(0)
    return merged.to(mean.dtype), spread.to(var.dtype), total


class SyncBatchNormFunction(torch.autograd.Function):
    """The phases of one backend with a collective between them. Saved is what BatchNormFunction
    saves."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        activation: str,
        negative_slope: float,
        group: Any,
        backend: str,
    ) -> Tensor:
        phases = phases_of(backend)
        mean, var = phases.batch_norm_statistics(x)
        mean, var, count = _merged_statistics(mean, var, _count(x), group)
        if count == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got one over all processes"
            )
        if running_mean is not None and running_var is not None and count > 0:
            for running, value in (
                (running_mean, mean),
                (running_var, var * (count / (count - 1))),
            ):
                # Through .data: as in torch, the update is not counted as a version.
                running.data.copy_((1 - momentum) * running.to(value.dtype) + momentum * value)
        invstd = torch.rsqrt(var + eps)
        y, mask = phases.batch_norm_apply(
            x, residual, weight, bias, mean, invstd, activation, negative_slope
        )
        kept = residual if activation in SMOOTH_ACTIVATIONS else None
        ctx.save_for_backward(x, kept, weight, bias, mean, invstd, mask)
        ctx.call = (phases, group, count, activation, negative_slope)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias, mean, invstd, mask = ctx.saved_tensors
        phases, group, count, activation, negative_slope = ctx.call
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        saved = (grad_y, x, residual, mask, weight, bias, mean, invstd)
        sum_grad, sum_grad_xhat = phases.batch_norm_backward_reduce(
            *saved, activation, negative_slope
        )
        grad_x = grad_residual = None
        if need_x or need_residual:
            sums = torch.cat([sum_grad, sum_grad_xhat]).double()
            if need_x:
                torch.distributed.all_reduce(sums, group=group)
            mean_grad, mean_grad_xhat = (sums / max(count, 1)).to(mean.dtype).chunk(2)
            grad_x, grad_residual = phases.batch_norm_backward_apply(
                *saved,
                mean_grad,
                mean_grad_xhat,
                activation,
                negative_slope,
                need_x,
                need_residual,
            )
        # Gradients of parameters are those of this process: DDP adds them up.
        return (
            grad_x if need_x else None,
            grad_residual if need_residual else None,
            sum_grad_xhat.to(weight.dtype) if need_weight else None,
            sum_grad.to(bias.dtype) if need_bias else None,
            *[None] * 8,
        )


def _count(x: Tensor) -> int:
    """Values per channel."""
    return x.size(0) * math.prod(x.shape[2:])


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    *,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
    process_group: Any,
) -> Tensor:
    """:func:`resops.functional.batch_norm_act` in training with a ``process_group``.

    All processes of the group have to make the call, and its backward pass, together.
    """
    check_tensor("batch_norm_act", "input", x)
    activation = "identity" if activation is None else activation
    check_activation(activation)
    distributed = torch.distributed.is_available()
    if not (distributed and isinstance(process_group, torch.distributed.ProcessGroup)):
        raise TypeError(
            "batch_norm_act(): argument 'process_group' must be a ProcessGroup of "
            f"torch.distributed, not {type(process_group).__name__}"
        )
    if torch.distributed.get_world_size(process_group) == 1:
        return batch_norm(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            True,
            momentum,
            eps,
            residual=residual,
            activation=activation,
            negative_slope=negative_slope,
        )
    if residual is not None:
        check_tensor("batch_norm_act", "residual", residual)
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    statistics = (running_mean, running_var)
    # One value is enough for this process: how many there are is seen when all have told theirs.
    check_arguments(
        x, residual, weight, bias, *statistics, True, momentum, eps, activation, several=True
    )
    backend = _dispatch.choose("batch_norm", x)
    y: Tensor = SyncBatchNormFunction.apply(
        x,
        residual,
        weight,
        bias,
        *statistics,
        momentum,
        eps,
        activation,
        negative_slope,
        process_group,
        backend,
    )
    return y
