"""The baseline: DenseNets built of stock torch.nn modules only.

Layers, concatenations, in-place ReLUs, checkpoints, names and shapes are torchvision's, so
``state_dict`` loads with ``strict=True`` in both directions. torchvision itself is not needed.

Source: Huang et al., "Densely Connected Convolutional Networks", arXiv:1608.06993.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# name -> (growth rate, layers of each block, channels of the stem)
CONFIGURATIONS: dict[str, tuple[int, tuple[int, ...], int]] = {
    "densenet121": (32, (6, 12, 24, 16), 64),
    "densenet161": (48, (6, 12, 36, 24), 96),
    "densenet169": (32, (6, 12, 32, 32), 64),
    "densenet201": (32, (6, 12, 48, 32), 64),
}
_BOTTLENECK = 4  # channels between the convolutions of a layer, in units of the growth rate


class _Layer(nn.Module):
    def __init__(self, in_channels: int, growth: int, memory_efficient: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, _BOTTLENECK * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(_BOTTLENECK * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(_BOTTLENECK * growth, growth, 3, padding=1, bias=False)
        self.memory_efficient = memory_efficient

    def _narrow(self, *features: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))

    def forward(self, features: list[Tensor]) -> Tensor:
        if self.memory_efficient and torch.is_grad_enabled():
            narrow = checkpoint(self._narrow, *features, use_reentrant=False)
        else:
            narrow = self._narrow(*features)
        return self.conv2(self.relu2(self.norm2(narrow)))


class _Block(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class _Transition(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class DenseNet(nn.Module):
    """A stock DenseNet for images of shape (N, 3, H, W)."""

    def __init__(self, name: str, num_classes: int = 1000, memory_efficient: bool = False) -> None:
        super().__init__()
        growth, depths, channels = CONFIGURATIONS[name]
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, channels, 7, 2, 3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(channels))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        for number, depth in enumerate(depths, 1):
            block = _Block()
            for i in range(1, depth + 1):
                block[f"denselayer{i}"] = _Layer(channels, growth, memory_efficient)
                channels += growth
            self.features.add_module(f"denseblock{number}", block)
            if number < len(depths):
                transition = _Transition(channels, channels // 2)
                self.features.add_module(f"transition{number}", transition)
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.features(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(y, 1).flatten(1))
