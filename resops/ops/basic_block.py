"""``basic_block``: the block of two convolutions as one autograd Function."""

from __future__ import annotations

from torch import Tensor

from ..reference import basic_block as reference
from ..reference.conv_norm import ConvNorm
from .residual_block import ResidualBlockFunction, residual_block


class BasicBlockFunction(ResidualBlockFunction):
    """Two 3x3 convolutions, or any other two."""


def basic_block(
    x: Tensor,
    conv1: ConvNorm,
    conv2: ConvNorm,
    shortcut: ConvNorm | None = None,
    *,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    recompute: bool = False,
) -> Tensor:
    """See :func:`resops.functional.basic_block`."""
    return residual_block(
        BasicBlockFunction,
        reference.basic_block,
        "basic_block",
        x,
        (conv1, conv2),
        shortcut,
        activation,
        negative_slope,
        recompute,
    )
