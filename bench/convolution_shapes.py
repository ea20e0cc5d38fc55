"""The convolutions of ResNet-50 and DenseNet-121 for images of 224x224, from the papers' tables.

tests/bench compares the lists with what the stock networks run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class ConvolutionShape:
    """A square convolution of (N, channels_in, size, size), padded by half its kernel.

    ``prologue``: its input is a raw output of convolutions, whose batch norm and ReLU come first.
    """

    channels_in: int
    channels: int
    kernel: int
    stride: int
    size: int
    prologue: bool

    @property
    def label(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        before = " after bn+relu" if self.prologue else ""
        side = f"{self.kernel}x{self.kernel}{stride}"
        return f"{self.channels_in}x{self.size}x{self.size} {side} {self.channels}{before}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def output_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def flops(self, batch: int) -> int:
        """Two for each multiplication; the same for both gradients."""
        terms = self.channels_in * self.kernel**2
        return 2 * batch * self.channels * self.output_size**2 * terms


def resnet50() -> Counter[ConvolutionShape]:
    """How many layers have each shape (He et al., 2015, Table 1, the stride in the 3x3)."""
    found = Counter([ConvolutionShape(3, 64, 7, 2, 224, prologue=False)])
    channels, size = 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            found[ConvolutionShape(channels, width, 1, 1, size, prologue=False)] += 1
            if block == 0:
                found[ConvolutionShape(channels, 4 * width, 1, stride, size, prologue=False)] += 1
            found[ConvolutionShape(width, width, 3, stride, size, prologue=True)] += 1
            size //= stride
            found[ConvolutionShape(width, 4 * width, 1, 1, size, prologue=True)] += 1
            channels = 4 * width
    return found


def densenet121() -> Counter[ConvolutionShape]:
    """How many layers have each shape (Huang et al., "Densely Connected Convolutional Networks",
    2017, Table 1, growth rate 32)."""
    found = Counter([ConvolutionShape(3, 64, 7, 2, 224, prologue=False)])
    channels, size, growth = 64, 56, 32
    for stage, layers in enumerate((6, 12, 24, 16)):
        for _ in range(layers):
            found[ConvolutionShape(channels, 4 * growth, 1, 1, size, prologue=True)] += 1
            found[ConvolutionShape(4 * growth, growth, 3, 1, size, prologue=True)] += 1
            channels += growth
        if stage < 3:
            found[ConvolutionShape(channels, channels // 2, 1, 1, size, prologue=True)] += 1
            channels, size = channels // 2, size // 2
    return found


NETWORKS = {"resnet50": resnet50, "densenet121": densenet121}
