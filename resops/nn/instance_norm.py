"""Instance norm and group norm by the op batch_norm.

Instance norm of (N, C, *spatial) is batch norm of the view (1, N*C, *spatial) with the batch's own
statistics (Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016). For group norm (Wu and
He, "Group Normalization", 2018) the statistics are those of the view (1, N*G, C/G * S), and are
then applied to the view (1, N*C, S). As in torch a channels-last input is made contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm

from .. import functional
from ..ops.batch_norm import batch_norm_statistics
from ..reference.activation import activate


def _per_sample(p: Tensor | None, samples: int) -> Tensor | None:
    return None if p is None else p.repeat(samples)


def instance_normalize(
    norm: nn.modules.instancenorm._InstanceNorm,
    x: Tensor,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """act( norm(x) [+ residual] ) of an instance norm of torch without running statistics."""
    norm._check_input_dim(x)
    if x.dim() == norm._get_no_batch_dim():
        y = instance_normalize(
            norm,
            x.unsqueeze(0),
            None if residual is None else residual.unsqueeze(0),
            activation,
            negative_slope,
        )
        return y.squeeze(0)
    N, C = x.shape[:2]
    size = (1, N * C, *x.shape[2:])
    if x.numel() // max(N * C, 1) == 1:
        raise ValueError(
            f"Expected more than 1 spatial element when training, got input size {tuple(x.shape)}"
        )
    y = functional.batch_norm_act(
        x.reshape(size),
        None,
        None,
        _per_sample(norm.weight, N),
        _per_sample(norm.bias, N),
        True,
        0.0,
        norm.eps,
        residual=None if residual is None else residual.reshape(size),
        activation=activation,
        negative_slope=negative_slope,
    )
    return y.view(x.shape)


def group_normalize(
    norm: nn.GroupNorm, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float
) -> Tensor:
    """act( norm(x) [+ residual] ) of torch's group norm.

    One op for statistics and one for all the rest where no gradient is recorded; else torch's own,
    whose gradient flows through the statistics of groups, for which there is no kernel yet.
    """
    tensors = [t for t in (x, residual, norm.weight, norm.bias) if t is not None]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if recorded or x.numel() == 0 or x.dim() < 3 or torch.compiler.is_compiling():
        y = group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return activate(y if residual is None else y + residual, activation, negative_slope)
    N, C = x.shape[:2]
    each = C // norm.num_groups
    mean, var = batch_norm_statistics(x.reshape(1, N * norm.num_groups, -1))
    size = (1, N * C, *x.shape[2:])
    y = functional.batch_norm_act(
        x.reshape(size),
        mean.repeat_interleave(each),
        var.repeat_interleave(each),
        _per_sample(norm.weight, N),
        _per_sample(norm.bias, N),
        False,
        eps=norm.eps,
        residual=None if residual is None else residual.reshape(size),
        activation=activation,
        negative_slope=negative_slope,
    )
    return y.view(x.shape)
