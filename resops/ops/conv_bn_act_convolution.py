"""The convolution of conv_bn_act alone, by the native kernels where those are faster.

3x3 convolutions of stride 1 and 1x1 ones in float32, channels-last, on a CPU: forward, gradient of
the input and gradient of the weight each take the algorithm that was measured to be the fastest
(csrc/cpu/conv_path.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, _native, _precision
from .._autograd import PLAIN_TENSORS, apply_function, traced_to_aten
from ..reference.conv_bn_act import Size
from ..reference.conv_bn_act import convolution as library_convolution
from ..reference.layout import is_channels_last_only
from .conv_bn_act_phases import output_size, paddings_of, size_tuple

_PLAIN = (None, None, "identity", 0.0)  # no prologue
# Fewer channels leave most lanes of Winograd's transforms idle.
_LEAST_CHANNELS = 16


class ConvolutionFunction(torch.autograd.Function):
    """y = conv(x) + bias; x and the weight are kept for the backward pass.

    ``more`` are further channels of x, which are side by side for the kernels only.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        *more: Tensor,
    ) -> Tensor:
        slices = [x, *more]
        settings = (None, "identity", 0.0, stride, padding, (1, 1), False)
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.resops.conv_bn_act_forward(
                slices, *_PLAIN, weight, bias, *settings
            )[0]
            return y
        # A result that is made as a view of another could not be overwritten, as an activation in
        # place does: here views are not recorded.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            y = torch.ops.resops.conv_bn_act_forward(slices, *_PLAIN, weight, bias, *settings)[0]
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, stride, padding, *more = inputs
        slices = [x, *more]
        of_x, of_weight, *_ = ctx.needs_input_grad
        of_x = of_x or any(ctx.needs_input_grad[5:])
        kept = slices if of_weight else []
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight if of_x else None, *kept)
        ctx.channels = [t.size(1) for t in slices]
        ctx.sizes = (x.size(0), sum(ctx.channels), *x.shape[2:]), weight.shape
        ctx.geometry = (stride, padding, (1, 1))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        _, need_weight, need_bias, *_ = ctx.needs_input_grad
        weight, *slices = ctx.saved_tensors
        if torch.is_grad_enabled():
            x = torch.cat(slices, 1) if len(slices) > 1 else slices[0] if slices else None
            of_parameters = need_weight, need_bias
            grads = differentiable_backward(ctx, grad_y, x, weight, of_parameters)
            grad_x, grad_weight, grad_bias = grads
        else:
            input_size, weight_size = ctx.sizes
            ops, geometry = torch.ops.resops, ctx.geometry
            grad_x = grad_weight = grad_bias = None
            if weight is not None:
                grad_x = ops.conv_bn_act_backward_data(
                    grad_y, weight, input_size, None, *_PLAIN, None, None, None, *geometry
                )[0]
            if need_weight:
                grad_weight = ops.conv_bn_act_backward_weight(
                    grad_y, slices, *_PLAIN, weight_size, *geometry
                )
            if need_bias:
                grad_bias = grad_y.sum((0, 2, 3))
        if len(ctx.channels) == 1:
            return grad_x, grad_weight, grad_bias, None, None
        none = [None] * len(ctx.channels)
        first, *more = none if grad_x is None else grad_x.split(ctx.channels, 1)
        return first, grad_weight, grad_bias, None, None, *more


