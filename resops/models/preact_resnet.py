"""Pre-activation residual networks, "ResNet v2" (He et al., "Identity Mappings in Deep Residual
Networks", 2016).

A branch is norm, activation and convolution, two or three times, and nothing follows the sum: the
shortcut is the identity from the first block to the last (Figure 1b). Where a block changes the
size, its shortcut is a 1x1 convolution of the activated input.

Modules have the names of timm's ``resnetv2``, and ``state_dict`` is the same. As there a bottleneck
halves the resolution in its 3x3 convolution.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.conv_bn_act import conv_norm_act, convolve
from ._features import Backbone, FeatureMap
from ._registry import register_model
from ._residual import Join, PreActivationBlock, ResidualLayers, ScalarBias, initialise


class PreActBlock(PreActivationBlock):
    """y = x + F( act( norm(x) ) ), or with the projection of what is activated for x."""

    expansion: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        projected: bool,
        layers: ResidualLayers,
        join: Join | None,
    ) -> None:
        super().__init__()
        self.join = join
        self.downsample: nn.Module | None = None
        if projected:
            conv = layers.conv(in_channels, out_channels, 1, stride)
            self.downsample = nn.Sequential(OrderedDict(conv=conv))
        self.norm1 = layers.norm(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C, H / stride, W / stride)."""
        activated = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(activated)
        return self.joined(activated, shortcut)


class PreActBasic(PreActBlock):
    """F is two 3x3 convolutions, with dropout before the second (Zagoruyko and Komodakis, "Wide
    Residual Networks", 2016, section 2.4)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        projected: bool,
        layers: ResidualLayers,
        join: Join | None,
        drop_rate: float,
    ) -> None:
        changed = stride != 1 or in_channels != out_channels
        super().__init__(in_channels, out_channels, stride, projected and changed, layers, join)
        self.conv1 = layers.conv(in_channels, out_channels, 3, stride)
        self.norm2 = layers.norm(out_channels)
        self.dropout = nn.Dropout(drop_rate)
        self.conv2 = layers.conv(out_channels, out_channels, 3)

    def chain(self) -> tuple[tuple[nn.Conv2d, Any], ...]:
        return (self.conv1, self.norm2), (self.conv2, None)

    def branch(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """F of what ``norm1`` returned."""
        assert residual is None
        y = conv_norm_act(self.conv1, self.norm2, x)
        return convolve(self.conv2, self.dropout(y))


class PreActBottleneck(PreActBlock):
    """F is a 1x1, a 3x3 and a 1x1 convolution."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        projected: bool,
        layers: ResidualLayers,
        join: Join | None,
        drop_rate: float,
    ) -> None:
        if drop_rate:
            raise ValueError(f"a bottleneck has no dropout, but got drop_rate={drop_rate}")
        super().__init__(in_channels, out_channels, stride, projected, layers, join)
        width = out_channels // self.expansion
        self.conv1 = layers.conv(in_channels, width, 1)
        self.norm2 = layers.norm(width)
        self.conv2 = layers.conv(width, width, 3, stride)
        self.norm3 = layers.norm(width)
        self.conv3 = layers.conv(width, out_channels, 1)

    def chain(self) -> tuple[tuple[nn.Conv2d, Any], ...]:
        return (self.conv1, self.norm2), (self.conv2, self.norm3), (self.conv3, None)


_Block = type[PreActBasic] | type[PreActBottleneck]


