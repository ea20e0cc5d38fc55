"""Residual networks (He et al., "Deep Residual Learning for Image Recognition", 2015, Table 1),
ResNeXt (Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", 2017), and wide
bottlenecks (Zagoruyko and Komodakis, "Wide Residual Networks", 2016).

Every convolution is followed by a batch norm, and a ReLU, in one op; at the end of a block the
addition of the shortcut is part of that op too. In evaluation each of these is one convolution.

As in torchvision a bottleneck halves the resolution in its 3x3 convolution ("ResNet v1.5", Goyal
et al., "Accurate, Large Minibatch SGD", 2017), or with ``stride_in_1x1`` in the first 1x1 as in the
paper. Modules have torchvision's names: ``state_dict`` is the same, and so are the initial weights
for a given seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.batch_norm_act_max_pool import norm_act_max_pool
from ..nn.conv_bn_act import conv_norm_act
from ..nn.residual_block import residual_block
from ._features import Backbone, FeatureMap
from ._layers import ActLayer, NormLayer
from ._registry import register_model
from ._residual import Join, ResidualBlock, ResidualLayers, ScalarBias, initialise


class Block(ResidualBlock):
    """y = act( F(x) + shortcut(x) ), layer by layer, or as one op that saves less for backward."""

    expansion: int
    block_op = False  # as one op
    recompute = False  # and its widest outputs are not saved either

    def _join_with(
        self, downsample: nn.Module | None, layers: ResidualLayers, join: Join | None
    ) -> None:
        """What stands beside the branch: registered after it, as torchvision's blocks have it."""
        self.downsample = downsample
        self.enter = layers.enter()
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C, H / stride, W / stride)."""
        if self.block_op and self.join is None:
            chain = self.chain()
            joined = residual_block(chain, self.downsample, x, recompute=self.recompute)
            if joined is not None:
                return joined
        entered = self.entered(x)
        return self.joined(entered, x if self.downsample is None else self.downsample(entered))


class BasicBlock(Block):
    """F is two 3x3 convolutions (Figure 5, left)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        width_per_group: int = 64,
        stride_in_1x1: bool = False,
        layers: ResidualLayers | None = None,
        join: Join | None = None,
    ) -> None:
        if groups != 1 or width_per_group != 64:
            raise ValueError("BasicBlock only supports groups=1 and width_per_group=64")
        layers = layers or ResidualLayers(1)
        super().__init__()
        self.conv1 = layers.conv(in_channels, channels, 3, stride)
        self.bn1 = layers.norm(channels)
        self.conv2 = layers.conv(channels, channels, 3)
        self.bn2 = layers.last_norm(channels, act=join is None)
        self._join_with(downsample, layers, join)

    def chain(self) -> tuple[tuple[nn.Conv2d, Any], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2)


