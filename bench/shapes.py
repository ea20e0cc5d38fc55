"""The BatchNorm layers of the benchmarked networks, for images of 224x224.

``RESNET50`` is written out so that it can be read; tests/bench compares it with what
:func:`trace_batch_norms` sees when the stock model runs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, order=True)
class BatchNormShape:
    """A BatchNorm and what follows it: input (N, channels, height, width).

    ``residual``: a tensor is added after the norm; ``relu``: a ReLU comes last.
    """

    channels: int
    height: int
    width: int
    residual: bool
    relu: bool

    @property
    def label(self) -> str:
        parts = ["bn"] + ["add"] * self.residual + ["relu"] * self.relu
        return f"{self.channels}x{self.height}x{self.width} {'+'.join(parts)}"

    @property
    def elements_per_image(self) -> int:
        return self.channels * self.height * self.width


def _bn(channels: int, size: int, tail: str) -> BatchNormShape:
    return BatchNormShape(channels, size, size, "add" in tail, "relu" in tail)


# shape -> how many layers have it: 53 in all, in the order of the network
RESNET50: dict[BatchNormShape, int] = {
    _bn(64, 112, "relu"): 1,
    _bn(64, 56, "relu"): 6,
    _bn(256, 56, "add relu"): 3,
    _bn(256, 56, ""): 1,
    _bn(128, 56, "relu"): 1,
    _bn(128, 28, "relu"): 7,
    _bn(512, 28, "add relu"): 4,
    _bn(512, 28, ""): 1,
    _bn(256, 28, "relu"): 1,
    _bn(256, 14, "relu"): 11,
    _bn(1024, 14, "add relu"): 6,
    _bn(1024, 14, ""): 1,
    _bn(512, 14, "relu"): 1,
    _bn(512, 7, "relu"): 5,
    _bn(2048, 7, "add relu"): 3,
    _bn(2048, 7, ""): 1,
}

# Every size of these with and without a residual before the ReLU, and what else the network has.
VARIANTS = tuple(
    {
        replace(shape, residual=residual, relu=True): 1
        for shape in RESNET50
        for residual in (False, True)
    }
    | RESNET50
)


def _densenet(layers: tuple[int, ...], growth: int = 32, size: int = 56) -> Counter[BatchNormShape]:
    """Of a DenseNet for images of 224x224 (Huang et al., 2017, Table 1)."""
    found = Counter({_bn(64, 112, "relu"): 1})
    channels = 64
    for number, count in enumerate(layers):
        for _ in range(count):
            found[_bn(channels, size, "relu")] += 1
            found[_bn(4 * growth, size, "relu")] += 1
            channels += growth
        last = number == len(layers) - 1
        found[_bn(channels, size, "relu")] += 1
        if not last:
            channels, size = channels // 2, size // 2
    return found


DENSENET121 = _densenet((6, 12, 24, 16))

# Timed at a size beyond the caches, against the bandwidth limit; the others only in full sweeps.
BANDWIDTH_SHAPES = (_bn(64, 56, "relu"), _bn(256, 56, "add relu"))


def trace_batch_norms(model: nn.Module, image_size: int = 224) -> Counter[BatchNormShape]:
    """What the BatchNorms of ``model`` see for RGB images, counted by running it on no data.

    The model is moved to the meta device. A sum is recognised by the in-place addition that stock
    ResNets use, a ReLU by its module.
    """
    pending: list[tuple[Tensor, int]] = []  # output of a norm, its version then
    found: Counter[BatchNormShape] = Counter()

    def count(output: Tensor, version: int, relu: bool) -> None:
        _, channels, height, width = output.shape
        found[BatchNormShape(channels, height, width, output._version > version, relu)] += 1

    def after_norm(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        pending.append((output, output._version))

    def before_relu(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        for index, (output, version) in enumerate(pending):
            if output is args[0]:
                count(output, version, relu=True)
                del pending[index]
                return

    handles = []
    for module in model.to("meta").train().modules():
        if isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_hook(after_norm))
        elif isinstance(module, nn.ReLU):
            handles.append(module.register_forward_pre_hook(before_relu))
    try:
        with torch.no_grad():
            model(torch.empty(2, 3, image_size, image_size, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    for output, version in pending:
        count(output, version, relu=False)
    return found
