"""3-D U-Net (Çiçek, Abdulkadir, Lienkamp, Brox and Ronneberger, "3D U-Net: Learning Dense
Volumetric Segmentation from Sparse Annotation", 2016, Figure 2), of padded convolutions.

The U-Net with one more dimension, and two differences against bottlenecks (section 2): the channels
double before the max-pooling, in the second convolution of each resolution, and a transposed
convolution keeps their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ._layers import ActLayer, NormLayer, check_image
from ._registry import register_model
from ._residual import create_layers, initialise
from .unet import Down, OutConv, Up, choose_block_op, double_convs


class UNet3d(nn.Module):
    """The 3-D U-Net.

    Args:
        num_classes: channels of the output.
        in_chans: channels of the volume.
        widths: channels at each resolution after its second convolution, from fine to coarse; after
            the first one there are half as many.
        trilinear: upsample by interpolation; else by transposed convolutions.
        norm_layer, act_layer, residual, drop_path_rate, zero_init_residual, weight_standardization,
        block_op: as in :class:`resops.models.UNet`.

    Raises:
        ValueError: an unknown norm, activation or residual; fewer than two widths; options of
            residual blocks without these.

    Shape: (N, in_chans, D, H, W) to (N, num_classes, D, H, W).
    """

    def __init__(
        self,
        num_classes: int = 3,
        in_chans: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        trilinear: bool = False,
        norm_layer: NormLayer = None,
        act_layer: ActLayer = "relu",
        residual: bool | str = False,
        drop_path_rate: float = 0.0,
        zero_init_residual: bool = False,
        weight_standardization: bool = False,
        block_op: bool | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths must be two numbers or more, but got {widths}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.levels = len(widths) - 1
        layers = create_layers(
            3,
            residual,
            2 * len(widths) - 1,
            norm_layer,
            act_layer,
            drop_path_rate,
            weight_standardization,
        )
        double_conv = double_convs(layers)
        self.inc = double_conv(in_chans, widths[0] // 2, widths[0])
        self.downs = nn.ModuleList(
            Down(layers.max_pool(), double_conv(wide, wide, wider))
            for wide, wider in itertools.pairwise(widths)
        )
        self.ups = nn.ModuleList()
        for wide, below in zip(reversed(widths[:-1]), reversed(widths[1:]), strict=True):
            up = layers.upsample() if trilinear else layers.up_conv(below, below, bias=False)
            self.ups.append(Up(up, double_conv(wide + below, wide, wide)))
        self.outc = OutConv(widths[0], num_classes, layers)
        choose_block_op(self, block_op)
        initialise(self, [self.outc], layers, "fan_in", zero_init_residual)

    @property
    def margin(self) -> int:
        """As in :class:`resops.models.UNet`."""
        return 6 * 2**self.levels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, D, H, W) to the logits, (N, num_classes, D, H, W)."""
        check_image(x, self.in_chans, 3, 2**self.levels)
        x = self.inc(x)
        skips = [x]
        for down in self.downs:
            x = down(x)
            skips.append(x)
        x = skips.pop()
        for up in self.ups:
            x = up(x, skips.pop())
        return self.outc(x)


@register_model
def unet3d(num_classes: int = 3, in_chans: int = 3, **kwargs: Any) -> UNet3d:
    """The padded 3-D U-Net with batch norm. ``kwargs`` are those of :class:`UNet3d`."""
    return UNet3d(num_classes, in_chans, **kwargs)
