"""Stacked hourglass networks (Newell, Yang and Deng, "Stacked Hourglass Networks for Human Pose
Estimation", 2016).

An hourglass (Figure 3) goes down to a few pixels by max-pooling and up again by nearest-neighbour
upsampling; at every resolution a branch keeps the details, goes through residual blocks of its own,
and is added. Several of them follow each other, and each one predicts heatmaps, which are
supervised and go back into the features of the next. Blocks are pre-activation bottlenecks
(Figure 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..nn.conv_bn_act import conv_norm_act
from ._layers import ActLayer, NormLayer, check_image
from ._registry import register_model
from ._residual import Join, PreActivationBlock, ResidualLayers, initialise


class ResidualModule(PreActivationBlock):
    """shortcut(x) + F(x), F norm-activation-convolution three times: 1x1, 3x3 and 1x1, the first
    two of half the channels."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        layers: ResidualLayers,
        join: Join | None,
        shortcut: nn.Module | None = None,
    ) -> None:
        super().__init__()
        half = channels // 2
        bias = not layers.fixup  # whose norms' places have one
        self.norm1 = layers.norm(in_channels)
        self.conv1 = layers.conv(in_channels, half, 1, bias=bias)
        self.norm2 = layers.norm(half)
        self.conv2 = layers.conv(half, half, 3, bias=bias)
        self.norm3 = layers.norm(half)
        self.conv3 = layers.conv(half, channels, 1, bias=bias)
        self.shortcut = shortcut
        self.join = join

    def chain(self) -> tuple[tuple[Any, Any], ...]:
        return (self.conv1, self.norm2), (self.conv2, self.norm3), (self.conv3, None)

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(self.norm1(x), x if self.shortcut is None else self.shortcut(x))


MakeModule = Callable[[int, int], ResidualModule]


def residual_modules(layers: ResidualLayers) -> MakeModule:
    """What makes a network's residual modules, of so many channels before and behind each."""
    joins = layers.joins(act=False)

    def make(in_channels: int, channels: int) -> ResidualModule:
        shortcut = None
        if in_channels != channels:
            shortcut = layers.conv(in_channels, channels, 1, bias=True)
        join = next(joins)
        module = ResidualModule(in_channels, channels, layers, join, shortcut)
        if layers.residual == "shake_shake":
            module.add_branch(ResidualModule(in_channels, channels, layers, join))
        return module

    return make


class Hourglass(nn.Module):
    """One hourglass of ``depth`` halvings; the output has the size of the input."""

    def __init__(self, depth: int, channels: int, blocks: int, make: MakeModule) -> None:
        super().__init__()

        def chain() -> nn.Sequential:
            return nn.Sequential(*(make(channels, channels) for _ in range(blocks)))

        self.skip = chain()
        self.pool = nn.MaxPool2d(2)
        self.before = chain()
        self.inner = Hourglass(depth - 1, channels, blocks, make) if depth > 1 else chain()
        self.after = chain()

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.inner(self.before(self.pool(x))))
        y = F.interpolate(y, size=x.shape[2:], mode="nearest")
        return functional.residual_add(y, self.skip(x))