def differentiable_backward(
    ctx: Any, grad_y: Tensor, x: Tensor | None, weight: Tensor | None, of_parameters: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same by PyTorch's own op, of which only the size of what was not kept is asked for.

    Args:
        ctx: with the sizes of input and weight, and stride, padding and dilation.
        weight: None where no gradient of the input is needed.
        of_parameters: whether those of weight and bias are.
    """
    input_size, weight_size = ctx.sizes
    return torch.ops.aten.convolution_backward(
        grad_y,
        grad_y.new_empty(1).expand(input_size) if x is None else x,
        grad_y.new_empty(1).expand(weight_size) if weight is None else weight,
        [weight_size[0]],
        *ctx.geometry,
        False,
        (0, 0),
        1,
        [weight is not None, *of_parameters],
    )


Geometry = tuple[tuple[int, ...], tuple[int, ...]]  # stride and padding


def native_geometry(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    channels: int | None = None,
) -> Geometry | str:
    """Of a call that the native convolution takes; else why it does not.

    Args:
        channels: of the input, where ``x`` has some of them only.
    """
    channels = x.size(1) if channels is None and x.dim() == 4 else channels
    plain = type(x) in PLAIN_TENSORS and type(weight) in PLAIN_TENSORS
    if not plain or x.device.type != "cpu" or x.dtype != torch.float32:
        return "only plain float32 tensors on a CPU have native convolutions"
    # Before sizes are compared and ops called that such a transformation does not know.
    if traced_to_aten():
        return "something records this call that knows PyTorch's own ops only"
    if _dispatch.get_backend() not in ("auto", "native"):
        return f"the backend {_dispatch.get_backend()!r} was chosen"
    if (refused := _dispatch.refusal("native", "conv_bn_act", x)) is not None:
        return refused
    if x.dim() != 4 or weight.dim() != 4 or groups != 1 or channels != weight.size(1):
        return "only 2-D convolutions of one group have native kernels"
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return "the tensors have several dtypes"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if x.numel() == 0:
        return "there are no elements"
    if not (is_channels_last_only(x) or is_channels_last_only(weight)):
        return "neither the input nor the weight is channels-last, so the output may not be"
    kernel = tuple(weight.shape[2:])
    steps, gaps = size_tuple(stride, 2), size_tuple(dilation, 2)
    if gaps != (1, 1):
        return "the dilation is not 1"
    pads = paddings_of(padding, kernel, gaps)
    if pads is None or len(pads) != 2 or len(steps) != 2:
        return "the two ends of a dimension are not padded alike"
    if kernel == (3, 3):
        reason = _refuses_3x3(x, weight, steps, pads)
    elif kernel == (1, 1):
        reason = _refuses_1x1(steps, pads)
    else:
        reason = "the kernel is neither 3x3 nor 1x1"
    return reason or (steps, pads)


def _refuses_3x3(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], pads: tuple[int, ...]
) -> str | None:
    if stride != (1, 1):
        return "the stride is not 1"
    if not 0 <= min(pads) <= max(pads) <= 2:
        return "the padding is more than 2"
    if min(x.shape[2:]) < 3 or min(weight.shape[:2]) < _LEAST_CHANNELS:
        return "there are fewer than 3 rows or columns, or than 16 channels"
    if _precision.get_conv_precision() == "highest":
        return "the convolution precision is highest"
    return None


def _refuses_1x1(stride: tuple[int, ...], pads: tuple[int, ...]) -> str | None:
    if pads != (0, 0) or stride not in ((1, 1), (2, 2)):
        return "the padding is not 0, or the stride neither 1 nor 2"
    return None


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> Tensor:
    """:func:`resops.reference.conv_bn_act.convolution`, natively where that is faster."""
    native = native_geometry(x, weight, bias, stride, padding, dilation, groups)
    if isinstance(native, str):
        return library_convolution(x, weight, bias, stride, padding, dilation, groups)
    y: Tensor = apply_function(ConvolutionFunction, x, weight, bias, *native)
    return y


def convolution_path(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    direction: str = "forward",
) -> tuple[str, str]:
    """What computes a phase of :func:`convolution` under the present setting, and why.

    Args:
        direction: "forward", "backward_data" or "backward_weight".

    Returns:
        "winograd", "matrix_product", "transposed_product" (a product whose result is transposed),
        "onednn" (oneDNN's where PyTorch would take something else) or "library" (PyTorch's own
        convolution), and the reason.
    """
    native = native_geometry(x, weight, bias, stride, padding, dilation, groups)
    if isinstance(native, str):
        return "library", native
    return path_of(x, x.size(1), weight, native, direction)


def path_of(
    x: Tensor, channels: int, weight: Tensor, geometry: Geometry, direction: str
) -> tuple[str, str]:
    """What computes a phase of a native convolution of so many channels, and why."""
    assert _native.module is not None
    steps, pads = (list(size) for size in geometry)
    sizes = [x.size(0), channels, *x.shape[2:]], list(weight.shape)
    path: tuple[str, str] = _native.module.conv_path(
        direction,
        str(x.dtype).removeprefix("torch."),
        sizes[0],
        output_size(*sizes, steps, pads, [1, 1]),
        sizes[1],
        steps,
        pads,
        [1, 1],
    )
    return path
