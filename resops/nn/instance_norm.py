"""Instance norm and group norm by the op batch_norm.

Instance norm of (N, C, *spatial) is batch norm of the view (1, N*C, *spatial) with the batch's own
statistics (Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016); in evaluation with
running statistics it is batch norm itself. For group norm (Wu and He, "Group Normalization", 2018)
the statistics are those of the view (1, N*G, C/G * S), and are then applied to the view
(1, N*C, S). As in torch instance norm makes a channels-last input contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm

from .. import functional
from .._autograd import traced_to_aten
from ..ops.batch_norm import batch_norm_statistics
from ..reference.activation import activate
from .batch_norm import NormAct
from .checkpoint import recomputing


def _per_sample(p: Tensor | None, samples: int) -> Tensor | None:
    return None if p is None else p.repeat(samples)


def instance_normalize(
    norm: nn.modules.instancenorm._InstanceNorm,
    x: Tensor,
    residual: Tensor | None,
    activation: str,
    negative_slope: float | Tensor,
) -> Tensor:
    """act( norm(x) [+ residual] ) of an instance norm of torch."""
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
    if traced_to_aten():
        y = norm._apply_instance_norm(x)
        return activate(y if residual is None else y + residual, activation, negative_slope)
    if norm.track_running_stats and not norm.training:
        return functional.batch_norm_act(
            x,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            residual=residual,
            activation=activation,
            negative_slope=negative_slope,
        )
    N, C = x.shape[:2]
    size = (1, N * C, *x.shape[2:])
    if x.numel() // max(N * C, 1) == 1:
        raise ValueError(
            f"Expected more than 1 spatial element when training, got input size {tuple(x.shape)}"
        )
    # Every sample updates a copy of its own; the running ones are their mean, as in torch.
    running = (norm.running_mean, norm.running_var)
    means, variances = (None if t is None or recomputing() else t.repeat(N) for t in running)
    y = functional.batch_norm_act(
        x.reshape(size),
        means,
        variances,
        _per_sample(norm.weight, N),
        _per_sample(norm.bias, N),
        True,
        0.0 if norm.momentum is None else norm.momentum,
        norm.eps,
        residual=None if residual is None else residual.reshape(size),
        activation=activation,
        negative_slope=negative_slope,
    )
    for statistic, copy in zip(running, (means, variances), strict=True):
        if statistic is not None and copy is not None and N > 0:
            statistic.copy_(copy.view(N, C).mean(0))
    return y.view(x.shape)


def group_normalize(
    norm: nn.GroupNorm,
    x: Tensor,
    residual: Tensor | None,
    activation: str,
    negative_slope: float | Tensor,
) -> Tensor:
    """act( norm(x) [+ residual] ) of torch's group norm.

    One op for statistics and one for all the rest where no gradient is recorded; else torch's own,
    whose gradient flows through the statistics of groups, for which there is no kernel yet. Also
    torch's own for channels-last inputs, whose layout it keeps.
    """
    tensors = [t for t in (x, residual, norm.weight, norm.bias) if t is not None]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    no_variance = x.numel() <= norm.num_groups  # torch's error
    torchs = recorded or no_variance or x.dim() < 3
    torchs = torchs or (not x.is_contiguous() and x.movedim(1, -1).is_contiguous())
    if torchs or torch.compiler.is_compiling():
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


class InstanceNormAct(NormAct, nn.modules.instancenorm._InstanceNorm):
    """What the layers for 2 and 3 spatial dimensions share; use one of those."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] | str | None = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,  # type: ignore[arg-type] # torch takes None, too, as _NormBase declares it
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
        )
        self._set_epilogue(apply_act, act_layer, act_kwargs, inplace, drop_layer)

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float | Tensor
    ) -> Tensor:
        return instance_normalize(self, x, residual, activation, negative_slope)


class InstanceNormAct2d(InstanceNormAct, nn.InstanceNorm2d):
    """Instance norm over (N, C, H, W) or (C, H, W) inputs, residual and activation in one op.

    ``y = act( weight * (x - mean) / sqrt(var + eps) + bias [+ residual] )`` with mean and biased
    variance of each channel of each sample (Ulyanov, Vedaldi and Lempitsky, "Instance
    Normalization", 2016). Stands for ``nn.InstanceNorm2d`` followed by an addition and an
    activation: same parameters, buffers and ``state_dict``, same results.

    Args:
        num_features: C.
        eps: added to the variance, inside the root.
        momentum: weight of a batch in the running statistics; None, as in torch: 0.
        affine: learn weight and bias, (C,) each.
        track_running_stats: keep running statistics and normalise with them in evaluation.
        apply_act, act_layer, act_kwargs, inplace, drop_layer: as in :class:`BatchNormAct2d`.
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: an unknown name of an activation.

    Shape: input, residual and output (N, C, H, W); float32, bfloat16, float16 or float64.
    """


class InstanceNormAct3d(InstanceNormAct, nn.InstanceNorm3d):
    """Instance norm over (N, C, D, H, W) or (C, D, H, W) inputs, residual and activation in one op.

    See :class:`InstanceNormAct2d`.
    """


class GroupNormAct(NormAct, nn.GroupNorm):
    """Group norm with residual and activation; one op where no gradient is recorded.

    ``y = act( weight * (x - mean) / sqrt(var + eps) + bias [+ residual] )`` with mean and biased
    variance of each group of channels of each sample (Wu and He, "Group Normalization", 2018).
    Signature, and the children ``drop`` and ``act``, are those of timm's ``GroupNormAct``;
    ``state_dict`` is that of ``nn.GroupNorm``. With gradients recorded PyTorch's own group norm
    runs, then the rest: there is no kernel for its backward pass yet.

    Args:
        num_channels: C.
        num_groups: of equal size.
        eps: added to the variance, inside the root.
        affine: learn weight and bias, (C,) each.
        group_size: channels of a group; given, it takes the place of ``num_groups``.
        apply_act, act_layer, act_kwargs, inplace, drop_layer: as in :class:`BatchNormAct2d`.
        device, dtype: of parameters.

    Raises:
        ValueError: an unknown name of an activation; channels that make no whole groups.

    Shape: input, residual and output (N, C, *spatial); float32, bfloat16, float16 or float64.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        group_size: int | None = None,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] | str | None = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if group_size is not None:
            if group_size < 1 or num_channels % group_size != 0:
                raise ValueError(
                    f"num_channels must be divisible by group_size, but got {num_channels} and "
                    f"{group_size}"
                )
            num_groups = num_channels // group_size
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self._set_epilogue(apply_act, act_layer, act_kwargs, inplace, drop_layer)

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float | Tensor
    ) -> Tensor:
        return group_normalize(self, x, residual, activation, negative_slope)


class GroupNorm1Act(GroupNormAct):
    """:class:`GroupNormAct` of one group: layer norm of a sample's whole feature map.

    Ba, Kiros and Hinton, "Layer Normalization", 2016, in the form of Wu and He, 2018, Eq. 4; with
    timm's name.
    """

    def __init__(self, num_channels: int, **kwargs: Any) -> None:
        super().__init__(num_channels, 1, **kwargs)
