"""Residual networks for images of 32x32 pixels (He et al., "Deep Residual Learning for Image
Recognition", 2015, section 4.2), and their plain twins.

A 3x3 convolution and three stages of n basic blocks, of 16, 32 and 64 channels: 6n + 2 layers.
Where a stage begins with half the resolution and twice the channels, the shortcut is one of

    "A"      every second pixel, and zeros for the new channels: no parameters (the paper's)
    "B"      a 1x1 convolution of stride 2
    "pool"   2x2 average pooling and a 1x1 convolution
    "conv2"  a 2x2 convolution of stride 2

of which the convolutions have a norm. A plain network has no shortcuts at all, for the paper's
comparison of depths (Figure 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.conv_bn_act import conv_norm_act
from ._features import Backbone, FeatureMap
from ._registry import register_model
from ._residual import ResidualLayers, ScalarBias, initialise
from .resnet import BasicBlock

SHORTCUTS = ("A", "B", "pool", "conv2")


class PadShortcut(nn.Module):
    """Option A: (N, C, H, W) to (N, out_channels, H / stride, W / stride), the new channels 0."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Every second pixel of every second row."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))

    def extra_repr(self) -> str:
        return f"new_channels={self.new_channels}, stride={self.stride}"


class PadToEven(nn.Module):
    """A row and a column of zeros where the image has an odd number of them."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W)."""
        return F.pad(x, (0, x.size(3) % 2, 0, x.size(2) % 2))


class PlainBlock(BasicBlock):
    """The two convolutions of a basic block without its shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`BasicBlock`."""
        return self.branch(x)


class CifarResNet(Backbone):
    """The network of section 4.2.

    Args:
        depth: 6n + 2 layers.
        num_classes, in_chans, zero_init_residual, features_only: see :class:`ResNet`.
        shortcut: one of SHORTCUTS; None for a plain network.
        out_indices: of the feature maps: 0 for the stem's, 1 to 3 for the stages'; None for all.
        options: of :class:`ResidualLayers`.

    Raises:
        ValueError: another depth or shortcut; an unknown norm, activation or residual; an
            option of residual branches for a plain network.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        zero_init_residual: bool = False,
        shortcut: str | None = "A",
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        n, rest = divmod(depth - 2, 6)
        if n < 1 or rest:
            raise ValueError(f"depth must be 6n + 2, such as 20, but got {depth}")
        if shortcut is not None and shortcut not in SHORTCUTS:
            raise ValueError(
                f"shortcut must be one of {', '.join(SHORTCUTS)}, but got {shortcut!r}"
            )
        layers = ResidualLayers(3 * n, **options)
        if shortcut is None and (
            layers.residual != "sum" or layers.drop_path_rate or zero_init_residual
        ):
            raise ValueError(
                "a plain network takes no residual, drop_path_rate or zero_init_residual"
            )
        self.num_classes = num_classes
        self.conv1 = layers.conv(in_chans, 16, 3)
        self.bn1 = layers.norm(16)
        joins = layers.joins()
        channels = 16
        for i in range(3):
            stage = nn.Sequential()
            for k in range(n):
                out_channels, stride = 16 << i, 2 if i > 0 and k == 0 else 1
                size = (channels, out_channels, stride)
                join = next(joins)
                block: BasicBlock
                if shortcut is None:
                    block = PlainBlock(*size, layers=layers)
                else:
                    down = None if stride == 1 else _shortcut(shortcut, *size, layers)
                    block = BasicBlock(*size, down, layers=layers, join=join)
                    if layers.residual == "shake_shake":
                        block.add_branch(BasicBlock(*size, layers=layers, join=join))
                stage.append(block)
                channels = out_channels
            setattr(self, f"layer{i + 1}", stage)
        self.avgpool: nn.Module = nn.AdaptiveAvgPool2d(1)
        if layers.fixup:
            self.avgpool = nn.Sequential(self.avgpool, ScalarBias())
        self.fc = nn.Linear(64, num_classes)
        initialise(self, [self.fc], layers, zero_init_residual=zero_init_residual)
        stages = [(f"layer{i}", 8 << i, 1 << (i - 1)) for i in (1, 2, 3)]
        self.feature_info = tuple(FeatureMap(*row) for row in [("bn1", 16, 1), *stages])
        if features_only:
            self.keep_features(out_indices)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, 64, H / 4, W / 4), the output of the last stage."""
        return self.forward_intermediates(x, [3])[0]

    def forward_head(self, x: Tensor) -> Tensor:
        """Features to the logits, (N, num_classes)."""
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def forward_intermediates(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps ``indices``: 0 for the stem's, 1 to 3 for the stages'."""
        maps = [conv_norm_act(self.conv1, self.bn1, x)]
        for i in range(1, max(indices) + 1):
            maps.append(getattr(self, f"layer{i}")(maps[-1]))
        return [maps[i] for i in indices]


def _shortcut(
    kind: str, in_channels: int, out_channels: int, stride: int, layers: ResidualLayers
) -> nn.Module:
    if kind == "A":
        return PadShortcut(in_channels, out_channels, stride)
    if kind == "B":
        return layers.projection(in_channels, out_channels, stride)
    if kind == "conv2":
        conv = layers.projection(in_channels, out_channels, stride, kernel_size=2)
        return nn.Sequential(PadToEven(), conv)
    pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, layers.projection(in_channels, out_channels, 1))


@register_model
def resnet20(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR. ``kwargs`` are those of :class:`CifarResNet`."""
    return CifarResNet(20, num_classes, in_chans, **kwargs)


@register_model
def resnet32(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for CIFAR. ``kwargs`` are those of :class:`CifarResNet`."""
    return CifarResNet(32, num_classes, in_chans, **kwargs)


@register_model
def resnet44(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> CifarResNet:
    """ResNet-44 for CIFAR. ``kwargs`` are those of :class:`CifarResNet`."""
    return CifarResNet(44, num_classes, in_chans, **kwargs)


@register_model
def resnet56(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for CIFAR. ``kwargs`` are those of :class:`CifarResNet`."""
    return CifarResNet(56, num_classes, in_chans, **kwargs)


@register_model
def resnet110(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for CIFAR. ``kwargs`` are those of :class:`CifarResNet`."""
    return CifarResNet(110, num_classes, in_chans, **kwargs)


@register_model
def resnet1202(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> CifarResNet:
    """ResNet-1202 for CIFAR. ``kwargs`` are those of :class:`CifarResNet`."""
    return CifarResNet(1202, num_classes, in_chans, **kwargs)


@register_model
def plain20(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR without shortcuts. ``kwargs`` are those of :class:`CifarResNet`."""
    return CifarResNet(20, num_classes, in_chans, shortcut=None, **kwargs)


@register_model
def plain32(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for CIFAR without shortcuts. ``kwargs`` are those of :class:`CifarResNet`."""
    return CifarResNet(32, num_classes, in_chans, shortcut=None, **kwargs)


@register_model
def plain44(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> CifarResNet:
    """ResNet-44 for CIFAR without shortcuts. ``kwargs`` are those of :class:`CifarResNet`."""
    return CifarResNet(44, num_classes, in_chans, shortcut=None, **kwargs)


@register_model
def plain56(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for CIFAR without shortcuts. ``kwargs`` are those of :class:`CifarResNet`."""
    return CifarResNet(56, num_classes, in_chans, shortcut=None, **kwargs)


@register_model
def plain110(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for CIFAR without shortcuts. ``kwargs`` are those of :class:`CifarResNet`."""
    return CifarResNet(110, num_classes, in_chans, shortcut=None, **kwargs)
