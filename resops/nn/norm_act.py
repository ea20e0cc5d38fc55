"""Group, layer and instance norm, and no norm, each with a residual and an activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..reference.activation import activate
from .batch_norm import create_activation, fused_activation, is_plain
from .instance_norm import group_normalize, instance_normalize

ActLayer = Callable[..., nn.Module] | str | None


class NormAct(nn.Module):
    """act( norm(x) [+ residual] ): what the layers of this file share; use one of those."""

    act: nn.Module

    def set_activation(
        self, act_layer: ActLayer, act_kwargs: Mapping[str, Any] | None = None, inplace: bool = True
    ) -> None:
        """Make the child ``act``."""
        self.act = create_activation(act_layer, act_kwargs, inplace)

    def epilogue(self) -> tuple[str, float, tuple[nn.Module, ...]]:
        """The activation of the op with its slope, and what runs after it: ``act`` or nothing."""
        fused = fused_activation(self.act) if is_plain(self.act) else None
        return ("identity", 0.0, (self.act,)) if fused is None else (*fused, ())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act( norm(x) [+ residual] ).

        Args:
            x: (N, C, *spatial).
            residual: like ``x``.
        """
        activation, negative_slope, rest = self.epilogue()
        y = self._normalize(x, residual, activation, negative_slope)
        return rest[0](y) if rest else y

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float
    ) -> Tensor:
        raise NotImplementedError


class GroupNormAct(NormAct, nn.GroupNorm):
    """Group norm (Wu and He, 2018), residual and activation; timm's signature.

    ``state_dict`` is that of ``nn.GroupNorm``.

    Args:
        num_channels: C.
        num_groups: of channels that share their statistics; has to divide C.
        group_size: channels of a group, in place of ``num_groups``.
        others: see :class:`resops.nn.BatchNormAct2d`.

    Raises:
        ValueError: channels that the groups do not divide; an unknown name of an activation.

    Shape: input, residual and output (N, C, *spatial).
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        group_size: int | None = None,
        apply_act: bool = True,
        act_layer: ActLayer = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if group_size is not None:
            if group_size <= 0 or num_channels % group_size != 0:
                raise ValueError(
                    f"group_size must divide num_channels ({num_channels}), but got {group_size}"
                )
            num_groups = num_channels // group_size
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.set_activation(act_layer if apply_act else None, act_kwargs, inplace)

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float
    ) -> Tensor:
        return group_normalize(self, x, residual, activation, negative_slope)


class GroupNorm1Act(GroupNormAct):
    """:class:`GroupNormAct` of one group: layer norm of a sample's whole feature map (Ba, Kiros and
    Hinton, "Layer Normalization", 2016, as Wu and He, 2018, Eq. 4, have it for images), with timm's
    name."""

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        apply_act: bool = True,
        act_layer: ActLayer = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_channels,
            1,
            eps,
            affine,
            None,
            apply_act,
            act_layer,
            act_kwargs,
            inplace,
            device,
            dtype,
        )


class _InstanceNormAct(NormAct, nn.modules.instancenorm._InstanceNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        apply_act: bool = True,
        act_layer: ActLayer = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine=affine, device=device, dtype=dtype)
        self.set_activation(act_layer if apply_act else None, act_kwargs, inplace)

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float
    ) -> Tensor:
        return instance_normalize(self, x, residual, activation, negative_slope)


class InstanceNormAct2d(_InstanceNormAct, nn.InstanceNorm2d):
    """Instance norm (Ulyanov, Vedaldi and Lempitsky, 2016), residual and activation.

    Of (N, C, H, W), with its own statistics in training and evaluation, and with parameters by
    default. Arguments: see :class:`resops.nn.BatchNormAct2d`.
    """


class InstanceNormAct3d(_InstanceNormAct, nn.InstanceNorm3d):
    """:class:`InstanceNormAct2d` of (N, C, D, H, W)."""


class BiasAct(NormAct):
    """act( x + bias [+ residual] ): in a norm's place, where a network has none.

    The bias is the one that a convolution without norm has. One pass, that of a batch norm with
    statistics 0 and 1.

    Args:
        num_features: C.
        affine: learn the bias, (C,).
        shared: learn one bias for all channels, (1,), as Fixup has it.
        others: see :class:`resops.nn.BatchNormAct2d`.

    Shape: input, residual and output (N, C, *spatial).
    """

    mean: Tensor
    var: Tensor

    def __init__(
        self,
        num_features: int,
        affine: bool = True,
        shared: bool = False,
        apply_act: bool = True,
        act_layer: ActLayer = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bias: nn.Parameter | None = None
        if affine:
            biases = torch.zeros(1 if shared else num_features, device=device, dtype=dtype)
            self.bias = nn.Parameter(biases)
        for name, value in (("mean", 0.0), ("var", 1.0)):
            statistic = torch.full((num_features,), value, device=device, dtype=dtype)
            self.register_buffer(name, statistic, persistent=False)
        self.set_activation(act_layer if apply_act else None, act_kwargs, inplace)

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float
    ) -> Tensor:
        return functional.batch_norm_act(
            x,
            self.mean,
            self.var,
            None,
            None if self.bias is None else self.bias.expand(self.mean.shape),
            eps=0.0,
            residual=residual,
            activation=activation,
            negative_slope=negative_slope,
        )


class ThenAct(NormAct):
    """act( norm(x) [+ residual] ) of a norm that has no fused form.

    Args:
        norm: a layer without activation.
        act_layer: see :class:`resops.nn.BatchNormAct2d`.
    """

    def __init__(self, norm: nn.Module, act_layer: ActLayer = nn.ReLU) -> None:
        super().__init__()
        self.norm = norm
        self.set_activation(act_layer)

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float
    ) -> Tensor:
        y: Tensor = self.norm(x)
        if residual is None:
            return activate(y, activation, negative_slope)
        return functional.residual_add(
            y, residual, activation=activation, negative_slope=negative_slope
        )
