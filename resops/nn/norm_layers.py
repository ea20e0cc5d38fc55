"""Norms with activation by name, or from a norm layer of torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .. import functional
from . import observer
from .batch_norm import (
    BatchNormAct,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    create_activation,
    fused_activation,
    is_plain,
    makes_norm_act,
)
from .batch_norm_variants import BatchRenormAct2d, GhostBatchNormAct2d
from .bias_act import BiasAct
from .instance_norm import (
    GroupNorm1Act,
    GroupNormAct,
    InstanceNormAct,
    InstanceNormAct2d,
    InstanceNormAct3d,
)

ActLayer = Callable[..., nn.Module] | str | None
NormLayer = Callable[..., nn.Module] | str


class NormThenAct(nn.Module):
    """act( norm(x) [+ residual] ) of any norm, or of none, one op after the other."""

    def __init__(self, norm: nn.Module | None, act_layer: ActLayer) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm
        # A norm may need its own output for the backward pass; without one x is the caller's.
        self.act = create_activation(act_layer, None, inplace=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if observer.listening():
            observer.tell(observer.NormCall(self), "", x)
        y: Tensor = self.norm(x)
        if residual is None:
            return self.act(y)
        fused = fused_activation(self.act) if is_plain(self.act) else None
        if fused is None:
            return self.act(y + residual)
        return functional.residual_add(y, residual, activation=fused[0], negative_slope=fused[1])


def _group_norm(channels: int, **kwargs: Any) -> GroupNormAct:
    """32 groups, as in the paper, or the most that divide both 32 and the channels."""
    return GroupNormAct(channels, math.gcd(32, channels), **kwargs)


# name -> layer, by the number of spatial dimensions
_ANY: dict[str, Callable[..., nn.Module]] = {
    "group": _group_norm,
    "layer": GroupNorm1Act,
    "none": BiasAct,
}
NORM_LAYERS: dict[int, dict[str, Callable[..., nn.Module]]] = {
    2: {
        "batch": BatchNormAct2d,
        "ghost_batch": GhostBatchNormAct2d,
        "batch_renorm": BatchRenormAct2d,
        "instance": functools.partial(InstanceNormAct2d, affine=True),
        **_ANY,
    },
    3: {
        "batch": BatchNormAct3d,
        "instance": functools.partial(InstanceNormAct3d, affine=True),
        **_ANY,
    },
}
_FUSED: dict[type[nn.Module], type[BatchNormAct] | type[InstanceNormAct]] = {
    nn.BatchNorm1d: BatchNormAct1d,
    nn.BatchNorm2d: BatchNormAct2d,
    nn.BatchNorm3d: BatchNormAct3d,
    nn.InstanceNorm2d: InstanceNormAct2d,
    nn.InstanceNorm3d: InstanceNormAct3d,
}


def create_norm_act(
    norm_layer: NormLayer,
    channels: int,
    act_layer: ActLayer = nn.ReLU,
    apply_act: bool = True,
    *,
    dimensions: int = 2,
) -> nn.Module:
    """A layer that computes act( norm(x) [+ residual] ), called with x and perhaps a residual.

    Args:
        norm_layer: "batch", "ghost_batch", "batch_renorm", "group" (of 32 groups at most), "layer"
            (of one group), "instance" (with weight and bias) or "none" (a bias), of which the two
            that change batch norm are for 2 dimensions only; a class of :mod:`resops.nn`, perhaps
            in a ``functools.partial``; or any function that makes a norm of ``channels`` without
            activation. Of torch's own norms the fused form with the same keys is taken; one that
            has none is called as it is, and residual and activation follow it.
        act_layer, apply_act: see :class:`resops.nn.BatchNormAct2d`.
        dimensions: spatial ones.

    Raises:
        ValueError: an unknown name; channels that do not go with the norm.
    """
    if isinstance(norm_layer, str):
        known = NORM_LAYERS[dimensions]
        if norm_layer not in known:
            names = ", ".join(known)
            raise ValueError(
                f"norm_layer must be None, a class or one of {names}, but got {norm_layer!r}"
            )
        norm_layer = known[norm_layer]
    elif not makes_norm_act(norm_layer):
        return _with_activation(norm_layer(channels), act_layer if apply_act else None)
    return norm_layer(channels, act_layer=act_layer, apply_act=apply_act)


def _with_activation(norm: nn.Module, act_layer: ActLayer) -> nn.Module:
    """The fused layer that stands for ``norm`` and an activation, or one after the other."""
    kind = type(norm)
    if not is_plain(norm):
        return NormThenAct(norm, act_layer)
    if kind in _FUSED:
        assert isinstance(norm, _NormBase)
        fused: nn.Module = _FUSED[kind](
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            act_layer=act_layer,
        )
    elif isinstance(norm, nn.GroupNorm) and kind is nn.GroupNorm:
        fused = GroupNormAct(
            norm.num_channels, norm.num_groups, norm.eps, norm.affine, act_layer=act_layer
        )
    else:
        return NormThenAct(norm, act_layer)
    fused._parameters.update(norm._parameters)
    fused._buffers.update(norm._buffers)
    return fused.train(norm.training)
