"""U-Net++ (Zhou, Siddiquee, Tajbakhsh and Liang, "UNet++: A Nested U-Net Architecture for Medical
Image Segmentation", 2018, Figure 1a).

Between the contracting path, the column j = 0, and the output stands a triangle of double
convolutions ``X(i, j)`` of resolution i, each of which sees all those before it in its row, and the
one below:

    X(i, j) = H( [ X(i, 0), ..., X(i, j - 1), up(X(i + 1, j - 1)) ] )        (Eq. 1)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import recomputed_input
from ._layers import ActLayer, Layers, NormLayer, check_image, fit, initialise
from ._registry import register_model
from .unet import DoubleConv, choose_block_op


class UNetPlusPlus(nn.Module):
    """The nested U-Net.

    Args:
        num_classes: channels of an output.
        in_chans: channels of the image.
        widths: channels at each resolution, from fine to coarse.
        bilinear: upsample by interpolation; else by transposed convolutions.
        deep_supervision: a head on each ``X(0, j)``. In training ``forward`` returns the logits of
            all of them, in evaluation their mean (the paper's "accurate mode").
        norm_layer, act_layer, block_op: as in :class:`resops.models.UNet`.

    Raises:
        ValueError: an unknown norm or activation; fewer than two widths.

    Shape: (N, in_chans, H, W) to (N, num_classes, H, W), or a list of such.
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_chans: int = 3,
        widths: Sequence[int] = (32, 64, 128, 256, 512),
        bilinear: bool = False,
        deep_supervision: bool = False,
        norm_layer: NormLayer = None,
        act_layer: ActLayer = "relu",
        block_op: bool | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths must be two numbers or more, but got {widths}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.levels = len(widths) - 1
        layers = Layers(2, norm_layer, act_layer)
        self.pool = layers.max_pool()
        for i, wide in enumerate(widths):
            before = in_chans if i == 0 else widths[i - 1]
            self.add_module(f"conv{i}_0", DoubleConv((before, wide, wide), layers))
        for j in range(1, len(widths)):
            for i, (wide, below) in enumerate(itertools.pairwise(widths[: len(widths) - j + 1])):
                up = layers.upsample() if bilinear else layers.up_conv(below, wide)
                joined = j * wide + (below if bilinear else wide)
                self.add_module(f"up{i}_{j}", up)
                self.add_module(f"conv{i}_{j}", DoubleConv((joined, wide, wide), layers))
        heads = range(1, len(widths)) if deep_supervision else [self.levels]
        self.heads = [f"final{j}" if deep_supervision else "final" for j in heads]
        for name in self.heads:
            self.add_module(name, layers.conv(widths[0], num_classes, 1, bias=True))
        choose_block_op(self, block_op)
        initialise(self, mode="fan_in")

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(N, in_chans, H, W) to the logits, (N, num_classes, H, W), or a list of them."""
        check_image(x, self.in_chans, 2, 2**self.levels)
        rows: list[list[Tensor]] = []
        for i in range(self.levels + 1):  # diagonal by diagonal: X(i, 0), X(i - 1, 1), ...
            pooled = recomputed_input.call(self.pool, x) if i else x
            x = self.get_submodule(f"conv{i}_0")(pooled)
            rows.append([x])
            for j in range(1, i + 1):
                row = rows[i - j]
                below = rows[i - j + 1][j - 1]
                up = recomputed_input.call(self.get_submodule(f"up{i - j}_{j}"), below)
                slices = (*row, fit(up, row[0].shape[2:]))
                row.append(self.get_submodule(f"conv{i - j}_{j}")(slices))
        if len(self.heads) == 1:
            return recomputed_input.call(self.get_submodule(self.heads[0]), rows[0][-1])
        outputs = zip(self.heads, rows[0][1:], strict=True)
        logits = [recomputed_input.call(self.get_submodule(h), y) for h, y in outputs]
        return logits if self.training else torch.stack(logits).mean(0)


@register_model
def unetplusplus(num_classes: int = 2, in_chans: int = 3, **kwargs: Any) -> UNetPlusPlus:
    """U-Net++ with batch norm. ``kwargs`` are those of :class:`UNetPlusPlus`."""
    return UNetPlusPlus(num_classes, in_chans, **kwargs)
