"""``bottleneck``: the block of three convolutions as one autograd Function."""

from __future__ import annotations

from torch import Tensor

from ..reference import bottleneck as reference
from ..reference.conv_norm import ConvNorm
from .residual_block import ResidualBlockFunction, residual_block


class BottleneckFunction(ResidualBlockFunction):
    """1x1, 3x3 and 1x1 convolution, or any other three."""


def bottleneck(
    x: Tensor,
    conv1: ConvNorm,
    conv2: ConvNorm,
    conv3: ConvNorm,
    shortcut: ConvNorm | None = None,
    *,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    recompute: bool = False,
) -> Tensor:
    """See :func:`resops.functional.bottleneck`."""
    return residual_block(
        BottleneckFunction,
        reference.bottleneck,
        "bottleneck",
        x,
        (conv1, conv2, conv3),
        shortcut,
        activation,
        negative_slope,
        recompute,
    )
