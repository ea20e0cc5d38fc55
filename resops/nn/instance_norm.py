"""Instance norm and group norm by the op batch_norm.

Instance norm of (N, C, *spatial) is batch norm of the view (1, N*C, *spatial) with the batch's own
statistics (Ulyanov, Vedaldi and Lempitsky, "Instance Normalization", 2016). For group norm (Wu and
He, "Group Normalization", 2018) the statistics are those of the view (1, N*G, C/G * S), and are
then applied to the view (1, N*C, S). As in torch a channels-last input is made contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm

from .. import functional
from ..ops.batch_norm import batch_norm_statistics
from ..reference.activation import activate
from .batch_norm import NormAct


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


class InstanceNormAct(NormAct, nn.modules.instancenorm._InstanceNorm):
    """What the layers for 2 and 3 spatial dimensions share; use one of those."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] | str | None = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine=affine, device=device, dtype=dtype)
        self._set_epilogue(apply_act, act_layer, act_kwargs, inplace, drop_layer)

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float
    ) -> Tensor:
        return instance_normalize(self, x, residual, activation, negative_slope)


class InstanceNormAct2d(InstanceNormAct, nn.InstanceNorm2d):
    """Instance norm over (N, C, H, W) inputs, residual and activation in one op.

    ``nn.InstanceNorm2d`` (of each sample's own statistics: there are no running ones), an addition
    and an activation, with the same parameters and ``state_dict``.

    Args:
        num_features: C.
        eps: added to the variance, inside the root.
        affine: learn weight and bias, (C,) each. True, other than in torch: as networks have it.
        apply_act, act_layer, act_kwargs, inplace, drop_layer, device, dtype: as in
            :class:`resops.nn.BatchNormAct2d`.

    Shape: input, residual and output (N, C, H, W), with more than one value of H * W.

    Raises:
        ValueError: an unknown name of an activation.
    """


class InstanceNormAct3d(InstanceNormAct, nn.InstanceNorm3d):
    """:class:`InstanceNormAct2d` over (N, C, D, H, W)."""


class GroupNormAct(NormAct, nn.GroupNorm):
    """Group norm over (N, C, *spatial) inputs, residual and activation.

    ``nn.GroupNorm``, an addition and an activation, with the same parameters and ``state_dict``;
    where no gradient is recorded in two passes over memory. Signature of timm's ``GroupNormAct``.

    Args:
        num_channels: C.
        num_groups: groups of neighbouring channels with common statistics; divides C.
        eps: added to the variance, inside the root.
        affine: learn weight and bias, (C,) each.
        group_size: channels of a group, in the place of ``num_groups``.
        apply_act, act_layer, act_kwargs, inplace, drop_layer, device, dtype: as in
            :class:`resops.nn.BatchNormAct2d`.

    Raises:
        ValueError: groups that do not divide the channels; an unknown name of an activation.
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
            if num_channels % group_size:
                raise ValueError(
                    f"group_size must divide num_channels, but got {group_size} and {num_channels}"
                )
            num_groups = num_channels // group_size
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self._set_epilogue(apply_act, act_layer, act_kwargs, inplace, drop_layer)

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float
    ) -> Tensor:
        return group_normalize(self, x, residual, activation, negative_slope)


class GroupNorm1Act(GroupNormAct):
    """:class:`GroupNormAct` of one group: layer norm of a sample's whole feature map.

    Ba, Kiros and Hinton, "Layer Normalization", 2016, in the form of Wu and He, 2018, Eq. 4; with
    timm's name.
    """

    def __init__(self, num_channels: int, **kwargs: Any) -> None:
        super().__init__(num_channels, 1, **kwargs)
