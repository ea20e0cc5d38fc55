"""Densely connected networks (Huang, Liu, van der Maaten and Weinberger, "Densely Connected
Convolutional Networks", 2017, Table 1 and section 4: DenseNet-BC).

A dense block and the transition behind it are one op, which keeps the channels of a block in one
buffer and saves little more than that for the backward pass (docs/math/dense_block.md). Modules
have torchvision's names: ``state_dict`` is the same, and so are the initial weights for a given
seed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.batch_norm import BatchNormAct2d, is_plain
from ..nn.batch_norm_act_max_pool import norm_act_max_pool
from ..nn.conv_bn_act import conv_norm_act, convolve
from ..nn.dense_block import Pair, dense_block
from ._features import Backbone, FeatureMap
from ._registry import register_model

_FORMER_KEY = re.compile(r"(norm|conv)\.([12])\.")


class DenseLayer(nn.Module):
    """conv2( relu( norm2( conv1( relu( norm1(x) ) ) ) ) ), with dropout behind it."""

    def __init__(self, in_channels: int, growth_rate: int, bn_size: int, drop_rate: float) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = BatchNormAct2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm2 = BatchNormAct2d(width)
        self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def pairs(self) -> tuple[Pair, Pair]:
        """Norms and convolutions."""
        return (self.norm1, self.conv1), (self.norm2, self.conv2)

    def conv_norms(self) -> list[tuple[Any, Any]]:
        """For :func:`resops.fold`."""
        return [(self.conv1, self.norm2)]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) of all features so far to (N, growth_rate, H, W)."""
        y = conv_norm_act(self.conv1, self.norm2, self.norm1(x))
        y = convolve(self.conv2, y)
        return F.dropout(y, self.drop_rate, self.training) if self.drop_rate > 0 else y

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Also takes the keys of torchvision's older checkpoints: "norm.1.weight"."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = _FORMER_KEY.sub(r"\1\2.", key.removeprefix(prefix), count=1)
            state_dict[prefix + name] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Transition(nn.Sequential):
    """Average pool 2x2 of conv( relu( norm(x) ) ): halves resolution and channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = BatchNormAct2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class DenseBlock(nn.ModuleDict):
    """Layers, each of which reads all features so far and adds ``growth_rate`` channels.

    Attributes:
        memory_efficient: as one op; else layer by layer, with concatenations between them.
    """

    def __init__(
        self,
        layers: int,
        in_channels: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        memory_efficient: bool,
    ) -> None:
        super().__init__()
        self.memory_efficient = memory_efficient
        for i in range(layers):
            layer = DenseLayer(in_channels + i * growth_rate, growth_rate, bn_size, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def as_op(self, x: Tensor, transition: nn.Module | None) -> Tensor | None:
        """The block, and what is behind it, as one op; None where that would not be the same."""
        layers = [layer for layer in self.values() if type(layer) is DenseLayer]
        complete = type(self) is DenseBlock and len(layers) == len(self)
        modules = [self, *layers] if transition is None else [self, transition, *layers]
        if not (self.memory_efficient and complete and all(is_plain(m) for m in modules)):
            return None
        rates = {layer.drop_rate if layer.training else 0.0 for layer in layers}
        if len(rates) != 1:
            return None
        last = None
        if transition is not None:
            children = [m for m in transition._modules.values() if m is not None]
            if type(transition) is not Transition or len(children) != 3:
                return None
            norm, conv, pool = children
            last = (norm, conv, pool)
        pairs = [layer.pairs() for layer in layers]
        return dense_block(pairs, last, x, drop_rate=rates.pop())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C and the new channels, H, W)."""
        y = self.as_op(x, None)
        if y is not None:
            return y
        features = [x]
        for layer in self.values():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Features(nn.Sequential):
    """The network without its classifier: stem, blocks, transitions and the last norm."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, C, H / 32, W / 32)."""
        y = self.stem(x)
        modules = list(self.children())[len(self._stem()) :]
        while modules:
            module = modules.pop(0)
            joined = None
            following = modules[0] if modules else None
            if isinstance(module, DenseBlock) and isinstance(following, Transition):
                joined = module.as_op(y, following)
            if joined is None:
                y = module(y)
            else:
                y = joined
                modules.pop(0)
        return y

    def _stem(self) -> dict[str, nn.Module]:
        found = {name: self._modules.get(name) for name in ("conv0", "norm0", "pool0")}
        return {name: module for name, module in found.items() if module is not None}

    def conv_norms(self) -> list[tuple[Any, Any]]:
        """For :func:`resops.fold`."""
        stem = self._stem()
        return [(stem["conv0"], stem["norm0"])] if "norm0" in stem else []

    def stem(self, x: Tensor) -> Tensor:
        """The first convolution; norm, ReLU and max-pool, where there are."""
        stem = self._stem()
        if "norm0" not in stem:
            y: Tensor = stem["conv0"](x)
            return y
        conv, norm, pool = stem.values()
        if norm.training:
            return norm_act_max_pool(norm, pool, conv(x))
        y = pool(conv_norm_act(conv, norm, x))
        return y

    def stages(self, x: Tensor) -> list[Tensor]:
        """What is computed at each resolution: before the max-pool, of every block, of the last
        norm in place of the last block."""
        stem = self._stem()
        y = x
        for name, module in stem.items():
            if name != "pool0":
                y = module(y)
        found = [y] if "norm0" in stem else []
        if "pool0" in stem:
            y = stem["pool0"](y)
        for module in list(self.children())[len(stem) :]:
            y = module(y)
            if isinstance(module, DenseBlock):
                found.append(y)
        return [*found[:-1], y]


