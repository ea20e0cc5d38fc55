"""What networks are assembled from, by their options ``norm_layer`` and ``act_layer``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import norm_layers
from ..nn.norm_layers import NormThenAct, create_norm_act
from ..nn.std_conv import StdConv2d, StdConv3d

ActLayer = norm_layers.ActLayer
NormLayer = norm_layers.NormLayer | None

# number of spatial dimensions -> a convolution, and one of standardised filters
_CONVS: dict[int, tuple[type[nn.Module], type[nn.Module]]] = {
    2: (nn.Conv2d, StdConv2d),
    3: (nn.Conv3d, StdConv3d),
}


class Layers:
    """Makes the layers of a network of so many spatial dimensions.

    Args:
        dimensions: 2 or 3.
        norm_layer: see :func:`resops.nn.create_norm_act`; None for "batch"; "none" or nn.Identity
            for no norm, and convolutions with a bias.
        act_layer: a class or a name, as in :class:`resops.nn.BatchNormAct2d`; None for none.
        weight_standardization: of all convolutions, see :class:`resops.nn.StdConv2d`.
    """

    def __init__(
        self,
        dimensions: int = 2,
        norm_layer: NormLayer = None,
        act_layer: ActLayer = "relu",
        weight_standardization: bool = False,
    ) -> None:
        self.dimensions = dimensions
        self.has_norms = norm_layer not in ("none", nn.Identity)
        self.norm_layer = "batch" if norm_layer is None else norm_layer
        self.act_layer = act_layer
        self.weight_standardization = weight_standardization

    def norm(self, channels: int, act: bool = True) -> Any:
        """A norm with its activation, called with x and, if there is one, a residual.

        Raises:
            ValueError: an unknown name of a norm or of an activation.
        """
        act_layer = self.act_layer if act else None
        if not self.has_norms:
            return NormThenAct(None, act_layer)
        return create_norm_act(self.norm_layer, channels, act_layer, dimensions=self.dimensions)

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
        bias: bool | None = None,
    ) -> Any:
        """A convolution; by default its output has the input's size / stride, and a bias is there
        only without a norm."""
        plain, standardised = _CONVS[self.dimensions]
        return (standardised if self.weight_standardization else plain)(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_size // 2 if padding is None else padding,
            groups=groups,
            bias=not self.has_norms if bias is None else bias,
        )

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
    2015, section 2.2): standard deviation sqrt(2 / n).

    Args:
        mode: what n is: "fan_in", the values that go into one of the output, which keeps the
            variance of activations; or "fan_out", the weights of one input, which keeps that of
            gradients.
    """
    transposed = (nn.ConvTranspose2d, nn.ConvTranspose3d)
    for module in model.modules():
        if not isinstance(module, (nn.Conv2d, nn.Conv3d, *transposed)):
            continue
        taps = math.prod(module.kernel_size)
        if mode == "fan_out":
            n = module.out_channels * taps
        else:
            # Windows of a transposed convolution do not overlap: one tap of every channel goes in.
            n = module.in_channels * (1 if isinstance(module, transposed) else taps)
        nn.init.normal_(module.weight, 0, math.sqrt(2) / math.sqrt(n))
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
