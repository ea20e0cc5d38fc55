"""``double_conv``: two convolutions with norms and activations as one autograd Function."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..reference import double_conv as reference
from ..reference.conv_norm import ConvNorm
from .residual_block import ResidualBlockFunction, residual_block


class DoubleConvFunction(ResidualBlockFunction):
    """Two convolutions without a shortcut; its output has a source (activation_source.py)."""


def double_conv(
    x: Tensor | Sequence[Tensor],
    conv1: ConvNorm,
    conv2: ConvNorm,
    *,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """See :func:`resops.functional.double_conv`."""
    return residual_block(
        DoubleConvFunction,
        reference.double_conv,
        "double_conv",
        x,
        (conv1, conv2),
        None,
        activation,
        negative_slope,
        residual=False,
    )
