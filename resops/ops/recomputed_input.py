"""Ops of PyTorch on the output of a block, which keep its source instead of it
(:mod:`resops.ops.activation_source`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .activation_source import Kept, Source, restored

_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)


class Convolution(NamedTuple):
    """Settings of a convolution, as ``aten::convolution`` takes them."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class MaxPool(NamedTuple):
    """Settings of a max pooling, as ``aten::max_pool2d`` takes them."""

    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    ceil_mode: bool


class ConvolutionFunction(torch.autograd.Function):
    """Saved: the source of x, the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Convolution,
        source: Source,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        input = Kept.of([x], [source])
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.recipes, ctx.bias_size = settings, input.recipes, [weight.size(0)]
        if bias is not None:
            ctx.bias_size = [bias.numel()]
        ctx.save_for_backward(weight, *input.tensors)
        return torch.ops.aten.convolution(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 5
        weight, *rest = ctx.saved_tensors
        (x,) = restored(ctx.recipes, rest)
        mask = list(ctx.needs_input_grad[2:])
        backward = torch.ops.aten.convolution_backward
        return (None, None, *backward(grad_y, x, weight, ctx.bias_size, *ctx.settings, mask))


class MaxPoolFunction(torch.autograd.Function):
    """Saved: the source of x. Where the largest values stand is found again."""

    @staticmethod
    def forward(ctx: Any, settings: MaxPool, source: Source, x: Tensor) -> Tensor:
        input = Kept.of([x], [source])
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.recipes, ctx.dimensions = settings, input.recipes, x.dim() - 2
        ctx.save_for_backward(*input.tensors)
        y: Tensor = _max_pool(ctx.dimensions, "")(x, *settings)[0]
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 3
        (x,) = restored(ctx.recipes, list(ctx.saved_tensors))
        settings, n = ctx.settings, ctx.dimensions
        with torch.no_grad():
            indices = _max_pool(n, "")(x, *settings)[1]
        return None, None, _max_pool(n, "_backward")(grad_y, x, *settings, indices)


def _max_pool(dimensions: int, phase: str) -> Any:
    return getattr(torch.ops.aten, f"max_pool{dimensions}d_with_indices{phase}")


def convolution(
    source: Source, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Convolution
) -> Tensor:
    """A convolution, or a transposed one, of ``x``, which is kept as ``source``."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)

        def cast(t: Any) -> Any:
            return t.to(dtype) if t is not None and t.dtype in _CASTABLE else t

        x, weight, bias = cast(x), cast(weight), cast(bias)
    y: Tensor = ConvolutionFunction.apply(settings, source, x, weight, bias)
    return y


def max_pool(source: Source, x: Tensor, settings: MaxPool) -> Tensor:
    """The largest values in windows of ``x``, which is kept as ``source``."""
    y: Tensor = MaxPoolFunction.apply(settings, source, x)
    return y