class StackedHourglass(nn.Module):
    """Hourglasses one after the other, each with its heatmaps.

    Args:
        num_classes: heatmaps, one for each joint.
        in_chans: channels of the image.
        num_stacks: hourglasses.
        width: channels of the features.
        depth: halvings within an hourglass.
        blocks: residual blocks between two changes of resolution.
        norm_layer, act_layer: as in :class:`resops.models.UNet`.
        residual, drop_path_rate, weight_standardization: see :class:`ResidualLayers`.
        zero_init_residual: start with weight 0 in the last convolution of every branch.

    Raises:
        ValueError: an unknown norm, activation or residual; less than one stack, halving or block;
            a width that is no multiple of 4.

    Shape: (N, in_chans, H, W) to a list of ``num_stacks`` tensors (N, num_classes, H / 4, W / 4), H
        and W of 2 ** (depth + 2) - 1 or more; the loss is the sum over the list (section 3.2), and
        :func:`heatmap_peaks` of the last one are the joints.
    """

    def __init__(
        self,
        num_classes: int = 16,
        in_chans: int = 3,
        num_stacks: int = 8,
        width: int = 256,
        depth: int = 4,
        blocks: int = 1,
        norm_layer: NormLayer = None,
        act_layer: ActLayer = "relu",
        residual: str = "sum",
        drop_path_rate: float = 0.0,
        zero_init_residual: bool = False,
        weight_standardization: bool = False,
    ) -> None:
        super().__init__()
        if min(num_stacks, depth, blocks) < 1 or width % 4:
            raise ValueError(
                "num_stacks, depth and blocks must be at least 1 and width a multiple of 4, but "
                f"got {num_stacks}, {depth}, {blocks} and {width}"
            )
        self.num_classes, self.in_chans = num_classes, in_chans
        self.least_size = 2 ** (depth + 2) - 1
        modules = 3 + num_stacks * blocks * (3 * depth + 2)
        layers = ResidualLayers(
            modules, norm_layer, act_layer, residual, drop_path_rate, weight_standardization
        )
        module = residual_modules(layers)
        self.conv1 = layers.conv(in_chans, width // 4, 7, stride=2, bias=True)
        self.norm1 = layers.norm(width // 4)
        self.layer1 = module(width // 4, width // 2)
        self.pool = layers.max_pool()
        self.layer2 = module(width // 2, width // 2)
        self.layer3 = module(width // 2, width)
        stacks = range(num_stacks)
        self.hourglasses = nn.ModuleList(Hourglass(depth, width, blocks, module) for _ in stacks)
        self.residuals = nn.ModuleList(
            nn.Sequential(*(module(width, width) for _ in range(blocks))) for _ in stacks
        )
        self.convs = nn.ModuleList(layers.conv(width, width, 1, bias=True) for _ in stacks)
        self.norms = nn.ModuleList(layers.norm(width) for _ in stacks)
        self.heads = nn.ModuleList(layers.conv(width, num_classes, 1, bias=True) for _ in stacks)
        # What the next hourglass gets beside the features before: none follows the last one.
        between = range(num_stacks - 1)
        self.merge_features = nn.ModuleList(
            layers.conv(width, width, 1, bias=True) for _ in between
        )
        self.merge_heatmaps = nn.ModuleList(
            layers.conv(num_classes, width, 1, bias=True) for _ in between
        )
        initialise(self, list(self.heads), layers, zero_init_residual=zero_init_residual)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_chans, H, W) to the heatmaps of every stack."""
        check_image(x, self.in_chans, 2, self.least_size)
        x = conv_norm_act(self.conv1, self.norm1, x)
        x = self.layer3(self.layer2(self.pool(self.layer1(x))))
        heatmaps: list[Tensor] = []
        for i, hourglass in enumerate(self.hourglasses):
            y = self.residuals[i](hourglass(x))
            y = conv_norm_act(self.convs[i], self.norms[i], y)
            heatmaps.append(self.heads[i](y))
            if i < len(self.merge_features):
                x = functional.residual_add(self.merge_features[i](y), x)
                x = functional.residual_add(self.merge_heatmaps[i](heatmaps[i]), x)
        return heatmaps


def heatmap_peaks(heatmaps: Tensor, stride: int = 4) -> tuple[Tensor, Tensor]:
    """The maximum of every heatmap, as coordinates in the image.

    A joint is the centre of the pixel with the largest value, moved by a quarter of a pixel towards
    the larger one of its neighbours, in x and in y (section 3.3 of the paper; pixels at the border
    are not moved).

    Args:
        heatmaps: (N, K, H, W).
        stride: pixels of the image for each of a heatmap.

    Returns:
        coordinates (N, K, 2), x and y, in float32 or wider; and the values there, (N, K).

    Raises:
        ValueError: not four dimensions, or heatmaps without pixels.
    """
    if heatmaps.dim() != 4 or 0 in heatmaps.shape[2:]:
        raise ValueError(
            f"heatmaps must be (N, K, H, W) and not empty, but got {tuple(heatmaps.shape)}"
        )
    W = heatmaps.size(3)
    values, index = heatmaps.flatten(2).max(2)
    columns, rows = index % W, index // W
    samples = torch.arange(heatmaps.size(0), device=heatmaps.device).view(-1, 1)
    joints = torch.arange(heatmaps.size(1), device=heatmaps.device)

    def slope(row: int, column: int) -> Tensor:
        """Sign of the difference of the two neighbours in this direction; 0 at the border."""
        inside = (row * rows - row >= 0) & (column * columns - column >= 0)
        inside &= (rows + row < heatmaps.size(2)) & (columns + column < W)
        down, left = torch.where(inside, row, 0), torch.where(inside, column, 0)
        after = heatmaps[samples, joints, rows + down, columns + left]
        before = heatmaps[samples, joints, rows - down, columns - left]
        return (after - before).sign()

    wide = torch.promote_types(heatmaps.dtype, torch.float32)
    x = columns.to(wide) + 0.25 * slope(0, 1) + 0.5
    y = rows.to(wide) + 0.25 * slope(1, 0) + 0.5
    return torch.stack((x, y), 2) * stride, values


@register_model
def hourglass(num_classes: int = 16, in_chans: int = 3, **kwargs: Any) -> StackedHourglass:
    """Eight stacked hourglasses, the network of the paper. ``kwargs`` are those of
    :class:`StackedHourglass`."""
    return StackedHourglass(num_classes, in_chans, **kwargs)
