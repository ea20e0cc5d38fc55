"""V-Net (Milletari, Navab and Ahmadi, "V-Net: Fully Convolutional Neural Networks for Volumetric
Medical Image Segmentation", 2016, Figure 2).

Each resolution is a residual function of one to three 5x5x5 convolutions; resolutions change by
2x2x2 convolutions of stride 2, and by transposed ones. As in the implementations that people use, a
norm follows every convolution, which the paper does not have: ``norm_layer="none"`` leaves it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.conv_bn_act import conv_norm_act
from ._layers import ActLayer, NormLayer, check_image, fit
from ._registry import register_model
from ._residual import Join, ResidualBlock, ResidualLayers, initialise
from .unet import ConvNormActs


class ResidualStage(ResidualBlock):
    """act( F(x) + shortcut ), F a chain of 5x5x5 convolutions."""

    def __init__(
        self, in_channels: int, channels: int, convs: int, layers: ResidualLayers, join: Join | None
    ) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for i in range(convs):
            modules.append(layers.conv(channels if i else in_channels, channels, 5))
            last = i == convs - 1
            norm = layers.last_norm(channels, join is None) if last else layers.norm(channels)
            modules.append(norm)
        self.convs = ConvNormActs(*modules)
        self.enter = layers.enter()
        self.join = join

    def chain(self) -> list[tuple[Any, Any]]:
        return self.convs.pairs()

    def branch(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See :meth:`ResidualBlock.branch`."""
        return self.convs(x, residual)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.joined(self.entered(x), shortcut)


class Resize(nn.Module):
    """A 2x2x2 convolution of stride 2, or a transposed one, with its norm and activation."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm_act(self.conv, self.norm, x)


class VNet(nn.Module):
    """The V-Net.

    Args:
        num_classes: channels of the output.
        in_chans: channels of the volume; they are repeated to be the shortcut of the first stage,
            so it has to divide ``widths[0]``.
        widths: channels at each resolution, from fine to coarse.
        depths: convolutions of each stage of the contracting path; the expanding path has as many.
        norm_layer, act_layer: as in :class:`resops.models.UNet`; "prelu", the paper's activation,
            runs after the op.
        residual, drop_path_rate, weight_standardization: see :class:`ResidualLayers`.
        zero_init_residual: start with weight 0 in the last norm of every stage.

    Raises:
        ValueError: an unknown norm, activation or residual; channels that cannot be repeated;
            widths and depths of different lengths.

    Shape: (N, in_chans, D, H, W) to (N, num_classes, D, H, W).
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_chans: int = 1,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        depths: Sequence[int] = (1, 2, 3, 3, 3),
        norm_layer: NormLayer = None,
        act_layer: ActLayer = "prelu",
        residual: str = "sum",
        drop_path_rate: float = 0.0,
        zero_init_residual: bool = False,
        weight_standardization: bool = False,
    ) -> None:
        super().__init__()
        if len(widths) != len(depths) or len(widths) < 2:
            raise ValueError(
                f"widths and depths must be as many, two or more, but got {widths} and {depths}"
            )
        if widths[0] % in_chans != 0:
            raise ValueError(f"in_chans must divide the {widths[0]} of widths, but got {in_chans}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.repeats = widths[0] // in_chans
        self.levels = len(widths) - 1
        layers = ResidualLayers(
            2 * len(widths) - 1,
            norm_layer,
            act_layer,
            residual,
            drop_path_rate,
            weight_standardization,
            dimensions=3,
        )
        joins = layers.joins()

        def stage(in_channels: int, channels: int, convs: int) -> ResidualStage:
            join = next(joins)
            made = ResidualStage(in_channels, channels, convs, layers, join)
            if residual == "shake_shake":
                made.add_branch(ResidualStage(in_channels, channels, convs, layers, join))
            return made

        self.inc = stage(in_chans, widths[0], depths[0])
        self.down_convs = nn.ModuleList()
        self.downs = nn.ModuleList()
        for wide, wider, depth in zip(widths[:-1], widths[1:], depths[1:], strict=True):
            down = layers.conv(wide, wider, 2, stride=2, padding=0)
            self.down_convs.append(Resize(down, layers.norm(wider)))
            self.downs.append(stage(wider, wider, depth))
        self.up_convs = nn.ModuleList()
        self.ups = nn.ModuleList()
        below = widths[-1]
        for wide, depth in zip(reversed(widths[:-1]), reversed(depths[:-1]), strict=True):
            up = layers.up_conv(below, wide, bias=not layers.has_norms)
            self.up_convs.append(Resize(up, layers.norm(wide)))
            below = 2 * wide  # a stage on the way up has the channels of both paths
            self.ups.append(stage(below, below, depth))
        self.outc = layers.conv(below, num_classes, 1, bias=True)
        initialise(self, [self.outc], layers, zero_init_residual=zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, D, H, W) to the logits, (N, num_classes, D, H, W)."""
        check_image(x, self.in_chans, 3, 2**self.levels)
        x = self.inc(x, x.repeat(1, self.repeats, 1, 1, 1))
        skips = [x]
        for resize, stage in zip(self.down_convs, self.downs, strict=True):
            x = resize(x)
            x = stage(x, x)
            skips.append(x)
        x = skips.pop()
        for resize, stage in zip(self.up_convs, self.ups, strict=True):
            skip = skips.pop()
            x = torch.cat((fit(resize(x), skip.shape[2:]), skip), 1)
            x = stage(x, x)
        return self.outc(x)


@register_model
def vnet(num_classes: int = 2, in_chans: int = 1, **kwargs: Any) -> VNet:
    """V-Net with batch norm. ``kwargs`` are those of :class:`VNet`."""
    return VNet(num_classes, in_chans, **kwargs)
