"""VGG (Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", 2015, Table 1), with and without batch norm: a sequential baseline.

Modules have torchvision's names and ``state_dict``.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.batch_norm import BatchNormAct2d
from ..nn.conv_bn_act import conv_norm_act
from ._features import Backbone, FeatureMap
from ._layers import check_image
from ._registry import register_model

# Convolutions between two max-poolings, of 64, 128, 256, 512 and 512 channels.
_DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


class ConvActs(nn.Sequential):
    """Convolutions with their norm or activation, and layers between them."""

    def conv_norms(self) -> list[tuple[nn.Module, nn.Module]]:
        """For :func:`resops.fold`."""
        return list(itertools.pairwise(self.children()))

    def forward(self, x: Tensor) -> Tensor:
        layers = iter(self._modules.values())
        for layer in layers:
            assert layer is not None
            if isinstance(layer, nn.Conv2d):
                x = conv_norm_act(layer, next(layers), x)
            else:
                x = layer(x)
        return x


class VGG(Backbone):
    """The network of Table 1.

    Args:
        depths: number of convolutions before each of the five max-poolings.
        num_classes: outputs of the classifier.
        in_chans: channels of the image.
        batch_norm: after each convolution.
        drop_rate: of the dropout after the first two linear layers.
        widths: channels of the convolutions before each max-pooling.
        features_only, out_indices: return what comes out of the max-poolings in place of logits.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        batch_norm: bool = False,
        drop_rate: float = 0.5,
        widths: Sequence[int] = WIDTHS,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        features = OrderedDict[str, nn.Module]()
        place, channels, maps = 0, in_chans, []
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for _ in range(depth):
                features[str(place)] = nn.Conv2d(channels, width, 3, padding=1)
                act = BatchNormAct2d(width) if batch_norm else nn.ReLU(inplace=True)
                features[str(place + 1)] = act
                place += 3 if batch_norm else 2  # torchvision's activation has a place of its own
                channels = width
            features[str(place)] = nn.MaxPool2d(2)
            maps.append(FeatureMap(f"features.{place}", width, 2 ** (stage + 1)))
            place += 1
        self.features = ConvActs(features)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(widths[-1] * 49, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            nn.Linear(4096, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)
        self.feature_info = tuple(maps)
        self.least_size = 2 ** len(depths)
        if features_only:
            self.keep_features(out_indices)
            self.least_size = max(info.reduction for info in self.feature_info)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, C, H / 32, W / 32)."""
        check_image(x, self.in_chans, 2, self.least_size)
        return self.features(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Features to the logits, (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(x), 1))

    def forward_intermediates(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """What comes out of the max-poolings ``indices``."""
        check_image(x, self.in_chans, 2, self.least_size)
        maps: list[Tensor] = []
        stage: list[nn.Module] = []
        for layer in self.features.children():
            stage.append(layer)
            if isinstance(layer, nn.MaxPool2d):
                x = ConvActs(*stage)(x)
                maps.append(x)
                stage = []
        return [maps[i] for i in indices]


@register_model
def vgg11(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> VGG:
    """VGG-11, column A of Table 1. ``kwargs`` are those of :class:`VGG`."""
    return VGG(_DEPTHS[11], num_classes, in_chans, **kwargs)


@register_model
def vgg11_bn(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> VGG:
    """VGG-11 with batch norm. ``kwargs`` are those of :class:`VGG`."""
    return VGG(_DEPTHS[11], num_classes, in_chans, batch_norm=True, **kwargs)


@register_model
def vgg13(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> VGG:
    """VGG-13, column B of Table 1. ``kwargs`` are those of :class:`VGG`."""
    return VGG(_DEPTHS[13], num_classes, in_chans, **kwargs)


@register_model
def vgg13_bn(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> VGG:
    """VGG-13 with batch norm. ``kwargs`` are those of :class:`VGG`."""
    return VGG(_DEPTHS[13], num_classes, in_chans, batch_norm=True, **kwargs)


@register_model
def vgg16(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> VGG:
    """VGG-16, column D of Table 1. ``kwargs`` are those of :class:`VGG`."""
    return VGG(_DEPTHS[16], num_classes, in_chans, **kwargs)


@register_model
def vgg16_bn(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> VGG:
    """VGG-16 with batch norm. ``kwargs`` are those of :class:`VGG`."""
    return VGG(_DEPTHS[16], num_classes, in_chans, batch_norm=True, **kwargs)


@register_model
def vgg19(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> VGG:
    """VGG-19, column E of Table 1. ``kwargs`` are those of :class:`VGG`."""
    return VGG(_DEPTHS[19], num_classes, in_chans, **kwargs)


@register_model
def vgg19_bn(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> VGG:
    """VGG-19 with batch norm. ``kwargs`` are those of :class:`VGG`."""
    return VGG(_DEPTHS[19], num_classes, in_chans, batch_norm=True, **kwargs)
