"""The convolution of tensors side by side along the channels (a U-Net's skip connections), which
nobody concatenates where a kernel reads each of them where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import PLAIN_TENSORS, apply_function, traced_to_aten
from ..reference.conv_bn_act import Size
from ..reference.layout import is_channels_last_only
from . import convolution as phases
from . import convolution_table
from .conv_bn_act_convolution import (
    ConvolutionFunction,
    convolution,
    differentiable_backward,
    native_geometry,
    path_of,
)
from .conv_bn_act_convolution import Geometry as WinogradGeometry
from .conv_bn_act_phases import paddings_of, size_tuple
from .convolution import Geometry, Input


class Call(NamedTuple):
    """Whose kernels are asked for, and where: what :func:`convolution.choose` goes by."""

    geometry: Geometry
    backend: str
    wanted: str


class SlicesFunction(torch.autograd.Function):
    """y = conv( the slices side by side ) + bias, every phase by what is chosen for it.

    The slices are kept for the backward pass, and not their concatenation.
    """

    @staticmethod
    def forward(call: Call, weight: Tensor, bias: Tensor | None, *slices: Tensor) -> Tensor:
        return phases.forward(Input(slices), weight, bias, *call, False)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        call, weight, bias, *slices = inputs
        ctx.set_materialize_grads(False)
        kept = slices if ctx.needs_input_grad[1] else []
        ctx.save_for_backward(weight, bias, *kept)
        ctx.call, ctx.geometry = call, call.geometry.lists()
        ctx.channels = [t.size(1) for t in slices]
        ctx.sizes = Input(slices).size, list(weight.shape)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
        call: Call = ctx.call
        of_parameters = ctx.needs_input_grad[1:3]
        of_slices = any(ctx.needs_input_grad[3:])
        weight, bias, *slices = ctx.saved_tensors
        input = Input(slices or grad_y.new_empty(1).expand(ctx.sizes[0]))
        grad_x = grad_weight = grad_bias = None
        if torch.is_grad_enabled():  # create_graph=True
            x = input.x if slices else None
            weight = weight if of_slices else None
            grads = differentiable_backward(ctx, grad_y, x, weight, of_parameters)
            grad_x, grad_weight, grad_bias = grads
        else:
            grad_weight, grad_bias = phases.backward_weight(
                grad_y, input, weight, bias, *call, of_parameters
            )
            if of_slices:
                grad_x, _ = phases.backward_data(grad_y, input, weight, *call, None)
        none = [None] * len(ctx.channels)
        grads_of_slices = none if grad_x is None else grad_x.split(ctx.channels, 1)
        return None, grad_weight, grad_bias, *grads_of_slices


def convolution_of_slices(
    slices: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> Tensor:
    """:func:`conv_bn_act_convolution.convolution` of tensors side by side along the channels.

    Winograd's kernels on a CPU, and the kernels of a backend that was chosen by name where they
    were measured to be faster or :func:`convolution.convolutions` asks for them, read each of them
    where it is; for others they are concatenated.
    """
    first, *more = slices
    arguments = weight, bias, stride, padding, dilation, groups
    if _are_alike(slices):
        fused = _fused(slices, *arguments)
        if fused is not None:
            return fused
        native = _winograd_geometry(slices, *arguments)
        if native is not None:
            y: Tensor = apply_function(ConvolutionFunction, first, weight, bias, *native, *more)
            return y
    return convolution(torch.cat(list(slices), 1), *arguments)


def _are_alike(slices: Sequence[Tensor]) -> bool:
    """Whether these are plain images that differ in their channels only."""
    first = slices[0]
    return first.dim() == 4 and all(
        type(x) in PLAIN_TENSORS
        and (x.dtype, x.device, x.dim()) == (first.dtype, first.device, first.dim())
        and (x.shape[0], x.shape[2:]) == (first.shape[0], first.shape[2:])
        for x in slices
    )


def _fused(
    slices: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> Tensor | None:
    """The result where Triton's kernels are chosen for one of the phases at least; else None.

    A table's row compares them with the library's convolution and a pass for the statistics, which
    here are left to the norm. The library's concatenation makes up for that pass: it reads and
    writes the input, and the pass reads the output.
    """
    first = slices[0]
    # Of the native kernels only Winograd's take slices.
    if _dispatch.get_backend() != "triton" or traced_to_aten():
        return None
    pads = paddings_of(padding, tuple(weight.shape[2:]), size_tuple(dilation, 2))
    if pads is None or weight.dim() != 4 or any(t.numel() == 0 for t in slices):
        return None
    if not any(is_channels_last_only(t) for t in (*slices, weight)):
        return None  # the output may not be channels-last
    dtype = first.dtype
    if torch.is_autocast_enabled(first.device.type):
        dtype = torch.get_autocast_dtype(first.device.type)
        slices = [x.to(dtype) for x in slices]
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if any(t is not None and (t.dtype, t.device) != (dtype, first.device) for t in (weight, bias)):
        return None
    input = Input(slices)
    if input.size[1] != weight.size(1) * groups:
        return None
    geometry = Geometry(size_tuple(stride, 2), pads, size_tuple(dilation, 2), groups)
    call = Call(geometry, "triton", phases.wanted_convolutions())
    chosen = {
        phases.choose(phase, call.backend, call.wanted, slices, weight, geometry, False)
        for phase in convolution_table.PHASES
    }
    if chosen == {phases.LIBRARY}:
        return None
    y: Tensor = apply_function(SlicesFunction, call, weight, bias, *slices)
    return y


def _winograd_geometry(
    slices: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> WinogradGeometry | None:
    """Of a call that Winograd's kernels take; None where there are none, or a compiler decides."""
    if torch.compiler.is_compiling():
        return None
    first, channels = slices[0], Input(slices).size[1]
    native = native_geometry(first, weight, bias, stride, padding, dilation, groups, channels)
    if isinstance(native, str):
        return None
    path, _ = path_of(first, channels, weight, native, "forward")
    return native if path == "winograd" else None
