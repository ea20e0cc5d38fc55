"""``batch_norm``: the four phases, and the forward and backward passes put together from them.

Memory is walked as a matrix. Channels-last, its columns are channels: (M, C), where a C that is no
multiple of 16 is folded, (M/k, k*C), so that every row starts on a boundary of 16 elements;
column j then belongs to channel j % C. Contiguous, its rows are the planes: (N*C, S). A tile of
ROWS x COLS elements holds whole channels, along its columns or along its rows, and a program does
several tiles of the same channels: what is per channel is read once.

The reductions have two stages. So that few channels still fill the device, the tiles of a channel
are dealt out to several programs. Each accumulates in lanes, one per element of its tile, and
merges the lanes at the end of its walk; a second kernel merges the programs. Every merge has a
fixed order, so that the bits are the same in every run. Statistics are Welford's in a lane and
Chan's between lanes and programs ("Algorithms for computing the sample variance", 1983): no
square of an uncentred value is ever summed.

All reads of the first pass end near the end of memory; the second pass starts there and walks
backwards, towards what left the cache first.

Tensors are fp32, bf16 or fp16; all arithmetic is in fp32. docs/math/batch_norm.md has the
formulas.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of a kernel are pointers and numbers, typed when it is compiled)

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import ACTIVATIONS, MASKED, SMOOTH, activate, blocked_gradient, smooth_gradient
from .launch import check_like, dense, device_of, empty_output

_FOLD = 16  # elements; rows of the folded matrix start on multiples of it
_TILE = 2048  # elements: 16 per thread, two or four vectors of 16 bytes
_MAX_COLUMNS = 128  # of a channels-last tile
_PROGRAMS_PER_PROCESSOR = 8  # of 4 warps: as many as fit with 64 registers a thread
_TILES_PER_PROGRAM = 4  # of the elementwise passes


# ---- tiles --------------------------------------------------------------------------------------


@triton.jit
def _tile_channels(
    block, channels, width, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Channel of each column (1, COLS) or row (ROWS, 1) of a block's tiles, and which exist."""
    if LAST:
        column = block * COLS + tl.arange(0, COLS)[None, :]
        channel = column % channels
        exists = column < width
    else:
        channel = block * ROWS + tl.arange(0, ROWS)[:, None]
        exists = channel < channels
    return channel, exists


