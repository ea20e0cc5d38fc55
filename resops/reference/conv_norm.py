"""A convolution with the batch norm after it: a layer of a residual block, as one argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .conv_bn_act import Size, conv_bn_act


class ConvNorm(NamedTuple):
    """A convolution and the batch norm after it: tensors and settings.

    The fields are arguments of :func:`resops.functional.conv_bn_act`, in its order.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    stride: Size = 1
    padding: Size | str = 0
    dilation: Size = 1
    groups: int = 1


def conv_norm_act(
    x: Tensor,
    layer: ConvNorm,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """act( norm( conv(x) ) [+ residual] )."""
    return conv_bn_act(x, *layer, residual, activation, negative_slope)
