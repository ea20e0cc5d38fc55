"""Convolution, batch norm, residual and activation: the definition, in plain PyTorch.

    y = act( weight * (c - mean) * invstd + bias [+ residual] ),   c = conv(x) + conv_bias

x is (N, C_in, *spatial) with 1 to 3 spatial dimensions. With constant statistics the batch norm
is folded into the convolution by :func:`fold`; docs/math/conv_bn_act.md says when that is legal.

The phases of a convolution, which have the names and signatures that every backend gives its
kernels, do as much of batch norm as can be done while a tile of the convolution is on the chip:

* prologue: the input is a raw output of convolutions, and act( scale * x + shift ) is what is
  convolved, so that the normalised activation is never stored. Zero padding stays zero.
* epilogue: bias, residual and activation (evaluation); the statistics of the output (training); in
  the gradient of the input, the derivative of the prologue and the two sums of its batch norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import batch_norm as _batch_norm
from .activation import activate, activation_derivative

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


# ---- the phases ---------------------------------------------------------------------------------


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (x.dim() - 2))


def _argument(inputs: list[Tensor], scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """scale * x + shift, the argument of the prologue's activation."""
    x = _wide(inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1))
    if scale is None or shift is None:
        return x
    return x * _per_channel(scale, x) + _per_channel(shift, x)


def _convolved(
    inputs: list[Tensor],
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: str,
    prologue_slope: float,
) -> Tensor:
    """What is convolved: act( scale * x + shift ), rounded to the dtype of x."""
    z = _argument(inputs, scale, shift)
    return activate(z, prologue, prologue_slope).to(inputs[0].dtype)


def conv_bn_act_forward(
    inputs: list[Tensor],
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: str,
    prologue_slope: float,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act( conv( prologue( scale * x + shift ) ) + conv_bias [+ residual] ) and its statistics.

    Args:
        inputs: slices of x along the channels, of equal size otherwise, in the order in which they
            would be concatenated; usually one. A slice may be a part of the channels of a wider
            channels-last tensor.
        scale, shift: (C_in,) each, float32 (float64 for float64); None for an input that is
            convolved as it is, and then ``prologue`` is "identity".
        prologue, prologue_slope: the activation after them.
        conv_weight: (C, C_in, *kernel), in the dtype of x.
        conv_bias: (C,), in the dtype of x or float32.
        residual: like y.
        statistics: whether mean and var are computed; not with a residual or an activation.

    Returns:
        y, in the dtype of x; per-channel mean and biased variance of y, of the values rounded to
        that dtype, float32 (float64 for float64), (C,) each; empty without ``statistics``.
    """
    x = _convolved(inputs, scale, shift, prologue, prologue_slope)
    bias = None if conv_bias is None else _wide(conv_bias)
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    c = convolution(_wide(x), _wide(conv_weight), bias, *geometry, groups=1)
    if residual is not None:
        c = c + _wide(residual)
    y = activate(c, activation, negative_slope).to(x.dtype)
    if statistics:
        return y, *_batch_norm.batch_norm_statistics(y)
    empty = torch.empty(0, dtype=c.dtype, device=c.device)
    return y, empty, empty.clone()


def conv_bn_act_forward_into(
    inputs: list[Tensor],
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: str,
    prologue_slope: float,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    statistics: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """:func:`conv_bn_act_forward` with y written into ``out``, such as some channels of a wider
    tensor; mean and var."""
    y, mean, var = conv_bn_act_forward(
        inputs,
        scale,
        shift,
        prologue,
        prologue_slope,
        conv_weight,
        conv_bias,
        residual,
        activation,
        negative_slope,
        stride,
        padding,
        dilation,
        statistics,
    )
    out.copy_(y)
    return mean, var


def conv_bn_act_backward_data(
    grad_y: Tensor,
    conv_weight: Tensor,
    input_size: list[int],
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: str,
    prologue_slope: float,
    mean: Tensor | None,
    invstd: Tensor | None,
    addend: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of scale * x + shift, the argument of the prologue's activation.

        g = ( conv_transposed(grad_y) [+ addend] ) * prologue'( scale * x + shift )

    which without a prologue (``x`` None) is the gradient of the convolution's input; and, where
    ``mean`` and ``invstd`` are given, the sums that :func:`batch_norm_backward_reduce` returns.

    Args:
        grad_y: gradient of the convolution's output.
        input_size: size of g.
        x, scale, shift, prologue, prologue_slope: as in the forward pass, all slices in one tensor.
        mean, invstd: of the batch norm that the prologue stands for, (C_in,) each.
        addend: another gradient of the convolution's input, like g.

    Returns:
        g, in the dtype of grad_y; sum(g) and sum(g * (x - mean) * invstd) per channel, of the
        rounded g, float32 (float64 for float64), (C_in,) each; empty without ``mean``.
    """
    n = conv_weight.dim() - 2
    backward = torch.ops.aten.convolution_backward
    like = grad_y.new_empty([1]).expand(input_size)  # of which only the size is asked for
    wide = [_wide(t) for t in (grad_y, like, conv_weight)]
    geometry = (None, stride, padding, dilation, False, [0] * n, 1)
    g = backward(*wide, *geometry, [True, False, False])[0]
    if addend is not None:
        g = g + _wide(addend)
    if x is not None:
        z = _argument([x], scale, shift)
        derivative = activation_derivative(z, None, prologue, prologue_slope)
        if derivative is not None:
            g = g * derivative
    g = g.to(grad_y.dtype)
    if mean is None or invstd is None or x is None:
        empty = torch.empty(0, dtype=wide[0].dtype, device=g.device)
        return g, empty, empty.clone()
    dims = [0, *range(2, g.dim())]
    xhat = (_wide(x) - _per_channel(mean, x)) * _per_channel(invstd, x)
    return g, _wide(g).sum(dims), (_wide(g) * xhat).sum(dims)


def conv_bn_act_backward_weight(
    grad_y: Tensor,
    inputs: list[Tensor],
    scale: Tensor | None,
    shift: Tensor | None,
    prologue: str,
    prologue_slope: float,
    weight_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Gradient of conv_weight, in the dtype of grad_y; what was convolved is computed again.

    Args:
        weight_size: (C, C_in, *kernel).
        inputs, scale, shift, prologue, prologue_slope: as in the forward pass.
    """
    x = _convolved(inputs, scale, shift, prologue, prologue_slope)
    like = grad_y.new_empty([1]).expand(weight_size)
    wide = [_wide(t) for t in (grad_y, x, like)]
    geometry = (None, stride, padding, dilation, False, [0] * (len(weight_size) - 2), 1)
    g: Tensor = torch.ops.aten.convolution_backward(*wide, *geometry, [False, True, False])[1]
    return g.to(grad_y.dtype)


def conv_bn_act_folded(
    x: Tensor,
    conv_weight: Tensor,
    prepared: Tensor,
    conv_bias: Tensor,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    stride: list[int],
    padding: list[int],
) -> Tensor:
    """act( conv(x) + conv_bias [+ residual] ), the batch norm folded into weight and bias by
    :func:`fold`; a 3x3 convolution of stride 1 or a 1x1 one without padding.

    Args:
        prepared: the weight in the form in which a backend keeps it from call to call; not read
            here.
    """
    ones = [1, 1]
    none = (None, None, "identity", 0.0)
    return conv_bn_act_forward(
        [x],
        *none,
        conv_weight,
        conv_bias,
        residual,
        activation,
        negative_slope,
        stride,
        padding,
        ones,
        False,
    )[0]