@triton.jit
def _tile_corner(
    item, block, channels, batch, rows, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Rows (ROWS, 1) of the matrix that a tile covers, which of them exist, and its first column.

    Item i of a block is, channels-last, its i-th group of rows. Contiguous, the items run through
    the batch first: so tiles that the end of a plane cuts off come last, as they do there.
    """
    lane = tl.arange(0, ROWS)[:, None]
    if LAST:
        row = item * ROWS + lane
        exists = row < rows
        first = block * COLS
    else:
        channel = block * ROWS + lane
        row = item % batch * channels + channel
        exists = channel < channels
        first = item // batch * COLS
    return row, exists, first


@triton.jit
def _elements(row, exists, first, width, numel, RAGGED: tl.constexpr, COLS: tl.constexpr):
    """Offsets of the tile's elements, and which exist. RAGGED: the last row is not a whole one."""
    column = first + tl.arange(0, COLS)[None, :]
    offsets = row * width + column
    valid = exists & (column < width)
    if RAGGED:
        valid = valid & (offsets < numel)
    return offsets, valid


@triton.jit
def _mask_bytes(row, exists, first, width, numel, RAGGED: tl.constexpr, COLS: tl.constexpr):
    """The same for the bytes of the 1-bit mask: a row of the matrix has ceil(width / 8)."""
    column = first + 8 * tl.arange(0, COLS // 8)[None, :]
    offsets = row * ((width + 7) // 8) + column // 8
    valid = exists & (column < width)
    if RAGGED:
        valid = valid & (row * width + column < numel)
    return offsets, valid


@triton.jit
def _pack(bits, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS / 8) bytes of (ROWS, COLS) zeros and ones, the lowest bit first."""
    bits = tl.reshape(bits, (ROWS, COLS // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, axis=2).to(tl.uint8)


@triton.jit
def _unpack(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    bits = packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, (ROWS, COLS)) != 0


@triton.jit
def _load(ptr, offsets, valid):
    return tl.load(ptr + offsets, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _load_affine(weight_ptr, bias_ptr, mean_ptr, invstd_ptr, channel, exists):
    """mean, invstd, weight * invstd and bias of a block's channels."""
    mean = _load(mean_ptr, channel, exists)
    invstd = _load(invstd_ptr, channel, exists)
    scale = invstd
    if weight_ptr is not None:
        scale = _load(weight_ptr, channel, exists) * invstd
    bias = tl.zeros_like(mean)
    if bias_ptr is not None:
        bias = _load(bias_ptr, channel, exists)
    return mean, invstd, scale, bias


# ---- statistics ---------------------------------------------------------------------------------


@triton.jit
def _merge_lanes(count, mean, m2, AXIS: tl.constexpr):
    """Chan's merge of all lanes along an axis: M2 = sum(M2_i + n_i * (mean_i - mean)^2)."""
    total = tl.sum(count, axis=AXIS, keep_dims=True)
    merged = tl.sum(mean * (count / tl.maximum(total, 1.0)), axis=AXIS, keep_dims=True)
    apart = mean - merged
    # A lane without elements has mean 0, which is not merged.
    between = tl.where(count > 0, apart * apart * count, 0.0)
    return total, merged, tl.sum(m2 + between, axis=AXIS, keep_dims=True)


@triton.jit
def batch_norm_statistics_kernel(
    x_ptr,
    count_ptr,  # the sums of a program: (parts, columns) channels-last, else (parts, channels)
    mean_ptr,
    m2_ptr,
    channels,
    batch,
    rows,
    width,
    numel,
    items,
    whole,  # items before the first that the end of the tensor, or of a plane, cuts off
    blocks,
    parts,
    LAST: tl.constexpr,
    RAGGED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    block, part = program % blocks, program // blocks
    mean = tl.zeros((ROWS, COLS), dtype=tl.float32)
    m2 = tl.zeros((ROWS, COLS), dtype=tl.float32)
    step = 0.0
    for item in range(part, items, parts):
        row, exists, first = _tile_corner(item, block, channels, batch, rows, LAST, ROWS, COLS)
        offsets, valid = _elements(row, exists, first, width, numel, RAGGED, COLS)
        x = _load(x_ptr, offsets, valid)
        # Tiles that are cut off come last: a lane that has an element now had one in every step.
        step += 1.0
        delta = tl.where(valid, x - mean, 0.0)
        mean += delta * (1.0 / step)
        m2 += delta * (x - mean)
    # Elements of a lane: one of every whole item, and of the others where the last one has one.
    steps = (items - part + parts - 1) // parts
    whole_steps = tl.minimum(steps, tl.maximum(whole - part + parts - 1, 0) // parts)
    row, exists, first = _tile_corner(items - 1, block, channels, batch, rows, LAST, ROWS, COLS)
    _, valid = _elements(row, exists, first, width, numel, RAGGED, COLS)
    count = tl.where(valid, steps, whole_steps).to(tl.float32)
    if LAST:
        count, mean, m2 = _merge_lanes(count, mean, m2, 0)
        columns = width
        column = block * COLS + tl.arange(0, COLS)[None, :]
    else:
        count, mean, m2 = _merge_lanes(count, mean, m2, 1)
        columns = channels
        column = block * ROWS + tl.arange(0, ROWS)[:, None]
    offsets = part * columns + column
    tl.store(count_ptr + offsets, count, mask=column < columns)
    tl.store(mean_ptr + offsets, mean, mask=column < columns)
    tl.store(m2_ptr + offsets, m2, mask=column < columns)


@triton.jit
def batch_norm_statistics_merge_kernel(
    count_ptr,  # (parts, channels), as are the next two
    mean_ptr,
    m2_ptr,
    merged_mean_ptr,
    spread_ptr,  # the variance, or invstd
    running_mean_ptr,  # None: nothing to update
    running_var_ptr,
    momentum,
    keep,  # 1 - momentum
    unbiased,  # M / (M - 1)
    eps,
    channels,
    parts,
    INVSTD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Merges the programs, in their order, and updates the running statistics."""
    channel = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    count = tl.zeros((ROWS, COLS), dtype=tl.float32)
    mean = tl.zeros((ROWS, COLS), dtype=tl.float32)
    m2 = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)[:, None]
        offsets = part.to(tl.int64) * channels + channel
        valid = (part < parts) & (channel < channels)
        more = _load(count_ptr, offsets, valid)
        delta = _load(mean_ptr, offsets, valid) - mean
        delta = tl.where(more > 0, delta, 0.0)
        count_before = count
        count += more
        share = more / tl.maximum(count, 1.0)
        mean += delta * share
        m2 += _load(m2_ptr, offsets, valid) + delta * delta * (count_before * share)
    count, mean, m2 = _merge_lanes(count, mean, m2, 0)
    var = m2 / tl.maximum(count, 1.0)
    valid = channel < channels
    tl.store(merged_mean_ptr + channel, mean, mask=valid)
    if INVSTD:
        spread = tl.div_rn(1.0, tl.sqrt_rn(var + tl.cast(eps, tl.float32)))
    else:
        spread = var
    tl.store(spread_ptr + channel, spread, mask=valid)
    if running_mean_ptr is not None:
        old, new = tl.cast(keep, tl.float32), tl.cast(momentum, tl.float32)
        value = old * _load(running_mean_ptr, channel, valid) + new * mean
        tl.store(
            running_mean_ptr + channel, value.to(running_mean_ptr.dtype.element_ty), mask=valid
        )
        var *= tl.cast(unbiased, tl.float32)
        value = old * _load(running_var_ptr, channel, valid) + new * var
        tl.store(running_var_ptr + channel, value.to(running_var_ptr.dtype.element_ty), mask=valid)


@triton.jit
def batch_norm_frozen_kernel(
    running_mean_ptr, running_var_ptr, mean_ptr, invstd_ptr, eps, channels, COLS: tl.constexpr
):
    """Mean and invstd of frozen statistics: copies, which a later update leaves alone."""
    channel = tl.program_id(0) * COLS + tl.arange(0, COLS)
    valid = channel < channels
    var = _load(running_var_ptr, channel, valid)
    tl.store(mean_ptr + channel, _load(running_mean_ptr, channel, valid), mask=valid)
    invstd = tl.div_rn(1.0, tl.sqrt_rn(var + tl.cast(eps, tl.float32)))
    tl.store(invstd_ptr + channel, invstd, mask=valid)


# ---- apply --------------------------------------------------------------------------------------


@triton.jit
def _pre_activation(centred, scale, bias):
    """One rounding less than the definition, and the same bits in forward and backward, which
    decide the sign: an explicit fma is not contracted in one place and not in another."""
    return tl.fma(centred, scale + tl.zeros_like(centred), bias + tl.zeros_like(centred))


@triton.jit
def batch_norm_apply_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    invstd_ptr,
    y_ptr,
    mask_ptr,  # None: no mask is written
    negative_slope,
    channels,
    batch,
    rows,
    width,
    numel,
    blocks,
    LAST: tl.constexpr,
    RAGGED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    block, group = program % blocks, program // blocks
    channel, known = _tile_channels(block, channels, width, LAST, ROWS, COLS)
    mean, _, scale, bias = _load_affine(weight_ptr, bias_ptr, mean_ptr, invstd_ptr, channel, known)
    slope = tl.cast(negative_slope, tl.float32)
    for tile in range(TILES):
        item = group * TILES + (TILES - 1 - tile)
        row, exists, first = _tile_corner(item, block, channels, batch, rows, LAST, ROWS, COLS)
        offsets, valid = _elements(row, exists, first, width, numel, RAGGED, COLS)
        z = _pre_activation(_load(x_ptr, offsets, valid) - mean, scale, bias)
        if residual_ptr is not None:
            z += _load(residual_ptr, offsets, valid)
        y = activate(z, slope, ACTIVATION)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=valid)
        if mask_ptr is not None:
            bits = tl.where(valid, tl.where(z <= 0, 0, 1), 0)
            places, inside = _mask_bytes(row, exists, first, width, numel, RAGGED, COLS)
            tl.store(mask_ptr + places, _pack(bits, ROWS, COLS), mask=inside)


# ---- backward -----------------------------------------------------------------------------------


@triton.jit
def _gradient(
    grad_y_ptr,
    x_ptr,
    residual_ptr,
    mask_ptr,
    mean,
    scale,
    bias,
    slope,
    row,
    exists,
    first,
    width,
    numel,
    RAGGED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """g = grad_y * act'(z) and x - mean of a tile, its offsets, and which elements exist."""
    offsets, valid = _elements(row, exists, first, width, numel, RAGGED, COLS)
    g = _load(grad_y_ptr, offsets, valid)
    centred = _load(x_ptr, offsets, valid) - mean
    if ACTIVATION == "relu" or ACTIVATION == "leaky_relu":
        if mask_ptr is not None:
            places, inside = _mask_bytes(row, exists, first, width, numel, RAGGED, COLS)
            packed = tl.load(mask_ptr + places, mask=inside, other=0)
            blocked = _unpack(packed, ROWS, COLS) == 0
        else:
            blocked = _pre_activation(centred, scale, bias) <= 0
        g = blocked_gradient(g, blocked, slope, ACTIVATION)
    elif ACTIVATION != "identity":
        z = _pre_activation(centred, scale, bias)
        if residual_ptr is not None:
            z += _load(residual_ptr, offsets, valid)
        g = smooth_gradient(g, z, ACTIVATION)
    return g, centred, offsets, valid


@triton.jit
def batch_norm_backward_reduce_kernel(
    grad_y_ptr,
    x_ptr,
    residual_ptr,
    mask_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    invstd_ptr,
    sum_grad_ptr,  # the sums of a program: (parts, columns) or (parts, channels)
    sum_grad_xhat_ptr,
    negative_slope,
    channels,
    batch,
    rows,
    width,
    numel,
    items,
    blocks,
    parts,
    LAST: tl.constexpr,
    RAGGED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    block, part = program % blocks, program // blocks
    channel, known = _tile_channels(block, channels, width, LAST, ROWS, COLS)
    mean, invstd, scale, bias = _load_affine(
        weight_ptr, bias_ptr, mean_ptr, invstd_ptr, channel, known
    )
    slope = tl.cast(negative_slope, tl.float32)
    sum_grad = tl.zeros((ROWS, COLS), dtype=tl.float32)
    sum_grad_centred = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for item in range(part, items, parts):
        row, exists, first = _tile_corner(item, block, channels, batch, rows, LAST, ROWS, COLS)
        g, centred, _, valid = _gradient(
            grad_y_ptr,
            x_ptr,
            residual_ptr,
            mask_ptr,
            mean,
            scale,
            bias,
            slope,
            row,
            exists,
            first,
            width,
            numel,
            RAGGED,
            ACTIVATION,
            ROWS,
            COLS,
        )
        sum_grad += tl.where(valid, g, 0.0)
        sum_grad_centred += tl.where(valid, g * centred, 0.0)
    if LAST:
        AXIS: tl.constexpr = 0
        columns = width
        column = block * COLS + tl.arange(0, COLS)[None, :]
    else:
        AXIS: tl.constexpr = 1
        columns = channels
        column = block * ROWS + tl.arange(0, ROWS)[:, None]
    offsets = part * columns + column
    total = tl.sum(sum_grad, axis=AXIS, keep_dims=True)
    tl.store(sum_grad_ptr + offsets, total, mask=column < columns)
    total = tl.sum(sum_grad_centred, axis=AXIS, keep_dims=True) * invstd
    tl.store(sum_grad_xhat_ptr + offsets, total, mask=column < columns)


@triton.jit
def batch_norm_backward_merge_kernel(
    sum_grad_ptr,  # (parts, channels), as is the next
    sum_grad_xhat_ptr,
    merged_grad_ptr,
    merged_grad_xhat_ptr,
    channels,
    parts,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Adds up the programs in their order."""
    channel = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    sum_grad = tl.zeros((ROWS, COLS), dtype=tl.float32)
    sum_grad_xhat = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)[:, None]
        offsets = part.to(tl.int64) * channels + channel
        valid = (part < parts) & (channel < channels)
        sum_grad += _load(sum_grad_ptr, offsets, valid)
        sum_grad_xhat += _load(sum_grad_xhat_ptr, offsets, valid)
    valid = channel < channels
    tl.store(merged_grad_ptr + channel, tl.sum(sum_grad, axis=0, keep_dims=True), mask=valid)
    total = tl.sum(sum_grad_xhat, axis=0, keep_dims=True)
    tl.store(merged_grad_xhat_ptr + channel, total, mask=valid)


@triton.jit
def batch_norm_backward_apply_kernel(
    grad_y_ptr,
    x_ptr,
    residual_ptr,
    mask_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    invstd_ptr,
    sum_grad_ptr,  # None with frozen statistics, whose gradient has the first term only
    sum_grad_xhat_ptr,
    grad_x_ptr,  # None: not needed
    grad_residual_ptr,
    count,  # what the sums are divided by
    negative_slope,
    channels,
    batch,
    rows,
    width,
    numel,
    blocks,
    LAST: tl.constexpr,
    RAGGED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    block, group = program % blocks, program // blocks
    channel, known = _tile_channels(block, channels, width, LAST, ROWS, COLS)
    mean, invstd, scale, bias = _load_affine(
        weight_ptr, bias_ptr, mean_ptr, invstd_ptr, channel, known
    )
    if sum_grad_ptr is not None:
        size = tl.cast(count, tl.float32)
        mean_grad = _load(sum_grad_ptr, channel, known) / size
        mean_grad_xhat = _load(sum_grad_xhat_ptr, channel, known) / size
    slope = tl.cast(negative_slope, tl.float32)
    for tile in range(TILES):
        item = group * TILES + (TILES - 1 - tile)
        row, exists, first = _tile_corner(item, block, channels, batch, rows, LAST, ROWS, COLS)
        g, centred, offsets, valid = _gradient(
            grad_y_ptr,
            x_ptr,
            residual_ptr,
            mask_ptr,
            mean,
            scale,
            bias,
            slope,
            row,
            exists,
            first,
            width,
            numel,
            RAGGED,
            ACTIVATION,
            ROWS,
            COLS,
        )
        if grad_residual_ptr is not None:
            element = grad_residual_ptr.dtype.element_ty
            tl.store(grad_residual_ptr + offsets, g.to(element), mask=valid)
        if grad_x_ptr is not None:
            if sum_grad_ptr is not None:
                g = g - mean_grad - centred * invstd * mean_grad_xhat
            tl.store(grad_x_ptr + offsets, (g * scale).to(grad_x_ptr.dtype.element_ty), mask=valid)


# ---- launchers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Walk:
    """How a dense tensor is cut into tiles; see the head of this file."""

    last: bool  # channels-last
    channels: int
    batch: int
    rows: int
    width: int
    numel: int
    fold: int
    tile_rows: int
    tile_cols: int

    @classmethod
    def of(cls, y: Tensor) -> _Walk:
        """Of ``y``, not empty, with the strides of :func:`empty_output`."""
        N, C, *spatial = y.shape
        S, numel = math.prod(spatial), y.numel()
        last = C == 1 or S == 1 or not y.is_contiguous()
        if last:
            fold = _FOLD // math.gcd(C, _FOLD)
            width = fold * C
            rows = triton.cdiv(numel, width)
            tile_cols = min(triton.next_power_of_2(width), _MAX_COLUMNS)
            tile_rows = min(triton.next_power_of_2(rows), _TILE // tile_cols)
        else:
            fold, rows, width = 1, N * C, S
            tile_cols = min(max(triton.next_power_of_2(S), 8), _TILE)
            tile_rows = min(triton.next_power_of_2(C), _TILE // tile_cols)
        return cls(last, C, N, rows, width, numel, fold, tile_rows, tile_cols)

    @property
    def blocks(self) -> int:
        """Groups of channels that are reduced apart."""
        if self.last:
            return triton.cdiv(self.width, self.tile_cols)
        return triton.cdiv(self.channels, self.tile_rows)

    @property
    def items(self) -> int:
        """Tiles of a block."""
        if self.last:
            return triton.cdiv(self.rows, self.tile_rows)
        return self.batch * triton.cdiv(self.width, self.tile_cols)

    @property
    def whole_items(self) -> int:
        """Tiles of a block before the first that is cut off."""
        if self.last:
            return self.numel // self.width // self.tile_rows
        return self.batch * (self.width // self.tile_cols)

    @property
    def mask_size(self) -> int:
        return triton.cdiv(self.numel, 8) if self.last else self.rows * triton.cdiv(self.width, 8)

    def parts(self, device: torch.device) -> int:
        """Programs that share a block: enough to fill the device, and work for each."""
        return min(self.items, triton.cdiv(_resident_programs(device), self.blocks))

    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.channels, self.batch, self.rows, self.width, self.numel

    def flags(self) -> dict[str, bool | int]:
        return {
            "LAST": self.last,
            "RAGGED": self.rows * self.width != self.numel,
            "ROWS": self.tile_rows,
            "COLS": self.tile_cols,
        }

    def elementwise(self) -> tuple[tuple[int], int]:
        """The grid, and tiles of a program."""
        tiles = min(_TILES_PER_PROGRAM, self.items)
        return (self.blocks * triton.cdiv(self.items, tiles),), tiles


@functools.cache
def _resident_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS_PER_PROCESSOR  # the interpreter: one processor
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _PROGRAMS_PER_PROCESSOR * int(processors)


def _merge_flags(parts: int, channels: int) -> dict[str, int]:
    """Tiles of the second stage: 16 channels, 64 bytes of a row."""
    return {
        "ROWS": min(triton.next_power_of_2(parts), 64),
        "COLS": min(triton.next_power_of_2(channels), 16),
    }


def _reduce_statistics(x: Tensor, walk: _Walk) -> tuple[Tensor, int]:
    """Count, mean and M2 of every program, (3, parts * fold, C), and their number."""
    parts = walk.parts(x.device)
    partial = torch.empty(3, parts * walk.fold, walk.channels, dtype=torch.float32, device=x.device)
    batch_norm_statistics_kernel[(walk.blocks * parts,)](
        x,
        *partial,
        *walk.sizes(),
        walk.items,
        walk.whole_items,
        walk.blocks,
        parts,
        **walk.flags(),
    )
    return partial, parts * walk.fold


def batch_norm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and biased variance, fp32, each (C,). Zeros where M = 0."""
    _check(x)
    C = x.size(1)
    make = torch.empty if x.numel() > 0 else torch.zeros
    mean, var = (make(C, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() > 0:
        y = x if _is_dense(x) else dense(x, empty_output(x))
        with device_of(x):
            partial, parts = _reduce_statistics(y, _Walk.of(y))
            flags = _merge_flags(parts, C)
            batch_norm_statistics_merge_kernel[(triton.cdiv(C, flags["COLS"]),)](
                *partial,
                mean,
                var,
                None,
                None,
                0.0,
                0.0,
                0.0,
                0.0,
                C,
                parts,
                INVSTD=False,
                **flags,
            )
    return mean, var


def batch_norm_apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """y, like x, and the mask (uint8, one bit per element where a residual went through relu or
    leaky_relu, else empty).

    Raises:
        NotImplementedError: a dtype or an activation that these kernels do not have.
        ValueError: a size that does not fit.
    """
    _check(x, activation, residual=residual)
    _check_channels(x, weight=weight, bias=bias, mean=mean, invstd=invstd)
    y = empty_output(x)
    masked = residual is not None and activation in MASKED
    if x.numel() == 0:
        return y, torch.empty(0, dtype=torch.uint8, device=x.device)
    walk = _Walk.of(y)
    mask = torch.empty(walk.mask_size if masked else 0, dtype=torch.uint8, device=x.device)
    grid, tiles = walk.elementwise()
    with device_of(x):
        batch_norm_apply_kernel[grid](
            dense(x, y),
            None if residual is None else dense(residual, y),
            *_contiguous(weight, bias, mean, invstd),
            y,
            mask if masked else None,
            float(negative_slope),
            *walk.sizes(),
            walk.blocks,
            ACTIVATION=activation,
            TILES=tiles,
            **walk.flags(),
        )
    return y, mask


def batch_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, invstd and mask; when training, the running statistics are updated in place:
    running = (1 - momentum) * running + momentum * batch, with the unbiased batch variance.

    Raises:
        NotImplementedError: a dtype or an activation that these kernels do not have.
        ValueError: a size that does not fit; no running statistics in evaluation.
    """
    _check(x, activation, residual=residual)
    _check_channels(x, running_mean=running_mean, running_var=running_var)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    C = x.size(1)
    mean, invstd = (torch.empty(C, dtype=torch.float32, device=x.device) for _ in range(2))
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean and running_var should be given in evaluation mode")
        if C > 0:
            with device_of(x):
                batch_norm_frozen_kernel[(triton.cdiv(C, 128),)](
                    running_mean.contiguous(),
                    running_var.contiguous(),
                    mean,
                    invstd,
                    float(eps),
                    C,
                    COLS=128,
                )
    elif x.numel() == 0:
        mean.zero_()
        invstd.fill_(eps).rsqrt_()
    else:
        y = x if _is_dense(x) else dense(x, empty_output(x))
        count = x.numel() // C
        running = (running_mean, running_var)
        updated = _contiguous(*running)
        with device_of(x):
            partial, parts = _reduce_statistics(y, _Walk.of(y))
            flags = _merge_flags(parts, C)
            batch_norm_statistics_merge_kernel[(triton.cdiv(C, flags["COLS"]),)](
                *partial,
                mean,
                invstd,
                *updated,
                float(momentum),
                1.0 - momentum,
                count / max(count - 1, 1),
                float(eps),
                C,
                parts,
                INVSTD=True,
                **flags,
            )
        for given, new in zip(running, updated, strict=True):
            if given is not None and new is not None and new is not given:
                given.copy_(new)
        x = y  # not to be copied once more
    y, mask = batch_norm_apply(x, residual, weight, bias, mean, invstd, activation, negative_slope)
    return y, mean, invstd, mask


def batch_norm_backward_reduce(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """sum(g) and sum(g * xhat) per channel, (C,) each: the gradients of bias and weight.

    g = grad_y * act'(z) is the gradient before the activation, xhat = (x - mean) * invstd.

    Raises:
        NotImplementedError: a dtype or an activation that these kernels do not have.
        ValueError: a size that does not fit; no mask where one is needed.
    """
    y = _check_backward(grad_y, x, residual, mask, weight, bias, mean, invstd, activation)
    C = x.size(1)
    make = torch.empty if x.numel() > 0 else torch.zeros
    sums = [make(C, dtype=torch.float32, device=x.device) for _ in range(2)]
    if x.numel() > 0:
        walk = _Walk.of(y)
        parts = walk.parts(x.device)
        partial = torch.empty(2, parts * walk.fold, C, dtype=torch.float32, device=x.device)
        flags = _merge_flags(parts * walk.fold, C)
        with device_of(x):
            batch_norm_backward_reduce_kernel[(walk.blocks * parts,)](
                *_saved(grad_y, x, residual, mask, activation, y),
                *_contiguous(weight, bias, mean, invstd),
                *partial,
                float(negative_slope),
                *walk.sizes(),
                walk.items,
                walk.blocks,
                parts,
                ACTIVATION=activation,
                **walk.flags(),
            )
            batch_norm_backward_merge_kernel[(triton.cdiv(C, flags["COLS"]),)](
                *partial, *sums, C, parts * walk.fold, **flags
            )
    return sums[0], sums[1]


def batch_norm_backward_apply(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mean_grad: Tensor | None,
    mean_grad_xhat: Tensor | None,
    activation: str,
    negative_slope: float,
    need_grad_x: bool,
    need_grad_residual: bool,
) -> tuple[Tensor, Tensor]:
    """grad_x = weight * invstd * (g - mean_grad - xhat * mean_grad_xhat) and grad_residual = g.

    Args:
        mean_grad, mean_grad_xhat: the sums of :func:`batch_norm_backward_reduce` over M, (C,)
            each; None for frozen statistics, whose gradient has the first term only.

    Raises:
        NotImplementedError: a dtype or an activation that these kernels do not have.
        ValueError: a size that does not fit; no mask where one is needed.
    """
    saved = (grad_y, x, residual, mask, weight, bias, mean, invstd)
    needed = (need_grad_x, need_grad_residual)
    return _backward_apply(
        *saved, mean_grad, mean_grad_xhat, 1, activation, negative_slope, *needed
    )


def _backward_apply(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_grad: Tensor | None,
    sum_grad_xhat: Tensor | None,
    count: int,
    activation: str,
    negative_slope: float,
    need_grad_x: bool,
    need_grad_residual: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`batch_norm_backward_apply`, where the means are these sums over ``count``."""
    y = _check_backward(grad_y, x, residual, mask, weight, bias, mean, invstd, activation)
    _check_channels(x, mean_grad=sum_grad, mean_grad_xhat=sum_grad_xhat)
    if (sum_grad is None) != (sum_grad_xhat is None):
        raise ValueError("mean_grad and mean_grad_xhat must either both be None or neither be None")
    empty = x.new_empty(0)
    grad_x = empty_output(x) if need_grad_x else empty
    grad_residual = empty_output(x) if need_grad_residual else empty
    if x.numel() > 0 and (need_grad_x or need_grad_residual):
        walk = _Walk.of(y)
        grid, tiles = walk.elementwise()
        with device_of(x):
            batch_norm_backward_apply_kernel[grid](
                *_saved(grad_y, x, residual, mask, activation, y),
                *_contiguous(weight, bias, mean, invstd, sum_grad, sum_grad_xhat),
                grad_x if need_grad_x else None,
                grad_residual if need_grad_residual else None,
                float(count),
                float(negative_slope),
                *walk.sizes(),
                walk.blocks,
                ACTIVATION=activation,
                TILES=tiles,
                **walk.flags(),
            )
    return grad_x, grad_residual


def batch_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias; those not in ``output_mask`` are empty.

    Raises:
        NotImplementedError: a dtype or an activation that these kernels do not have.
        ValueError: a size that does not fit; no mask where one is needed.
    """
    need_x, need_residual, need_weight, need_bias = output_mask
    if x.numel() > 0 and (need_x or need_residual):  # once for both passes
        like = empty_output(x)
        grad_y, x = dense(grad_y, like), dense(x, like)
    saved = (grad_y, x, residual, mask, weight, bias, mean, invstd)
    sums: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    grads = [mean.new_empty(0), mean.new_empty(0)]
    if need_weight or need_bias or (need_x and training):
        sums = batch_norm_backward_reduce(*saved, activation, negative_slope)
        grads = [sums[1] if need_weight else grads[0], sums[0] if need_bias else grads[1]]
    count = max(x.numel() // max(x.size(1), 1), 1)
    grad_x, grad_residual = _backward_apply(
        *saved,
        *(sums if training else (None, None)),
        count,
        activation,
        negative_slope,
        need_x,
        need_residual,
    )
    grad_weight, grad_bias = (
        grad if parameter is None else grad.to(parameter.dtype)
        for grad, parameter in zip(grads, (weight, bias), strict=True)
    )
    return grad_x, grad_residual, grad_weight, grad_bias


def _check(x: Tensor, activation: str = "identity", **tensors: Tensor | None) -> None:
    check_like("batch_norm", x, **tensors)
    if x.dim() < 2:
        raise ValueError(
            f"batch_norm expects an input of size (N, C, *spatial), but got {x.dim()}-D input"
        )
    if activation not in ACTIVATIONS:
        raise NotImplementedError(
            f"batch_norm of triton has {', '.join(ACTIVATIONS)}, but not {activation!r}"
        )


def _check_channels(x: Tensor, **vectors: Tensor | None) -> None:
    for name, t in vectors.items():
        if t is not None and (t.shape != x.shape[1:2] or t.device != x.device):
            raise ValueError(
                f"{name} should have size [{x.size(1)}] on {x.device}, but got size "
                f"{list(t.shape)} on {t.device}"
            )


def _check_backward(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
) -> Tensor:
    """Raise for what does not fit; the memory order of the call otherwise: a tensor like y."""
    _check(x, activation, grad_y=grad_y, residual=residual)
    _check_channels(x, weight=weight, bias=bias, mean=mean, invstd=invstd)
    y = x if _is_dense(x) else empty_output(x)
    if mask is not None and mask.numel() > 0:
        size = _Walk.of(y).mask_size if x.numel() > 0 else 0
        given = (tuple(mask.shape), mask.dtype, mask.device)
        if given != ((size,), torch.uint8, x.device) or activation not in MASKED:
            raise ValueError(
                f"mask should have {size if activation in MASKED else 0} bytes on {x.device}, but "
                f"got {mask.dtype} of size {list(mask.shape)} on {mask.device}"
            )
    elif residual is not None and activation in MASKED and x.numel() > 0:
        raise ValueError("mask should be given for relu and leaky_relu with a residual")
    return y


def _is_dense(x: Tensor) -> bool:
    """Whether x has the memory order that its output gets (not the same strides: a dimension of
    size 1 may have any)."""
    return x.is_contiguous() or x.stride() == empty_output(x).stride()


def _saved(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
    y: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the backward kernels read of the forward pass, in the memory order of y."""
    masked = mask is not None and mask.numel() > 0
    smooth = residual is not None and activation in SMOOTH
    return (
        dense(grad_y, y),
        dense(x, y),
        dense(residual, y) if residual is not None and smooth else None,
        mask.contiguous() if mask is not None and masked else None,
    )


def _contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in vectors]