class DenseNet(Backbone):
    """The networks of Table 1: a stem, dense blocks with transitions between them, a classifier.

    Args:
        growth_rate: channels that a layer adds, k.
        block_config: number of layers in each block.
        num_init_features: channels of the first convolution.
        bn_size: channels between the convolutions of a layer, in units of ``growth_rate``.
        drop_rate: of dropout behind each layer.
        num_classes: outputs of the classifier.
        memory_efficient: a block is one op, which keeps one buffer per block, the raw outputs of
            the 1x1 convolutions and statistics for the backward pass. Without it blocks run layer
            by layer, as they do where modules were replaced or have hooks. ``state_dict`` is the
            same.
        in_chans: channels of the image.
        small_images: no pool and no stride in the stem, for images of 32x32 (section 4.2).
        features_only, out_indices: return the features at each resolution in place of logits: 0
            for the stem's, where it halves the resolution, then the blocks', the last one's behind
            its norm; None for all.

    Raises:
        ValueError: an index without feature map.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: tuple[int, ...] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = True,
        in_chans: int = 3,
        small_images: bool = False,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.feature_info = ()
        self.features = Features()
        channels, reduction = num_init_features, 1
        if small_images:
            self._add("conv0", nn.Conv2d(in_chans, channels, 3, padding=1, bias=False))
        else:
            self._add("conv0", nn.Conv2d(in_chans, channels, 7, stride=2, padding=3, bias=False))
            self._add("norm0", BatchNormAct2d(channels), channels, 2)
            self._add("pool0", nn.MaxPool2d(3, stride=2, padding=1))
            reduction = 4
        for number, layers in enumerate(block_config, 1):
            options = (growth_rate, bn_size, drop_rate, memory_efficient)
            block = DenseBlock(layers, channels, *options)
            channels += layers * growth_rate
            last = number == len(block_config)
            self._add(f"denseblock{number}", block, 0 if last else channels, reduction)
            if not last:
                self._add(f"transition{number}", Transition(channels, channels // 2))
                channels, reduction = channels // 2, 2 * reduction
        norm = BatchNormAct2d(channels)
        self._add(f"norm{len(block_config) + 1}", norm, channels, reduction)
        self.classifier = nn.Linear(channels, num_classes)
        self._initialise()
        if features_only:
            self.keep_features(out_indices)

    def _add(self, name: str, module: nn.Module, channels: int = 0, reduction: int = 0) -> None:
        """A part of ``features``; with channels, one whose output is a feature map."""
        self.features.add_module(name, module)
        if channels:
            self.feature_info += (FeatureMap(f"features.{name}", channels, reduction),)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, C, H / 32, W / 32), behind the last norm and ReLU."""
        y: Tensor = self.features(x)
        return y

    def forward_head(self, x: Tensor) -> Tensor:
        """Features to the logits, (N, num_classes)."""
        y = F.adaptive_avg_pool2d(x, 1)
        logits: Tensor = self.classifier(torch.flatten(y, 1))
        return logits

    def forward_intermediates(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps with these indices of the whole network's ``feature_info``."""
        maps = self.features.stages(x)
        return [maps[i] for i in indices]


@register_model
def densenet121(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> DenseNet:
    """DenseNet-121. ``kwargs`` are those of :class:`DenseNet`."""
    return DenseNet(32, (6, 12, 24, 16), 64, num_classes=num_classes, in_chans=in_chans, **kwargs)


@register_model
def densenet161(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> DenseNet:
    """DenseNet-161, with 48 channels a layer. ``kwargs`` are those of :class:`DenseNet`."""
    return DenseNet(48, (6, 12, 36, 24), 96, num_classes=num_classes, in_chans=in_chans, **kwargs)


@register_model
def densenet169(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> DenseNet:
    """DenseNet-169. ``kwargs`` are those of :class:`DenseNet`."""
    return DenseNet(32, (6, 12, 32, 32), 64, num_classes=num_classes, in_chans=in_chans, **kwargs)


@register_model
def densenet201(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> DenseNet:
    """DenseNet-201. ``kwargs`` are those of :class:`DenseNet`."""
    return DenseNet(32, (6, 12, 48, 32), 64, num_classes=num_classes, in_chans=in_chans, **kwargs)


def _for_small_images(layers: int, num_classes: int, in_chans: int, **kwargs: Any) -> DenseNet:
    """DenseNet-BC of section 4.2 with three blocks of so many layers, k = 12."""
    settings = {"growth_rate": 12, "num_init_features": 24, "small_images": True, **kwargs}
    config = (layers, layers, layers)
    return DenseNet(block_config=config, num_classes=num_classes, in_chans=in_chans, **settings)


@register_model
def densenet_bc_40(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> DenseNet:
    """DenseNet-BC for images of 32x32, L = 40, k = 12."""
    return _for_small_images(6, num_classes, in_chans, **kwargs)


@register_model
def densenet_bc_100(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> DenseNet:
    """DenseNet-BC for images of 32x32, L = 100, k = 12 (Table 2)."""
    return _for_small_images(16, num_classes, in_chans, **kwargs)
