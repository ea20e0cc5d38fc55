"""``conv_bn_act``: convolutions with prologue and epilogue, forward and backward, channels-last.

An operand with other strides is copied into that order first, but for slices of the channels of a
wider channels-last tensor, which are read where they are. fp32, bf16 and fp16 tensors; products of
fp32 are computed in TF32 where torch's setting for convolutions allows it
(``torch.backends.cudnn.conv.fp32_precision``, of which ``allow_tf32`` is the older name).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import tiles
from .activation import ACTIVATIONS
from .batch_norm_kernels import (
    batch_norm_backward_merge_kernel,
    batch_norm_statistics_merge_kernel,
)
from .conv_bn_act_kernels import (
    conv_bn_act_backward_data_kernel,
    conv_bn_act_backward_data_merge_kernel,
    conv_bn_act_backward_weight_kernel,
    conv_bn_act_backward_weight_merge_kernel,
    conv_bn_act_forward_kernel,
    conv_bn_act_forward_merge_kernel,
    conv_bn_act_inside_kernel,
)
from .launch import (
    DTYPES,
    by_pixel,
    channels_last,
    check_device,
    device_of,
    empty_channels_last,
    processors,
)

_MERGED = 64  # tiles that the first stage of a merge takes together
_LEAST_STEPS = 4  # of a part of the pixels, in the gradient of the weight
_LARGEST = 2**31 - 2**12  # pixels, or elements of a weight: their numbers are 32-bit, with a tile


@dataclass(frozen=True)
class _Convolution:
    """The sizes of a call, checked."""

    batch: int
    channels: int  # of x
    filters: int  # channels of y
    size: tuple[int, int]  # of x
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(
        cls,
        input_size: list[int],
        weight_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> _Convolution:
        if len(input_size) != 4 or len(weight_size) != 4:
            raise NotImplementedError(
                "conv_bn_act of triton takes two spatial dimensions, an input of size "
                "(N, C_in, H, W) and a conv_weight of size (C, C_in, kernel_h, kernel_w), but got "
                f"sizes {list(input_size)} and {list(weight_size)}"
            )
        for name, values, least in (
            ("stride", stride, 1),
            ("padding", padding, 0),
            ("dilation", dilation, 1),
        ):
            if len(values) != 2 or min(values) < least:
                raise ValueError(
                    f"{name} should be two numbers, at least {least}, but got {list(values)}"
                )
        batch, channels, *size = input_size
        filters, per_group, *kernel = weight_size
        if min(channels, filters, *kernel) < 1:
            raise ValueError(
                "conv_bn_act of triton takes at least one channel and one tap, but got an input of "
                f"size {list(input_size)} and a conv_weight of size {list(weight_size)}"
            )
        if channels != per_group:
            raise ValueError(
                f"conv_weight should have size ({filters}, {channels}, ...) for an input of size "
                f"{list(input_size)}, but got {list(weight_size)}: convolutions in groups are not "
                "taken"
            )
        out_size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
        ]
        if min(out_size) < 1:
            raise ValueError(
                f"an input of size {list(input_size)} with padding {list(padding)} is smaller than "
                f"the kernel of size {kernel} with dilation {list(dilation)}"
            )
        pixels = batch * max(size[0] * size[1], out_size[0] * out_size[1])
        if max(pixels, filters * channels * kernel[0] * kernel[1]) > _LARGEST:
            raise NotImplementedError(
                f"conv_bn_act of triton takes up to {_LARGEST} pixels and elements of conv_weight, "
                f"but got an input of size {list(input_size)} and a conv_weight of size "
                f"{list(weight_size)}"
            )
        pairs = (size, out_size, kernel, stride, padding, dilation)
        return cls(batch, channels, filters, *((v[0], v[1]) for v in pairs))

    @property
    def output_size(self) -> tuple[int, ...]:
        return (self.batch, self.filters, *self.out_size)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def pointwise(self) -> bool:
        """Whether every pixel of y reads one pixel of x, in the same order."""
        return self.kernel == self.stride == (1, 1) and self.padding == (0, 0)


def _precision(dtype: torch.dtype) -> str:
    setting: Any = torch.backends.cudnn  # its newer part is not in the types of torch
    tf32 = dtype == torch.float32 and setting.conv.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _slices(inputs: list[Tensor]) -> tuple[tuple[Any, ...], tuple[int, ...], tuple[int, ...]]:
    """Memory, distance of pixels and channels of every slice."""
    pairs = [by_pixel(t) for t in inputs]
    widths = tuple(t.size(1) for t in inputs)
    return tuple(t for t, _ in pairs), tuple(step for _, step in pairs), widths


def _depth_flags(widths: tuple[int, ...], tile: tiles.Tile) -> tuple[int, bool]:
    """Steps of a sum over these channels, and whether no step is cut off."""
    blocks = sum(triton.cdiv(width, tile.depth) for width in widths)
    return blocks, all(width % tile.depth == 0 for width in widths)


def _inside(conv: _Convolution, scale: Tensor | None, device: torch.device) -> Tensor | None:
    """Which taps read the image, as the kernels want it; None where all do, or nobody asks."""
    if scale is None or conv.padding == (0, 0):
        return None
    sizes = [taps * size for taps, size in zip(conv.kernel, conv.out_size, strict=True)]
    inside = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    conv_bn_act_inside_kernel[(2, triton.cdiv(max(sizes), 1024))](
        inside,
        *conv.size,
        *conv.out_size,
        *conv.stride,
        *conv.padding,
        *conv.dilation,
        *conv.kernel,
        BLOCK=1024,
    )
    return inside


# ---- forward ------------------------------------------------------------------------------------


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
    """y = act( conv( prologue( scale * x + shift ) ) + conv_bias [+ residual] ), channels-last, and
    its mean and biased variance per channel, fp32, (C,) each; empty without ``statistics``.

    Raises:
        NotImplementedError: a dtype, an activation or a number of dimensions that these kernels do
            not have; a CPU tensor without the interpreter.
        ValueError: a size that does not fit; groups; statistics of an activation's result.
    """
    x, input_size = _check_inputs(inputs)
    conv = _Convolution.of(input_size, list(conv_weight.shape), stride, padding, dilation)
    _check_prologue(conv, x, prologue, scale, shift)
    _check_like(x, "conv_weight", conv_weight, tuple(conv_weight.shape))
    _check_like(x, "residual", residual, conv.output_size)
    _check_vector("conv_bias", conv_bias, conv.filters, x, (x.dtype, torch.float32))
    _check_activation("activation", activation)
    if statistics and (residual is not None or activation != "identity"):
        raise ValueError(
            "statistics are those of a convolution without residual and activation, but got "
            f"activation {activation!r}" + (" and a residual" if residual is not None else "")
        )
    y = empty_channels_last(conv.output_size, x)
    count = conv.filters if statistics else 0
    mean, var = (torch.zeros(count, dtype=torch.float32, device=x.device) for _ in range(2))
    if y.numel() == 0:
        return y, mean, var
    shape = tiles.ShapeClass.of("forward", conv.pointwise, scale is not None, conv.filters)
    tile = tiles.choose(x.device, x.dtype, _precision(x.dtype), shape)
    slices = _slices(inputs)
    blocks, whole = _depth_flags(slices[2], tile)
    rows = conv.batch * conv.out_size[0] * conv.out_size[1]
    row_tiles = triton.cdiv(rows, tile.rows)
    partial: Any = (None, None)
    if statistics:
        partial = torch.empty(2, row_tiles, conv.filters, dtype=torch.float32, device=x.device)
    with device_of(x):
        conv_bn_act_forward_kernel[(row_tiles * triton.cdiv(conv.filters, tile.cols),)](
            *slices,
            channels_last(conv_weight),
            *_contiguous(scale, shift),
            _inside(conv, scale, x.device),
            *_contiguous(conv_bias),
            None if residual is None else channels_last(residual),
            y,
            *partial,
            float(prologue_slope),
            float(negative_slope),
            rows,
            conv.filters,
            conv.channels,
            blocks,
            *conv.size,
            *conv.out_size,
            *conv.stride,
            *conv.padding,
            *conv.dilation,
            conv.kernel[0],
            TAPS_ACROSS=conv.kernel[1],
            POINTWISE=conv.pointwise,
            WHOLE=whole,
            PROLOGUE=prologue,
            ACTIVATION=activation,
            PRECISION=_precision(x.dtype),
            **tile.flags(),
        )
        if statistics:
            _merge_statistics(partial, mean, var, rows, tile.rows)
    return y, mean, var


def _merge_flags(channels: int) -> dict[str, int]:
    return {"ROWS": _MERGED, "COLS": min(triton.next_power_of_2(channels), 16)}


def _merge_statistics(partial: Tensor, mean: Tensor, var: Tensor, rows: int, tile: int) -> None:
    """Mean and variance from those of tiles of ``tile`` rows: first in groups, then all."""
    _, parts, channels = partial.shape
    groups = triton.cdiv(parts, _MERGED)
    flags = _merge_flags(channels)
    blocks = triton.cdiv(channels, flags["COLS"])
    merged = torch.empty(3, groups, channels, dtype=torch.float32, device=mean.device)
    conv_bn_act_forward_merge_kernel[(groups, blocks)](
        *partial, *merged, rows, channels, parts, TILE_ROWS=tile, **flags
    )
    batch_norm_statistics_merge_kernel[(blocks,)](
        *merged,
        mean,
        var,
        None,
        None,
        0.0,
        0.0,
        0.0,
        0.0,
        channels,
        groups,
        INVSTD=False,
        **flags,
    )


# ---- backward: data -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Residues:
    """In one dimension, the pixels of x of one residue modulo the stride, and what reaches them.

    Tap r carries pixel o of grad_y to pixel i of x where i = o * stride - padding + r * dilation.
    """

    count: int  # pixels of the class
    first: int  # tap that reaches them first
    step: int  # from one such tap to the next
    taps: int
    source: int  # pixel of grad_y that the first tap brings to the first pixel
    source_step: int  # from one such tap to the next

    @classmethod
    def of(
        cls, residue: int, size: int, kernel: int, stride: int, padding: int, dilation: int
    ) -> _Residues:
        step = stride // math.gcd(stride, dilation)
        count = len(range(residue, size, stride))
        for first in range(min(step, kernel)):
            source, rest = divmod(residue + padding - first * dilation, stride)
            if rest == 0:
                taps = len(range(first, kernel, step))
                return cls(count, first, step, taps, source, -step * dilation // stride)
        return cls(count, 0, 1, 0, 0, 0)


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
    """g = ( conv_transposed(grad_y) [+ addend] ) * prologue'( scale * x + shift ), channels-last;
    sum(g) and sum(g * (x - mean) * invstd) per channel, fp32, (C_in,) each, empty without ``mean``.

    Raises:
        NotImplementedError: a dtype, an activation or a number of dimensions that these kernels do
            not have; a CPU tensor without the interpreter.
        ValueError: a size that does not fit; groups; a part of the prologue without the others.
    """
    _check_dtype(grad_y)
    conv = _Convolution.of(list(input_size), list(conv_weight.shape), stride, padding, dilation)
    _check_like(grad_y, "grad_y", grad_y, conv.output_size)
    _check_like(grad_y, "conv_weight", conv_weight, tuple(conv_weight.shape))
    _check_like(grad_y, "x", x, tuple(input_size))
    _check_like(grad_y, "addend", addend, tuple(input_size))
    _check_prologue(conv, grad_y, prologue, scale, shift)
    if (x is None) != (scale is None):
        raise ValueError("x, scale and shift must either all be None or none of them be None")
    if (mean is None) != (invstd is None) or (mean is not None and x is None):
        raise ValueError("mean and invstd go together, and with x, scale and shift")
    for name, t in (("mean", mean), ("invstd", invstd)):
        _check_vector(name, t, conv.channels, grad_y, (torch.float32,))
    g = empty_channels_last(tuple(input_size), grad_y)
    count = 0 if mean is None else conv.channels
    sums = [torch.zeros(count, dtype=torch.float32, device=g.device) for _ in range(2)]
    if g.numel() == 0:
        return g, sums[0], sums[1]
    shape = tiles.ShapeClass.of("backward_data", conv.pointwise, x is not None, conv.channels)
    tile = tiles.choose(g.device, g.dtype, _precision(g.dtype), shape)
    grads, grad_step = by_pixel(grad_y)
    blocks, whole = _depth_flags((conv.filters,), tile)
    value, value_step = (None, 0) if x is None else by_pixel(x)
    vertical, horizontal = (
        [_Residues.of(residue, *sizes) for residue in range(min(sizes[2], sizes[0]))]
        for sizes in zip(
            conv.size, conv.kernel, conv.stride, conv.padding, conv.dilation, strict=True
        )
    )
    classes = [
        (i, j, down, across, conv.batch * down.count * across.count)
        for i, down in enumerate(vertical)
        for j, across in enumerate(horizontal)
    ]
    row_tiles = [triton.cdiv(rows, tile.rows) for *_, rows in classes]
    partial: Any = (None, None)
    if mean is not None:
        size = (2, sum(row_tiles), conv.channels)
        partial = torch.empty(size, dtype=torch.float32, device=g.device)
    weight = channels_last(conv_weight)
    vectors = _contiguous(scale, shift, mean, invstd)
    other = None if addend is None else channels_last(addend)
    first_tile = 0
    with device_of(g):
        for (i, j, down, across, rows), count in zip(classes, row_tiles, strict=True):
            conv_bn_act_backward_data_kernel[(count * triton.cdiv(conv.channels, tile.cols),)](
                grads,
                grad_step,
                conv.filters,
                weight,
                value,
                value_step,
                *vectors[:2],
                other,
                *vectors[2:],
                g,
                *partial,
                float(prologue_slope),
                rows,
                conv.channels,
                blocks,
                *conv.size,
                down.count,
                across.count,
                *conv.out_size,
                *conv.stride,
                i,
                j,
                down.source,
                across.source,
                down.source_step,
                across.source_step,
                down.first * conv.kernel[1] + across.first,
                down.step * conv.kernel[1],
                across.step,
                down.taps if across.taps > 0 else 0,
                conv.taps,
                first_tile,
                TAPS_ACROSS=max(across.taps, 1),
                POINTWISE=conv.pointwise,
                WHOLE=whole,
                PROLOGUE=prologue,
                PRECISION=_precision(g.dtype),
                **tile.flags(),
            )
            first_tile += count
        if mean is not None:
            _merge_sums(partial, sums)
    return g, sums[0], sums[1]


def _merge_sums(partial: Tensor, sums: list[Tensor]) -> None:
    """The sums of all tiles: first in groups, then all."""
    _, parts, channels = partial.shape
    groups = triton.cdiv(parts, _MERGED)
    flags = _merge_flags(channels)
    blocks = triton.cdiv(channels, flags["COLS"])
    merged = torch.empty(2, groups, channels, dtype=torch.float32, device=partial.device)
    conv_bn_act_backward_data_merge_kernel[(groups, blocks)](
        *partial, *merged, channels, parts, **flags
    )
    batch_norm_backward_merge_kernel[(blocks,)](*merged, *sums, channels, groups, **flags)


# ---- backward: weight ---------------------------------------------------------------------------


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
    """Gradient of conv_weight, channels-last, in the dtype of grad_y.

    Raises:
        NotImplementedError: a dtype, an activation or a number of dimensions that these kernels do
            not have; a CPU tensor without the interpreter.
        ValueError: a size that does not fit; groups.
    """
    x, input_size = _check_inputs(inputs)
    conv = _Convolution.of(input_size, list(weight_size), stride, padding, dilation)
    _check_prologue(conv, x, prologue, scale, shift)
    _check_like(x, "grad_y", grad_y, conv.output_size)
    grad = empty_channels_last(tuple(weight_size), grad_y)
    pixels = conv.batch * conv.out_size[0] * conv.out_size[1]
    if pixels == 0:
        return grad.zero_()
    # Operand A is x, transposed: its channels are the rows.
    shape = tiles.ShapeClass.of("backward_weight", conv.pointwise, scale is not None, conv.filters)
    tile = tiles.choose(x.device, x.dtype, _precision(x.dtype), shape)
    grads, grad_step = by_pixel(grad_y)
    slices = _slices(inputs)
    channel_blocks = sum(triton.cdiv(width, tile.rows) for width in slices[2])
    programs = channel_blocks * triton.cdiv(conv.filters, tile.cols) * conv.taps
    parts = _parts(x.device, programs, pixels, tile)
    part_pixels = triton.cdiv(triton.cdiv(pixels, parts), tile.depth) * tile.depth
    parts = triton.cdiv(pixels, part_pixels)
    partial = grad
    if parts > 1:
        partial = torch.empty(parts * grad.numel(), dtype=torch.float32, device=grad.device)
    with device_of(x):
        conv_bn_act_backward_weight_kernel[(programs * parts,)](
            grads,
            grad_step,
            *slices,
            *_contiguous(scale, shift),
            _inside(conv, scale, x.device),
            partial,
            float(prologue_slope),
            pixels,
            part_pixels,
            conv.filters,
            conv.channels,
            channel_blocks,
            *conv.size,
            *conv.out_size,
            *conv.stride,
            *conv.padding,
            *conv.dilation,
            conv.taps,
            TAPS_ACROSS=conv.kernel[1],
            POINTWISE=conv.pointwise,
            PROLOGUE=prologue,
            PRECISION=_precision(x.dtype),
            **tile.flags(),
        )
        if parts > 1:
            block = min(triton.next_power_of_2(grad.numel()), 1024)
            conv_bn_act_backward_weight_merge_kernel[(triton.cdiv(grad.numel(), block),)](
                partial, grad, grad.numel(), parts, BLOCK=block
            )
    return grad


def _parts(device: torch.device, programs: int, pixels: int, tile: tiles.Tile) -> int:
    """Into how many parts the pixels are cut: two waves of programs, none of a few steps only."""
    wanted = triton.cdiv(2 * processors(device), programs)
    return max(min(wanted, pixels // (_LEAST_STEPS * tile.depth)), 1)


# ---- checks -------------------------------------------------------------------------------------


def _check_inputs(inputs: list[Tensor]) -> tuple[Tensor, list[int]]:
    """Raise unless the slices fit together; the first of them, and the size of them all."""
    if len(inputs) == 0:
        raise ValueError("inputs should be at least one tensor, but got an empty list")
    x = inputs[0]
    _check_dtype(x)
    for i, t in enumerate(inputs[1:], 1):
        size = (*x.shape[:1], *t.shape[1:2], *x.shape[2:])
        _check_like(x, f"inputs[{i}]", t, size)
    if x.dim() != 4:
        return x, list(x.shape)
    if any(t.size(1) == 0 for t in inputs):
        raise ValueError(
            "every tensor of inputs should have channels, but got sizes "
            f"{[list(t.shape) for t in inputs]}"
        )
    return x, [x.size(0), sum(t.size(1) for t in inputs), *x.shape[2:]]


def _check_dtype(x: Tensor) -> None:
    check_device("conv_bn_act", x)
    if x.dtype not in DTYPES:
        raise NotImplementedError(f'"conv_bn_act" of triton not implemented for {x.dtype}')


def _check_prologue(
    conv: _Convolution, x: Tensor, prologue: str, scale: Tensor | None, shift: Tensor | None
) -> None:
    _check_activation("prologue", prologue)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must either both be None or neither be None")
    if scale is None and prologue != "identity":
        raise ValueError(
            f"prologue should be 'identity' without scale and shift, but got {prologue!r}"
        )
    for name, t in (("scale", scale), ("shift", shift)):
        _check_vector(name, t, conv.channels, x, (torch.float32,))


def _check_like(x: Tensor, name: str, t: Tensor | None, size: tuple[int, ...]) -> None:
    if t is not None and (tuple(t.shape), t.dtype, t.device) != (size, x.dtype, x.device):
        raise ValueError(
            f"{name} should be {x.dtype} of size {list(size)} on {x.device}, but got {t.dtype} of "
            f"size {list(t.shape)} on {t.device}"
        )


def _check_vector(
    name: str, t: Tensor | None, size: int, x: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    if t is None:
        return
    if tuple(t.shape) != (size,) or t.dtype not in dtypes or t.device != x.device:
        wanted = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise ValueError(
            f"{name} should be {wanted} of size [{size}] on {x.device}, but got {t.dtype} of size "
            f"{list(t.shape)} on {t.device}"
        )


def _check_activation(name: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise NotImplementedError(
            f"{name} of triton's conv_bn_act may be {', '.join(ACTIVATIONS)}, but not "
            f"{activation!r}"
        )


def _contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in vectors]
