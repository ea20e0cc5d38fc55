"""Feature Pyramid Network (Lin, Dollár, Girshick, He, Hariharan and Belongie, "Feature Pyramid
Networks for Object Detection", 2017, Figure 3), with torchvision's modules and names.

The feature maps of a network, each through a 1x1 convolution, are added from coarse to fine, each
to the upsampled one before; a 3x3 convolution then makes each level of the pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..nn.conv_bn_act import Conv2dNormActivation
from ._registry import create_model, register_model


class FeaturePyramid(nn.Module):
    """The pyramid over given feature maps.

    Modules, ``state_dict`` and initial weights are those of torchvision's FeaturePyramidNetwork.

    Args:
        in_channels: of the maps, from fine to coarse.
        out_channels: of every level.
        extra_levels: coarser levels, each the one before with every second pixel (section 4.1).
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int = 256, extra_levels: int = 0
    ) -> None:
        super().__init__()
        self.extra_levels = extra_levels
        self.inner_blocks, self.layer_blocks = nn.ModuleList(), nn.ModuleList()
        plain: dict[str, Any] = {"norm_layer": None, "activation_layer": None}
        for channels in in_channels:
            self.inner_blocks.append(Conv2dNormActivation(channels, out_channels, 1, **plain))
            self.layer_blocks.append(Conv2dNormActivation(out_channels, out_channels, 3, **plain))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (N, C, H, W), from fine to coarse, to the levels, (N, out_channels, H, W)."""
        laterals = [block(x) for block, x in zip(self.inner_blocks, maps, strict=True)]
        y = laterals[-1]
        merged = [y]
        for lateral in reversed(laterals[:-1]):
            y = F.interpolate(y, size=lateral.shape[2:], mode="nearest")
            y = functional.residual_add(y, lateral)
            merged.insert(0, y)
        levels = [block(x) for block, x in zip(self.layer_blocks, merged, strict=True)]
        for _ in range(self.extra_levels):
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return levels


class FPN(nn.Module):
    """A network of :func:`resops.models.create_model`, and the pyramid over its feature maps.

    Args:
        backbone: name of the network; any one with ``features_only``.
        in_chans: channels of the image.
        out_channels: of every level.
        out_indices: which of the network's feature maps; the outputs of the four stages of a
            ResNet.
        extra_levels: coarser levels beyond those.
        kwargs: for the network.

    Shape: (N, in_chans, H, W) to a list of (N, out_channels, H / s, W / s), s = 4, 8, 16, 32 and,
        of one extra level, 64.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        in_chans: int = 3,
        out_channels: int = 256,
        out_indices: Sequence[int] = (1, 2, 3, 4),
        extra_levels: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        body: Any = create_model(
            backbone, in_chans=in_chans, features_only=True, out_indices=out_indices, **kwargs
        )
        self.body = body
        channels = [info.channels for info in body.feature_info]
        self.fpn = FeaturePyramid(channels, out_channels, extra_levels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_chans, H, W) to the levels of the pyramid, from fine to coarse."""
        return self.fpn(self.body(x))


@register_model
def fpn(backbone: str = "resnet50", in_chans: int = 3, **kwargs: Any) -> FPN:
    """A pyramid of five levels over a ResNet. ``kwargs`` are those of :class:`FPN`."""
    return FPN(backbone, in_chans, **kwargs)
