"""AlexNet: a sequential baseline (Krizhevsky, Sutskever and Hinton, "ImageNet Classification with
Deep Convolutional Neural Networks", 2012, in the form for one GPU of Krizhevsky, "One weird trick
for parallelizing convolutional neural networks", 2014, without response normalisation).

Modules have torchvision's names and ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._features import Backbone, FeatureMap
from ._layers import check_image
from ._registry import register_model
from .vgg import ConvActs


class AlexNet(Backbone):
    """Five convolutions and three linear layers.

    Args:
        num_classes: outputs of the classifier.
        in_chans: channels of the image.
        drop_rate: of the dropout before the first two linear layers.
        features_only, out_indices: return the outputs of the five convolutions, after their
            activation and, where it follows, max-pooling, in place of logits.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.features = ConvActs(
            nn.Conv2d(in_chans, 64, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(drop_rate),
            nn.Linear(256 * 36, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )
        rows = [(2, 64, 8), (5, 192, 16), (7, 384, 16), (9, 256, 16), (12, 256, 32)]
        self.feature_info = tuple(FeatureMap(f"features.{i}", c, r) for i, c, r in rows)
        if features_only:
            self.keep_features(out_indices)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W), of 63 rows and columns or more, to (N, 256, H / 32, W / 32)."""
        check_image(x, self.in_chans, 2, 63)
        return self.features(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Features to the logits, (N, num_classes)."""
        return self.classifier(torch.flatten(self.avgpool(x), 1))

    def forward_intermediates(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The outputs of the convolutions ``indices``."""
        check_image(x, self.in_chans, 2, 63)
        layers = list(self.features.children())
        maps, begin = [], 0
        for end in (3, 6, 8, 10, 13):
            x = ConvActs(*layers[begin:end])(x)
            maps.append(x)
            begin = end
            if end >= len(layers):
                break
        return [maps[i] for i in indices]


@register_model
def alexnet(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> AlexNet:
    """AlexNet. ``kwargs`` are those of :class:`AlexNet`."""
    return AlexNet(num_classes, in_chans, **kwargs)
