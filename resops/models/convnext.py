"""ConvNeXt (Liu, Mao, Wu, Feichtenhofer, Darrell and Xie, "A ConvNet for the 2020s", 2022).

The block (Figure 4, right): a depthwise 7x7 convolution, layer norm over the channels of a pixel,
two linear layers with GELU between them, a learned scale of each channel, and the shortcut. Modules
have torchvision's names: ``state_dict`` is the same, and so are the initial weights for a given
seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.residual_add import ResidualAdd
from ._features import Backbone, FeatureMap
from ._layers import check_image
from ._registry import register_model
from ._residual import Join, ResidualBlock, ResidualLayers


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return y.permute(0, 3, 1, 2)


class Permute(nn.Module):
    """``x.permute(dims)`` as a layer, with a place in torchvision's numbering."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class ConvNeXtBlock(ResidualBlock):
    """y = x + layer_scale * F(x).

    Args:
        channels: C.
        layer_scale: first value of the scale, of which there is one for each channel.
        drop_path_rate: in training, the probability with which the branch of a sample is left out.
        join: another join of branch and shortcut, in which the drop_path_rate is.
    """

    def __init__(
        self,
        channels: int,
        layer_scale: float = 1e-6,
        drop_path_rate: float = 0.0,
        join: Join | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(channels, eps=1e-6),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))
        self.join: Any = join or Join(ResidualAdd, (), {"drop_prob": drop_path_rate}, None)

    def branch(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """layer_scale * F(x)."""
        assert residual is None
        y: Tensor = self.layer_scale * self.block(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same size."""
        return self.joined(x, x)


class ConvNeXt(Backbone):
    """The network of Table 9: stages of blocks, a strided convolution before each of them.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage.
        num_classes: outputs of the classifier.
        in_chans: channels of the image.
        drop_path_rate: of the last block; it grows linearly from 0 at the first one.
        layer_scale: see :class:`ConvNeXtBlock`.
        residual: how branch and shortcut are joined, see :class:`ResidualLayers`; not "fixup",
            which goes without norms.
        features_only, out_indices: return the outputs of the stages in place of logits.

    Raises:
        ValueError: an unknown residual, or "fixup"; an index without feature map.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        layer_scale: float = 1e-6,
        residual: str = "sum",
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        features: list[nn.Module] = []
        joins = ResidualLayers(sum(depths), "layer", None, residual, drop_path_rate).joins(
            act=False
        )
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if stage == 0:
                stem = nn.Conv2d(in_chans, width, 4, stride=4)
                features.append(nn.Sequential(stem, LayerNorm2d(width, eps=1e-6)))
            else:
                before = widths[stage - 1]
                down = nn.Conv2d(before, width, 2, stride=2)
                features.append(nn.Sequential(LayerNorm2d(before, eps=1e-6), down))
            blocks = [
                ConvNeXtBlock(width, layer_scale, join=join)
                for join in itertools.islice(joins, depth)
            ]
            if residual == "shake_shake":
                for block in blocks:
                    block.add_branch(ConvNeXtBlock(width, layer_scale))
            features.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            LayerNorm2d(widths[-1], eps=1e-6), nn.Flatten(), nn.Linear(widths[-1], num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        self.feature_info = tuple(
            FeatureMap(f"features.{2 * i + 1}", width, 4 * 2**i) for i, width in enumerate(widths)
        )
        self.least_size = 4 * 2 ** (len(depths) - 1)
        if features_only:
            self.keep_features(out_indices)
            self.least_size = max(info.reduction for info in self.feature_info)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, C, H / 32, W / 32)."""
        check_image(x, self.in_chans, 2, self.least_size)
        return self.features(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Features to the logits, (N, num_classes)."""
        return self.classifier(self.avgpool(x))

    def forward_intermediates(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The outputs of the stages ``indices``."""
        check_image(x, self.in_chans, 2, self.least_size)
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i % 2:
                maps.append(x)
        return [maps[i] for i in indices]


@register_model
def convnext_tiny(num_classes: int = 1000, in_chans: int = 3, **kwargs: Any) -> ConvNeXt:
    """ConvNeXt-T. ``kwargs`` are those of :class:`ConvNeXt`."""
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), num_classes, in_chans, **kwargs)