class PreActResNet(Backbone):
    """A stem, stages of pre-activation blocks, a last norm with activation, and a classifier.

    Args:
        block: PreActBasic or PreActBottleneck.
        layers: number of blocks in each stage.
        channels: of each stage's output.
        num_classes, in_chans, features_only: see :class:`ResNet`.
        stem_chs: channels of the stem's convolution.
        small_images: a 3x3 convolution as the stem, as for CIFAR, in place of a 7x7 one of stride 2
            and a max pooling.
        zero_init_residual: start with weight 0 in the last convolution of every branch.
        drop_rate: of the dropout in a PreActBasic.
        out_indices: of the feature maps: 0 for the stem's convolution, then the stages'; None for
            all.
        options: of :class:`ResidualLayers`.

    Raises:
        ValueError: an unknown norm, activation or residual; an index without feature map; drop_rate
            given for PreActBottleneck.
    """

    def __init__(
        self,
        block: _Block,
        layers: Sequence[int],
        channels: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        stem_chs: int = 64,
        small_images: bool = False,
        zero_init_residual: bool = False,
        drop_rate: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        made_of = ResidualLayers(sum(layers), **options)
        self.num_classes = num_classes
        if small_images:
            conv = made_of.conv(in_chans, stem_chs, 3)
            stem = OrderedDict[str, nn.Module](conv=conv)
        else:
            conv = made_of.conv(in_chans, stem_chs, 7, stride=2)
            stem = OrderedDict[str, nn.Module](conv=conv, pool=nn.MaxPool2d(3, 2, padding=1))
        self.stem = nn.Sequential(stem)
        joins = made_of.joins(act=False)
        reduction = 1 if small_images else 4
        maps = [FeatureMap("stem.conv", stem_chs, 1 if small_images else 2)]
        self.stages = nn.Sequential()
        in_channels = stem_chs
        for i, (blocks, out_channels) in enumerate(zip(layers, channels, strict=True)):
            stage = nn.Sequential()
            for k in range(blocks):
                stride = 2 if i > 0 and k == 0 else 1
                size = (in_channels, out_channels, stride)
                join = next(joins)
                made = block(*size, k == 0, made_of, join, drop_rate)
                if made_of.residual == "shake_shake":
                    made.add_branch(block(*size, False, made_of, join, drop_rate))
                stage.append(made)
                in_channels = out_channels
            self.stages.append(nn.Sequential(OrderedDict(blocks=stage)))
            maps.append(FeatureMap(f"stages.{i}", out_channels, reduction << i))
        self.norm = made_of.norm(in_channels)
        self.head = nn.Sequential(OrderedDict[str, nn.Module](pool=nn.AdaptiveAvgPool2d(1)))
        if made_of.fixup:
            self.head.add_module("bias", ScalarBias())
        classifier = nn.Conv2d(in_channels, num_classes, 1)
        self.head.add_module("fc", classifier)
        initialise(self, [classifier], made_of, zero_init_residual=zero_init_residual)
        if not made_of.fixup:
            nn.init.normal_(classifier.weight, 0, 0.01)
            assert classifier.bias is not None
            nn.init.zeros_(classifier.bias)
        self.feature_info = tuple(maps)
        if features_only:
            self.keep_features(out_indices)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to the activated output of the last stage."""
        y: Tensor = self.norm(self.stages(self.stem(x)))
        return y

    def forward_head(self, x: Tensor) -> Tensor:
        """Features to the logits, (N, num_classes)."""
        return torch.flatten(self.head(x), 1)

    def forward_intermediates(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps ``indices``: 0 for the stem's convolution, then the stages', not normalised."""
        y: Tensor = self.stem[0](x)
        maps = [y]
        for i in range(max(indices)):
            y = self.stages[i](self.stem[1:](y) if i == 0 else y)
            maps.append(y)
        return [maps[i] for i in indices]


def _imagenet(block: _Block, layers: Sequence[int], *args: Any, **kwargs: Any) -> PreActResNet:
    """Four stages of 64 to 512 channels in the 3x3 convolutions."""
    channels = [block.expansion * c for c in (64, 128, 256, 512)]
    return PreActResNet(block, layers, channels, *args, **kwargs)


@register_model
def resnetv2_18(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-18. ``kwargs`` are those of :class:`PreActResNet`."""
    return _imagenet(PreActBasic, (2, 2, 2, 2), num_classes, in_chans, **kwargs)


@register_model
def resnetv2_34(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-34. ``kwargs`` are those of :class:`PreActResNet`."""
    return _imagenet(PreActBasic, (3, 4, 6, 3), num_classes, in_chans, **kwargs)


@register_model
def resnetv2_50(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-50. ``kwargs`` are those of :class:`PreActResNet`."""
    return _imagenet(PreActBottleneck, (3, 4, 6, 3), num_classes, in_chans, **kwargs)


@register_model
def resnetv2_101(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-101. ``kwargs`` are those of :class:`PreActResNet`."""
    return _imagenet(PreActBottleneck, (3, 4, 23, 3), num_classes, in_chans, **kwargs)


@register_model
def resnetv2_152(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-152. ``kwargs`` are those of :class:`PreActResNet`."""
    return _imagenet(PreActBottleneck, (3, 8, 36, 3), num_classes, in_chans, **kwargs)


@register_model
def resnetv2_200(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-200. ``kwargs`` are those of :class:`PreActResNet`."""
    return _imagenet(PreActBottleneck, (3, 24, 36, 3), num_classes, in_chans, **kwargs)


def _cifar(block: _Block, depth: int, *args: Any, **kwargs: Any) -> PreActResNet:
    """Three stages of 16, 32 and 64 channels in the 3x3 convolutions."""
    blocks = (depth - 2) // (6 if block is PreActBasic else 9)
    channels = [block.expansion * c for c in (16, 32, 64)]
    kwargs = {"stem_chs": 16, "small_images": True, **kwargs}
    return PreActResNet(block, [blocks] * 3, channels, *args, **kwargs)


@register_model
def preact_resnet110(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-110 for CIFAR. ``kwargs`` are those of :class:`PreActResNet`."""
    return _cifar(PreActBasic, 110, num_classes, in_chans, **kwargs)


@register_model
def preact_resnet164(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-164 for CIFAR. ``kwargs`` are those of :class:`PreActResNet`."""
    return _cifar(PreActBottleneck, 164, num_classes, in_chans, **kwargs)


@register_model
def preact_resnet1001(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-1001 for CIFAR. ``kwargs`` are those of :class:`PreActResNet`."""
    return _cifar(PreActBottleneck, 1001, num_classes, in_chans, **kwargs)
