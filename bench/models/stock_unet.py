"""The baseline: the padded U-Net built of stock torch.nn modules only.

Names and shapes are those of the implementation that most people use (milesial/Pytorch-UNet), so
``state_dict`` loads with ``strict=True`` in both directions.

Source: Ronneberger, Fischer and Brox, arXiv:1505.04597.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 1024)


class _DoubleConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            ]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.double_conv(x)
        return y


class _Down(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        conv = _DoubleConv(in_channels, out_channels)
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), conv)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.maxpool_conv(x)
        return y


class _Up(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, 2)
        self.conv = _DoubleConv(in_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y: Tensor = self.conv(torch.cat([skip, self.up(x)], 1))
        return y


class StockUNet(nn.Module):
    """For images whose sides are multiples of 16."""

    def __init__(self, num_classes: int = 2, in_chans: int = 3) -> None:
        super().__init__()
        self.inc = _DoubleConv(in_chans, WIDTHS[0])
        levels = range(1, len(WIDTHS))
        self.downs = [f"down{i}" for i in levels]
        self.ups = [f"up{i}" for i in levels]
        for i, name in enumerate(self.downs):
            self.add_module(name, _Down(WIDTHS[i], WIDTHS[i + 1]))
        for i, name in enumerate(self.ups):
            self.add_module(name, _Up(WIDTHS[-1 - i], WIDTHS[-2 - i]))
        conv = nn.Conv2d(WIDTHS[0], num_classes, 1)
        self.outc = nn.Sequential(OrderedDict(conv=conv))

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.inc(x)]
        for name in self.downs:
            skips.append(getattr(self, name)(skips[-1]))
        x = skips.pop()
        for name in self.ups:
            x = getattr(self, name)(x, skips.pop())
        y: Tensor = self.outc(x)
        return y
