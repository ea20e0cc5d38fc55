"""Convolution, batch norm, residual and activation: the definition, in plain PyTorch.

    y = act( weight * (c - mean) * invstd + bias [+ residual] ),   c = conv(x) + conv_bias

x is (N, C_in, *spatial) with 1 to 3 spatial dimensions. With constant statistics the batch norm
is folded into the convolution by :func:`fold`; docs/math/conv_bn_act.md says when that is legal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import batch_norm as _batch_norm

Size = int | tuple[int, ...]


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> Tensor:
    """F.conv1d, F.conv2d or F.conv3d; ``weight`` is (C, C_in / groups, *kernel)."""
    if not 3 <= weight.dim() <= 5:
        raise ValueError(
            "conv_bn_act expects a conv_weight of size (C, C_in / groups, *kernel) with 1 to 3 "
            f"kernel dimensions, but got size {list(weight.shape)}"
        )
    conv = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    return conv(x, weight, bias, stride, padding, dilation, groups)


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """The composition of PyTorch's own ops that the fused op replaces."""
    c = convolution(x, conv_weight, conv_bias, stride, padding, dilation, groups)
    return _batch_norm.batch_norm(
        c,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        activation,
        negative_slope,
    )


def fold(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that does the work of convolution and batch norm.

    With a = weight / sqrt(running_var + eps), per output channel:
    conv_weight * a and bias + (conv_bias - running_mean) * a. Absent, weight is 1 and a bias 0.

    Returns:
        both in float32, float64 for float64; the weight in ``conv_weight``'s memory layout.
    """
    wide = torch.promote_types(conv_weight.dtype, torch.float32)
    scale = torch.rsqrt(running_var.to(wide) + eps)
    if weight is not None:
        scale = scale * weight.to(wide)
    shift = -running_mean.to(wide) if conv_bias is None else conv_bias.to(wide) - running_mean
    shift = shift * scale
    if bias is not None:
        shift = shift + bias.to(wide)
    per_filter = scale.view(-1, *[1] * (conv_weight.dim() - 1))
    return conv_weight.to(wide) * per_filter, shift
