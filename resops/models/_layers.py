"""What networks are assembled from, by their options ``norm_layer`` and ``act_layer``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..nn.batch_norm import (
    BatchNormAct2d,
    BatchNormAct3d,
    NormAct,
    create_activation,
    fused_activation,
    is_plain,
)
from ..nn.instance_norm import GroupNormAct, InstanceNormAct2d, InstanceNormAct3d

NormLayer = Callable[..., nn.Module] | str | None
ActLayer = Callable[..., nn.Module] | str | None


def _group_norm(channels: int, **kwargs: object) -> GroupNormAct:
    """32 groups, as in the paper, or as many as divide the channels."""
    return GroupNormAct(channels, math.gcd(32, channels), **kwargs)  # type: ignore[arg-type]


_NORMS: dict[str, dict[int, Callable[..., nn.Module]]] = {
    "batch": {2: BatchNormAct2d, 3: BatchNormAct3d},
    "instance": {2: InstanceNormAct2d, 3: InstanceNormAct3d},
    "group": {2: _group_norm, 3: _group_norm},
}


class NormThenAct(nn.Module):
    """act( norm(x) [+ residual] ) of any norm, or of none, one op after the other."""

    def __init__(self, norm: nn.Module | None, act_layer: ActLayer) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm
        # Some norm may need its own output for the backward pass; a convolution does not.
        self.act = create_activation(act_layer, None, inplace=norm is None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(x)
        if residual is None:
            return self.act(y)
        fused = fused_activation(self.act) if is_plain(self.act) else None
        if fused is None:
            return self.act(y + residual)
        return functional.residual_add(y, residual, activation=fused[0], negative_slope=fused[1])


class Layers(NamedTuple):
    """The layers of a network of so many spatial dimensions.

    Attributes:
        dimensions: 2 or 3.
        norm_layer: "batch", "instance", "group" (of 32 groups, or as many as divide the channels);
            a class or function that makes a norm of so many channels; None for no norm. One of
            resops.nn takes the activation into its op, and keeps the keys of torch's norm; any
            other is followed by the activation, and its keys are those of a child ``norm``.
        act_layer: a class or a name, as in :class:`resops.nn.BatchNormAct2d`; None for none.
    """

    dimensions: int
    norm_layer: NormLayer = "batch"
    act_layer: ActLayer = "relu"

    def norm(self, channels: int, apply_act: bool = True) -> nn.Module:
        """A norm with its activation, called with x and, if there is one, a residual.

        Raises:
            ValueError: an unknown name of a norm or of an activation.
        """
        act_layer = self.act_layer if apply_act else None
        layer = self.norm_layer
        if layer is None:
            return NormThenAct(None, act_layer)
        if isinstance(layer, str):
            if layer not in _NORMS:
                raise ValueError(
                    f"norm_layer must be None, a class or one of {', '.join(_NORMS)}, "
                    f"but got {layer!r}"
                )
            layer = _NORMS[layer][self.dimensions]
        elif not _is_norm_act(layer):
            return NormThenAct(layer(channels), act_layer)
        return layer(channels, act_layer=act_layer)

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        bias: bool | None = None,
    ) -> nn.Module:
        """A convolution; ``padding`` keeps the size, and a bias is there only without a norm."""
        conv = nn.Conv2d if self.dimensions == 2 else nn.Conv3d
        pads = kernel_size // 2 if padding is None else padding
        with_bias = self.norm_layer is None if bias is None else bias
        return conv(in_channels, out_channels, kernel_size, stride, pads, bias=with_bias)

    def up_conv(self, in_channels: int, out_channels: int, bias: bool = True) -> nn.Module:
        """Twice the size, by a transposed convolution whose windows do not overlap."""
        conv = nn.ConvTranspose2d if self.dimensions == 2 else nn.ConvTranspose3d
        return conv(in_channels, out_channels, 2, 2, bias=bias)

    def max_pool(self) -> nn.Module:
        """Half the size, rounded down."""
        return nn.MaxPool2d(2) if self.dimensions == 2 else nn.MaxPool3d(2)

    def upsample(self) -> nn.Module:
        """Twice the size, corners onto corners."""
        mode = "bilinear" if self.dimensions == 2 else "trilinear"
        return nn.Upsample(scale_factor=2, mode=mode, align_corners=True)


def _is_norm_act(layer: Callable[..., nn.Module]) -> bool:
    while isinstance(layer, functools.partial):
        layer = layer.func
    return isinstance(layer, type) and issubclass(layer, NormAct)


def check_image(x: Tensor, in_chans: int, dimensions: int, least: int) -> None:
    """Whether a network takes an image of this size.

    Args:
        in_chans: channels that it has to have.
        least: rows, columns and slices that it must have at least.

    Raises:
        ValueError: what came, and what was expected.
    """
    names = "DHW"[-dimensions:]
    if x.dim() != dimensions + 2:
        axes = ", ".join(names)
        raise ValueError(f"expected an image of (N, C, {axes}), but got {_size(x.shape)}")
    if x.size(1) != in_chans:
        raise ValueError(f"expected an image of {in_chans} channels, but got {x.size(1)}")
    if min(x.shape[2:]) < least:
        raise ValueError(
            f"the image is too small for the network: {_size(x.shape[2:])}, and it takes at least "
            f"{_size((least,) * dimensions)}"
        )


def _size(size: Sequence[int]) -> str:
    return "x".join(str(n) for n in size)


def initialise(model: nn.Module, mode: str = "fan_out") -> None:
    """He normal weights of convolutions, zero biases (He et al., "Delving Deep into Rectifiers",
    2015, section 2.2).

    Args:
        mode: "fan_in" keeps the variance of activations, "fan_out" that of gradients.
    """
    convolutions = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for module in model.modules():
        if isinstance(module, convolutions):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def fit(x: Tensor, size: Sequence[int]) -> Tensor:
    """``x`` in the middle of that size: its border cut, or zeros around it; the odd pixel last."""
    pads: list[int] = []
    for dim in reversed(range(2, x.dim())):
        more = size[dim - 2] - x.size(dim)
        if more < 0:
            x = x.narrow(dim, -more // 2, size[dim - 2])
        before = max(more, 0) // 2
        pads += [before, max(more, 0) - before]
    return torch.nn.functional.pad(x, pads) if any(pads) else x