class Bottleneck(Block):
    """F is a 1x1, a 3x3 and a 1x1 convolution (Figure 5, right)."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        width_per_group: int = 64,
        stride_in_1x1: bool = False,
        layers: ResidualLayers | None = None,
        join: Join | None = None,
    ) -> None:
        layers = layers or ResidualLayers(1)
        super().__init__()
        width = int(channels * (width_per_group / 64.0)) * groups
        out_channels = channels * self.expansion
        strides = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = layers.conv(in_channels, width, 1, strides[0])
        self.bn1 = layers.norm(width)
        self.conv2 = layers.conv(width, width, 3, strides[1], groups)
        self.bn2 = layers.norm(width)
        self.conv3 = layers.conv(width, out_channels, 1)
        self.bn3 = layers.last_norm(out_channels, act=join is None)
        self._join_with(downsample, layers, join)

    def chain(self) -> tuple[tuple[nn.Conv2d, Any], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)


class ResNet(Backbone):
    """The network of Table 1: a stem, four stages of blocks, average pooling and a classifier.

    Args:
        block: BasicBlock or Bottleneck.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the classifier.
        in_chans: channels of the image.
        zero_init_residual: start with weight 0 in the last batch norm of every block, so that each
            block starts as its shortcut (Goyal et al., 2017, section 5.1).
        groups, width_per_group: of the 3x3 convolution of a Bottleneck (Xie et al., "Aggregated
            Residual Transformations", 2017).
        norm_layer, act_layer, residual, drop_path_rate, weight_standardization: see
            :class:`ResidualLayers`.
        stride_in_1x1: halve the resolution in the first convolution of a Bottleneck, as the paper
            does.
        block_op: compute each block by one op in training, which saves the raw outputs of
            convolutions only and computes normalised activations again
            (docs/math/bottleneck.md). ``state_dict`` is the same. A block with hooks, with replaced
            modules, with other norms or another join runs layer by layer.
        memory_efficient: the same, and the last convolution of each block runs again in the
            backward pass, so that its output is not saved.
        features_only: return a list of feature maps in place of the logits.
        out_indices: those that are returned: 0 for the stem's before pooling, 1 to 4 for the
            stages'; None for all.

    Raises:
        ValueError: groups or width_per_group given for BasicBlock; an index without feature map; an
            unknown norm, activation or residual.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_chans: int = 3,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        norm_layer: NormLayer = None,
        act_layer: ActLayer = nn.ReLU,
        residual: str = "sum",
        drop_path_rate: float = 0.0,
        weight_standardization: bool = False,
        stride_in_1x1: bool = False,
        block_op: bool = False,
        memory_efficient: bool = False,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        made_of = ResidualLayers(
            sum(layers), norm_layer, act_layer, residual, drop_path_rate, weight_standardization
        )
        geometry = {
            "groups": groups,
            "width_per_group": width_per_group,
            "stride_in_1x1": stride_in_1x1,
        }
        self.num_classes = num_classes
        self.conv1 = made_of.conv(in_chans, 64, 7, stride=2)
        self.bn1 = made_of.norm(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        joins = made_of.joins()
        in_channels = 64
        for i, blocks in enumerate(layers):
            stage = make_stage(
                block, blocks, in_channels, 64 << i, 1 if i == 0 else 2, made_of, joins, **geometry
            )
            setattr(self, f"layer{i + 1}", stage)
            in_channels = (64 << i) * block.expansion
        self.avgpool: nn.Module = nn.AdaptiveAvgPool2d(1)
        if made_of.fixup:
            self.avgpool = nn.Sequential(self.avgpool, ScalarBias())
        self.fc = nn.Linear(in_channels, num_classes)
        initialise(self, [self.fc], made_of, zero_init_residual=zero_init_residual)
        for module in self.modules():
            if isinstance(module, Block):
                module.block_op = block_op or memory_efficient
                module.recompute = memory_efficient
        stages = [(f"layer{i}", (32 << i) * block.expansion, 2 << i) for i in range(1, 5)]
        self.feature_info = tuple(FeatureMap(*row) for row in [("bn1", 64, 2), *stages])
        if features_only:
            self.keep_features(out_indices)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, C, H / 32, W / 32), the output of the last stage."""
        if self.bn1.training:
            y = norm_act_max_pool(self.bn1, self.maxpool, self.conv1(x))
        else:
            y = self.maxpool(conv_norm_act(self.conv1, self.bn1, x))
        for i in range(1, 5):
            y = getattr(self, f"layer{i}")(y)
        return y

    def forward_head(self, x: Tensor) -> Tensor:
        """Features to the logits, (N, num_classes)."""
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def forward_intermediates(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps ``indices``: 0 for the stem's, 1 to 4 for the stages'."""
        y = conv_norm_act(self.conv1, self.bn1, x)
        maps = [y]
        for i in range(1, max(indices) + 1):
            y = getattr(self, f"layer{i}")(self.maxpool(y) if i == 1 else y)
            maps.append(y)
        return [maps[i] for i in indices]


def make_stage(
    block: type[BasicBlock] | type[Bottleneck],
    blocks: int,
    in_channels: int,
    channels: int,
    stride: int,
    layers: ResidualLayers,
    joins: Iterator[Join | None],
    **geometry: Any,
) -> nn.Sequential:
    """``blocks`` blocks, of which the first changes resolution and number of channels."""
    out_channels = channels * block.expansion
    stage = nn.Sequential()
    for i in range(blocks):
        first = i == 0
        downsample = None
        if first and (stride != 1 or in_channels != out_channels):
            downsample = layers.projection(in_channels, out_channels, stride)
        size = (in_channels if first else out_channels, channels, stride if first else 1)
        join = next(joins)
        made = block(*size, downsample, **geometry, layers=layers, join=join)
        if layers.residual == "shake_shake":
            made.add_branch(block(*size, **geometry, layers=layers, join=join))
        stage.append(made)
    return stage


@register_model
def resnet18(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> ResNet:
    """ResNet-18. ``kwargs`` are those of :class:`ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_chans, **kwargs)


@register_model
def resnet34(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> ResNet:
    """ResNet-34. ``kwargs`` are those of :class:`ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_chans, **kwargs)


@register_model
def resnet50(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> ResNet:
    """ResNet-50. ``kwargs`` are those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_chans, **kwargs)


@register_model
def resnet101(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> ResNet:
    """ResNet-101. ``kwargs`` are those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, in_chans, **kwargs)


@register_model
def resnet152(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> ResNet:
    """ResNet-152. ``kwargs`` are those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, in_chans, **kwargs)


@register_model
def resnext50_32x4d(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> ResNet:
    """ResNeXt-50 (32 groups of 4 channels). ``kwargs`` are those of :class:`ResNet`."""
    geometry = {"groups": 32, "width_per_group": 4}
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_chans, **{**geometry, **kwargs})


@register_model
def resnext101_32x8d(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> ResNet:
    """ResNeXt-101 (32 groups of 8 channels). ``kwargs`` are those of :class:`ResNet`."""
    geometry = {"groups": 32, "width_per_group": 8}
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, in_chans, **{**geometry, **kwargs})


@register_model
def wide_resnet50_2(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2, with wider 3x3 convolutions. ``kwargs`` are those of :class:`ResNet`."""
    geometry = {"width_per_group": 128}
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_chans, **{**geometry, **kwargs})


@register_model
def wide_resnet101_2(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> ResNet:
    """Wide ResNet-101-2, with wider 3x3 convolutions. ``kwargs`` are those of :class:`ResNet`."""
    geometry = {"width_per_group": 128}
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, in_chans, **{**geometry, **kwargs})
