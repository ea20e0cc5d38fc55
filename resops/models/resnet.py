"""Residual networks (He et al., "Deep Residual Learning for Image Recognition", 2015, Table 1).

Every convolution is followed by a batch norm, and a ReLU, in one op; at the end of a block the
addition of the shortcut is part of that op too. In evaluation each of these is one convolution.

As in torchvision a bottleneck halves the resolution in its 3x3 convolution, not in the first 1x1
of the paper ("ResNet v1.5", Goyal et al., "Accurate, Large Minibatch SGD", 2017). Modules have
torchvision's names: ``state_dict`` is the same, and so are the initial weights for a given seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.batch_norm import BatchNormAct2d
from ..nn.batch_norm_act_max_pool import norm_act_max_pool
from ..nn.conv_bn_act import Conv2dNormActivation, conv_norm_act
from ..nn.residual_block import residual_block
from ._features import Backbone, FeatureMap
from ._registry import register_model


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)


def _conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


class _Block(nn.Module):
    """How a block is computed: layer by layer, or as one op that saves less for backward."""

    block_op = False  # as one op
    recompute = False  # and its widest outputs are not saved either


class BasicBlock(_Block):
    """y = relu( F(x) + shortcut(x) ), F two 3x3 convolutions (Figure 5, left)."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__()
        if groups != 1 or width_per_group != 64:
            raise ValueError("BasicBlock only supports groups=1 and width_per_group=64")
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = BatchNormAct2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = BatchNormAct2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        if self.block_op:
            chain = ((self.conv1, self.bn1), (self.conv2, self.bn2))
            joined = residual_block(chain, self.downsample, x, recompute=self.recompute)
            if joined is not None:
                return joined
        y = conv_norm_act(self.conv1, self.bn1, x)
        shortcut = x if self.downsample is None else self.downsample(x)
        return conv_norm_act(self.conv2, self.bn2, y, residual=shortcut)


class Bottleneck(_Block):
    """y = relu( F(x) + shortcut(x) ), F a 1x1, a 3x3 and a 1x1 convolution (Figure 5, right)."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__()
        width = int(channels * (width_per_group / 64.0)) * groups
        out_channels = channels * self.expansion
        self.conv1 = _conv1x1(in_channels, width)
        self.bn1 = BatchNormAct2d(width)
        self.conv2 = _conv3x3(width, width, stride, groups)
        self.bn2 = BatchNormAct2d(width)
        self.conv3 = _conv1x1(width, out_channels)
        self.bn3 = BatchNormAct2d(out_channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        if self.block_op:
            chain = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
            joined = residual_block(chain, self.downsample, x, recompute=self.recompute)
            if joined is not None:
                return joined
        y = conv_norm_act(self.conv1, self.bn1, x)
        y = conv_norm_act(self.conv2, self.bn2, y)
        shortcut = x if self.downsample is None else self.downsample(x)
        return conv_norm_act(self.conv3, self.bn3, y, residual=shortcut)


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
        block_op: compute each block by one op in training, which saves the raw outputs of
            convolutions only and computes normalised activations again
            (docs/math/bottleneck.md). ``state_dict`` is the same. A block with hooks, or
            with replaced modules, runs layer by layer.
        memory_efficient: the same, and the last convolution of each block runs again in the
            backward pass, so that its output is not saved.
        features_only: return a list of feature maps in place of the logits.
        out_indices: those that are returned: 0 for the stem's before pooling, 1 to 4 for the
            stages'; None for all.

    Raises:
        ValueError: groups or width_per_group given for BasicBlock; an index without feature map.
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
        block_op: bool = False,
        memory_efficient: bool = False,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNormAct2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self._in_channels = 64
        geometry = {"groups": groups, "width_per_group": width_per_group}
        self.layer1 = self._make_stage(block, layers[0], 64, stride=1, **geometry)
        self.layer2 = self._make_stage(block, layers[1], 128, stride=2, **geometry)
        self.layer3 = self._make_stage(block, layers[2], 256, stride=2, **geometry)
        self.layer4 = self._make_stage(block, layers[3], 512, stride=2, **geometry)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)
        for module in self.modules():
            if isinstance(module, _Block):
                module.block_op = block_op or memory_efficient
                module.recompute = memory_efficient
        stages = [(f"layer{i}", (32 << i) * block.expansion, 2 << i) for i in range(1, 5)]
        self.feature_info = tuple(FeatureMap(*row) for row in [("bn1", 64, 2), *stages])
        if features_only:
            self.keep_features(out_indices)

    def _make_stage(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: int,
        channels: int,
        stride: int,
        groups: int,
        width_per_group: int,
    ) -> nn.Sequential:
        """``blocks`` blocks, of which the first changes resolution and number of channels."""
        out_channels = channels * block.expansion
        downsample = None
        if stride != 1 or self._in_channels != out_channels:
            downsample = Conv2dNormActivation(
                self._in_channels, out_channels, 1, stride, activation_layer=None
            )
        modules = []
        for i in range(blocks):
            first = i == 0
            modules.append(
                block(
                    self._in_channels if first else out_channels,
                    channels,
                    stride if first else 1,
                    downsample if first else None,
                    groups,
                    width_per_group,
                )
            )
        self._in_channels = out_channels
        return nn.Sequential(*modules)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock):
                    nn.init.zeros_(module.bn2.weight)
                elif isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, C, H / 32, W / 32), the output of the last stage."""
        if self.bn1.training:
            y = norm_act_max_pool(self.bn1, self.maxpool, self.conv1(x))
        else:
            y = self.maxpool(conv_norm_act(self.conv1, self.bn1, x))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            y = stage(y)
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
