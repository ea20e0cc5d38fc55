"""The phases of a convolution as ops: their sizes, and what their kernels return, without running
them.

:mod:`resops.reference.conv_bn_act` defines ``conv_bn_act_forward``, ``conv_bn_act_backward_data``
and ``conv_bn_act_backward_weight``; csrc/conv_bn_act.cpp has the schemas and argument checks of
``torch.ops.resops``, triton_kernels/conv_bn_act.py the checks of ``torch.ops.resops_triton``.
Whatever the layout of the arguments, y, g and the gradient of the weight are channels-last: the
kernels walk over channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from ..reference import conv_bn_act as reference
from ..reference.conv_bn_act import Size
from ..reference.layout import empty_channels_last
from .batch_norm import check_device


def size_tuple(size: Size, n: int) -> tuple[int, ...]:
    """One number per dimension."""
    return (size,) * n if isinstance(size, int) else tuple(size)


def paddings_of(
    padding: Size | str, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Zeros at both ends of every dimension; None where the two ends differ."""
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    return None if isinstance(padding, str) else size_tuple(padding, len(kernel))


def output_size(
    input_size: list[int],
    weight_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> list[int]:
    """Size of a convolution's output, (N, C, *spatial)."""
    spans = zip(input_size[2:], weight_size[2:], stride, padding, dilation, strict=True)
    spatial = [(x + 2 * pad - gap * (k - 1) - 1) // step + 1 for x, k, step, pad, gap in spans]
    return [input_size[0], weight_size[0], *spatial]


def _per_channel(like: Tensor, channels: int, wanted: bool) -> tuple[Tensor, Tensor]:
    """Two vectors of statistics or sums; empty ones where they are not wanted."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    size = channels if wanted else 0
    return like.new_empty(size, dtype=dtype), like.new_empty(size, dtype=dtype)


def _check_devices(like: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless all are on one device: a call that mixes a meta tensor with others
    comes to the fake kernel, not to the checks of the compiled op."""
    for name, t in tensors.items():
        if t is not None:
            check_device(name, t, like)


def fake_forward(
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
    x = inputs[0]
    slices = {f"inputs[{i}]": t for i, t in enumerate(inputs)}
    vectors = {"scale": scale, "shift": shift, "conv_bias": conv_bias}
    _check_devices(x, **slices, **vectors, conv_weight=conv_weight, residual=residual)
    size = output_size(list(x.shape), list(conv_weight.shape), stride, padding, dilation)
    return empty_channels_last(x, size), *_per_channel(x, size[1], statistics)


def fake_forward_into(*arguments: Any) -> tuple[Tensor, Tensor]:
    *shared, out = arguments
    y, mean, var = fake_forward(*shared)
    _check_devices(y, out=out)
    return mean, var


def fake_backward_data(
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
    vectors = {"scale": scale, "shift": shift, "mean": mean, "invstd": invstd}
    _check_devices(grad_y, **vectors, conv_weight=conv_weight, x=x, addend=addend)
    g = empty_channels_last(grad_y, input_size)
    return g, *_per_channel(grad_y, input_size[1], mean is not None)


def fake_backward_weight(
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
    slices = {f"inputs[{i}]": t for i, t in enumerate(inputs)}
    _check_devices(grad_y, **slices, scale=scale, shift=shift)
    return empty_channels_last(grad_y, weight_size)


def fake_folded(
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
    _check_devices(
        x, conv_weight=conv_weight, prepared=prepared, conv_bias=conv_bias, residual=residual
    )
    size = output_size(list(x.shape), list(conv_weight.shape), stride, padding, [1, 1])
    return empty_channels_last(x, size)


FAKES: dict[str, Callable[..., Any]] = {
    "forward": fake_forward,
    "backward_data": fake_backward_data,
    "backward_weight": fake_backward_weight,
}

if _native.module is not None:
    torch.library.register_fake("resops::conv_bn_act_folded", fake_folded)
    torch.library.register_fake("resops::conv_bn_act_forward_into", fake_forward_into)
    for phase, fake in FAKES.items():
        torch.library.register_fake(f"resops::conv_bn_act_{phase}", fake)

for phase, fake in FAKES.items():
    _triton.register("conv_bn_act", phase, getattr(reference, f"conv_bn_act_{phase}"), fake)
