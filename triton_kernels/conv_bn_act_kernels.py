"""The kernels of ``conv_bn_act``; conv_bn_act.py launches them.

Each pass is a product of matrices that are never written: an implicit GEMM. Memory is
channels-last, so that a row of the activations is a pixel and its channels are neighbours.

    forward          (pixels of y, C)     = x of the pixels under the taps  @  weight
    backward data    (pixels of x, C_in)  = grad_y of the pixels whose taps reach them  @  weight
    backward weight  (C_in, C) per tap    = x of the pixels under the tap, transposed  @  grad_y

The reduction of the first two runs over taps and channels, that of the last over pixels. The
backward pass of the data asks which pixels of grad_y reach a pixel of x. With stride s that depends
on the coordinate modulo s: the pixels of one residue class see the same taps, and source and
destination of each step s apart in one and 1 apart in the other. So every class is a product of its
own, like a forward pass of stride 1, and no zeros are multiplied ("sub-pixel convolution").

Prologue: where the input is a raw output of convolutions, act(scale * x + shift) is computed as a
tile of it is loaded, in fp32, rounded to the dtype of x and, where padding is read, set to zero
after that. In the backward pass of the weight it is operand A, as in the forward pass: on sm_90
that operand can come from registers. It stays there if what tells padding is loaded, and goes
through shared memory if it is computed beside the addresses; ptxas then makes every product wait
for the one before. So a small kernel writes a table first: which taps are inside of the image.

Epilogue: bias, residual and activation; or, of the values as they were stored, the mean of a tile's
rows and their squared distances from it; or the derivative of the prologue and the two sums of its
batch norm. What a tile leaves is merged by a second and a third kernel in a fixed order, so that
the bits are the same in every run.

Tensors are fp32, bf16 or fp16; sums are fp32, as is everything in prologue and epilogue.
docs/math/conv_bn_act.md has the formulas.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of a kernel are pointers and numbers, typed when it is compiled)

from __future__ import annotations

import inspect

import triton
import triton.language as tl

from .activation import activate, blocked_gradient, smooth_gradient
from .batch_norm_kernels import merge_lanes

# Triton's interpreter returns garbage for tl.dot of bf16; products of 16 bits are exact in fp32.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Sizes of which no address is made directly. A kernel compiled for each that happens to be 1, or a
# multiple of 16, would be many kernels, and ptxas takes a product of one of them as it should and
# serialises it in the next.
_NOT_SPECIALISED = (
    "rows",
    "blocks",
    "pixels",
    "part_pixels",
    "channel_blocks",
    "height",
    "width",
    "out_height",
    "out_width",
    "class_height",
    "class_width",
    "stride_height",
    "stride_width",
    "padding_height",
    "padding_width",
    "dilation_height",
    "dilation_width",
    "residue_height",
    "residue_width",
    "top",
    "left",
    "tap_height",
    "tap_width",
    "first_tap",
    "tap_down",
    "tap_across",
    "taps_down",
    "taps_across",
    "taps",
    "first_tile",
)


def _kernel(function):
    """triton.jit, with the sizes above left general."""
    names = [name for name in _NOT_SPECIALISED if name in inspect.signature(function).parameters]
    return triton.jit(do_not_specialize=names)(function)


# ---- operands -----------------------------------------------------------------------------------


@triton.jit
def _slice(block, ptrs, pixel_strides, widths, BLOCK: tl.constexpr):
    """Of the slice that has the ``block``-th group of BLOCK channels: its memory, channels from one
    pixel to the next, its channels, its first channel among all, and its first group.

    A group never spans two slices.
    """
    ptr, pixel_stride, width = ptrs[0], pixel_strides[0], widths[0]
    first_channel, first_block = 0, 0
    channels, blocks = 0, 0
    for i in tl.static_range(1, len(ptrs)):
        channels += widths[i - 1]
        blocks += tl.cdiv(widths[i - 1], BLOCK)
        reached = block >= blocks
        ptr = tl.where(reached, ptrs[i], ptr)
        pixel_stride = tl.where(reached, pixel_strides[i], pixel_stride)
        width = tl.where(reached, widths[i], width)
        first_channel = tl.where(reached, channels, first_channel)
        first_block = tl.where(reached, blocks, first_block)
    return ptr, pixel_stride, width, first_channel, first_block


@triton.jit
def _affine(x, scale, shift):
    """scale * x + shift, the same bits in every pass: the sign of it decides the derivative."""
    zeros = tl.zeros_like(x)
    return tl.fma(x, scale + zeros, shift + zeros)


@triton.jit
def _normalised(x, scale, shift, slope, PROLOGUE: tl.constexpr):
    """act(scale * x + shift) of a tile, in its dtype."""
    return activate(_affine(x.to(tl.float32), scale, shift), slope, PROLOGUE).to(x.dtype)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _divided(pixel, height, width):
    """Image, row and column of a pixel."""
    column = pixel % width
    pixel = pixel // width
    return pixel // height, pixel % height, column


@_kernel
def conv_bn_act_inside_kernel(
    inside_ptr,  # (taps_down, out_height), and behind it (taps_across, out_width)
    height,  # of x
    width,
    out_height,
    out_width,
    stride_height,
    stride_width,
    padding_height,
    padding_width,
    dilation_height,
    dilation_width,
    taps_down,
    taps_across,
    BLOCK: tl.constexpr,
):
    """1 where a tap reads a row, or a column, of the image, and 0 where it reads padding."""
    across = tl.program_id(0) == 1
    size = tl.where(across, width, height)
    out_size = tl.where(across, out_width, out_height)
    taps = tl.where(across, taps_across, taps_down)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    read = place % out_size * tl.where(across, stride_width, stride_height)
    read += place // out_size * tl.where(across, dilation_width, dilation_height)
    read -= tl.where(across, padding_width, padding_height)
    first = tl.where(across, taps_down * out_height, 0)
    inside = tl.where((read >= 0) & (read < size), 1, 0)
    tl.store(inside_ptr + first + place, inside, mask=place < taps * out_size)


@triton.jit
def _inside(
    inside_ptr, tap, taps_down, out_y, out_x, out_height, out_width, TAPS_ACROSS: tl.constexpr
):
    """Whether a tap of these pixels of y reads the image, from the table of the kernel above."""
    down = tl.load(inside_ptr + tap // TAPS_ACROSS * out_height + out_y)
    first = taps_down * out_height
    across = tl.load(inside_ptr + first + tap % TAPS_ACROSS * out_width + out_x)
    return (down & across) != 0


@triton.jit
def _taps_times_weight(
    a_ptrs,  # (image, height, width, channels), one per slice of the channels
    pixel_strides,
    widths,  # channels of every slice
    b_ptr,  # element (tap, k, column) is at tap * b_tap + k * b_row + column * b_column, in 32 bits
    b_tap,
    b_row,
    b_column,
    scale_ptr,  # None without a prologue
    shift_ptr,
    slope,
    inside_ptr,  # the table; None where no padding is read, or none after a prologue
    pixel,  # (ROWS,): where POINTWISE, the pixel that a row reads, which is its only one
    image,  # (ROWS,) each: else the image, and the coordinates of what the first tap reads
    top,
    left,
    out_y,  # (ROWS,) each: coordinates in y, for the table
    out_x,
    exists,  # (ROWS,): whether there is such a row
    height,
    width,
    out_height,
    out_width,
    tap_height,  # pixels from one tap to the next
    tap_width,
    first_tap,  # of the kernel, and from one to the next down and across: not all are read
    tap_down,
    tap_across,
    taps_down,
    column,  # (COLS,)
    columns,
    blocks,
    TAPS_ACROSS: tl.constexpr,
    POINTWISE: tl.constexpr,
    WHOLE: tl.constexpr,  # every slice is a whole number of DEPTH channels
    PROLOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The product (ROWS, COLS) of one tile, in fp32."""
    acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
    tap, block = 0, 0
    for _ in range(taps_down * TAPS_ACROSS * blocks):
        a_ptr, pixel_stride, channels, first_channel, first_block = _slice(
            block, a_ptrs, pixel_strides, widths, DEPTH
        )
        channel = (block - first_block) * DEPTH + tl.arange(0, DEPTH)
        known = channel < channels
        if POINTWISE:
            source, inside = pixel, exists
        else:
            y = top + tap // TAPS_ACROSS * tap_height
            x = left + tap % TAPS_ACROSS * tap_width
            inside = exists & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            source = (image * height + y) * width + x
        offsets = source.to(tl.int64)[:, None] * pixel_stride + channel[None, :]
        valid = inside[:, None] if WHOLE else inside[:, None] & known[None, :]
        a = tl.load(a_ptr + offsets, mask=valid, other=0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + first_channel + channel, mask=known, other=0.0)
            shift = tl.load(shift_ptr + first_channel + channel, mask=known, other=0.0)
            a = _normalised(a, scale[None, :], shift[None, :], slope, PROLOGUE)
            if inside_ptr is not None:  # zero padding is zero after the prologue
                read = _inside(
                    inside_ptr, tap, taps_down, out_y, out_x, out_height, out_width, TAPS_ACROSS
                )
                a = tl.where(read[:, None], a, 0.0)
        kernel_tap = first_tap + tap // TAPS_ACROSS * tap_down + tap % TAPS_ACROSS * tap_across
        b_rows = (first_channel + channel) * b_row + kernel_tap * b_tap
        b_offsets = b_rows[:, None] + column[None, :] * b_column
        b_valid = column[None, :] < columns
        if not WHOLE:
            b_valid = b_valid & known[:, None]
        b = tl.load(b_ptr + b_offsets, mask=b_valid, other=0.0)
        acc = _dot(a, b, acc, PRECISION)
        block += 1
        done = block == blocks
        block = tl.where(done, 0, block)
        tap = tl.where(done, tap + 1, tap)
    return acc


# ---- forward ------------------------------------------------------------------------------------


@_kernel
def conv_bn_act_forward_kernel(
    x_ptrs,
    pixel_strides,
    widths,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    inside_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    mean_ptr,  # (tiles of rows, C), as is the next; None without statistics
    m2_ptr,
    prologue_slope,
    negative_slope,
    rows,  # pixels of y
    columns,  # channels of y
    channels,  # of x
    blocks,
    height,  # of x
    width,
    out_height,
    out_width,
    stride_height,
    stride_width,
    padding_height,
    padding_width,
    dilation_height,
    dilation_width,
    taps_down,
    TAPS_ACROSS: tl.constexpr,
    POINTWISE: tl.constexpr,
    WHOLE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # Neighbouring programs share rows, which come from memory once; the weight stays in the cache.
    column_tiles = tl.cdiv(columns, COLS)
    row_tile = tl.program_id(0) // column_tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_tiles * COLS + tl.arange(0, COLS)
    image, out_y, out_x = _divided(row, out_height, out_width)
    taps = taps_down * TAPS_ACROSS
    acc = _taps_times_weight(
        x_ptrs,
        pixel_strides,
        widths,
        weight_ptr,
        channels,
        1,
        taps * channels,
        scale_ptr,
        shift_ptr,
        tl.cast(prologue_slope, tl.float32),
        inside_ptr,
        row,
        image,
        out_y * stride_height - padding_height,
        out_x * stride_width - padding_width,
        out_y,
        out_x,
        row < rows,
        height,
        width,
        out_height,
        out_width,
        dilation_height,
        dilation_width,
        0,
        TAPS_ACROSS,
        1,
        taps_down,
        column,
        columns,
        blocks,
        TAPS_ACROSS,
        POINTWISE,
        WHOLE,
        PROLOGUE,
        PRECISION,
        ROWS,
        COLS,
        DEPTH,
    )
    known = column < columns
    valid = (row < rows)[:, None] & known[None, :]
    offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=known, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    y = activate(acc, tl.cast(negative_slope, tl.float32), ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=valid)
    if mean_ptr is not None:
        count = tl.minimum(rows - row_tile * ROWS, ROWS).to(tl.float32)
        value = tl.where(valid, y.to(tl.float32), 0.0)
        mean = tl.sum(value, axis=0) / count
        apart = tl.where(valid, value - mean[None, :], 0.0)
        place = row_tile.to(tl.int64) * columns + column
        tl.store(mean_ptr + place, mean, mask=known)
        tl.store(m2_ptr + place, tl.sum(apart * apart, axis=0), mask=known)


@triton.jit
def conv_bn_act_forward_merge_kernel(
    mean_ptr,  # (tiles, channels), as is the next
    m2_ptr,
    merged_count_ptr,  # (groups, channels), as are the next two
    merged_mean_ptr,
    merged_m2_ptr,
    rows,  # of all tiles
    channels,
    tiles,
    TILE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Merges groups of ROWS tiles, so that the kernel that merges the groups has few of them."""
    group = tl.program_id(0)
    tile = group * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    valid = (tile < tiles) & (channel < channels)
    offsets = tile.to(tl.int64) * channels + channel
    mean = tl.load(mean_ptr + offsets, mask=valid, other=0.0)
    m2 = tl.load(m2_ptr + offsets, mask=valid, other=0.0)
    count = tl.minimum(tl.maximum(rows - tile * TILE_ROWS, 0), TILE_ROWS).to(tl.float32)
    count, mean, m2 = merge_lanes(count + tl.zeros_like(mean), mean, m2, 0)
    places = group.to(tl.int64) * channels + channel
    tl.store(merged_count_ptr + places, count, mask=channel < channels)
    tl.store(merged_mean_ptr + places, mean, mask=channel < channels)
    tl.store(merged_m2_ptr + places, m2, mask=channel < channels)


# ---- backward: data -----------------------------------------------------------------------------


@triton.jit
def _prologue_gradient(g, x, scale, shift, slope, PROLOGUE: tl.constexpr):
    """g * act'(scale * x + shift)."""
    z = _affine(x, scale, shift)
    if PROLOGUE == "relu" or PROLOGUE == "leaky_relu":
        g = blocked_gradient(g, z <= 0, slope, PROLOGUE)
    elif PROLOGUE != "identity":
        g = smooth_gradient(g, z, PROLOGUE)
    return g


@_kernel
def conv_bn_act_backward_data_kernel(
    grad_y_ptr,
    grad_y_pixel_stride,
    filters,
    weight_ptr,
    x_ptr,  # None without a prologue
    x_pixel_stride,
    scale_ptr,
    shift_ptr,
    addend_ptr,
    mean_ptr,  # None without sums
    invstd_ptr,
    g_ptr,
    sum_g_ptr,  # (tiles of all classes, C_in), as is the next
    sum_g_xhat_ptr,
    prologue_slope,
    rows,  # pixels of this residue class
    columns,  # channels of x
    blocks,
    height,  # of x
    width,
    class_height,  # pixels of this residue class, down and across
    class_width,
    out_height,  # of grad_y
    out_width,
    stride_height,
    stride_width,
    residue_height,
    residue_width,
    top,  # what the first tap of the class's first pixel reads
    left,
    tap_height,
    tap_width,
    first_tap,
    tap_down,
    tap_across,
    taps_down,
    taps,  # of the kernel
    first_tile,  # tiles of the classes before
    TAPS_ACROSS: tl.constexpr,
    POINTWISE: tl.constexpr,
    WHOLE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, COLS)
    row_tile = tl.program_id(0) // column_tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_tiles * COLS + tl.arange(0, COLS)
    exists = row < rows
    image, y, x = _divided(row, class_height, class_width)
    acc = _taps_times_weight(
        (grad_y_ptr,),
        (grad_y_pixel_stride,),
        (filters,),
        weight_ptr,
        columns,
        taps * columns,
        1,
        None,
        None,
        0.0,
        None,
        row,
        image,
        y + top,
        x + left,
        y,
        x,
        exists,
        out_height,
        out_width,
        class_height,
        class_width,
        tap_height,
        tap_width,
        first_tap,
        tap_down,
        tap_across,
        taps_down,
        column,
        columns,
        blocks,
        TAPS_ACROSS,
        POINTWISE,
        WHOLE,
        "identity",
        PRECISION,
        ROWS,
        COLS,
        DEPTH,
    )
    if POINTWISE:
        pixel = row.to(tl.int64)[:, None]
    else:
        y = y * stride_height + residue_height
        x = x * stride_width + residue_width
        pixel = ((image * height + y) * width + x).to(tl.int64)[:, None]
    known = column < columns
    valid = exists[:, None] & known[None, :]
    offsets = pixel * columns + column[None, :]
    if addend_ptr is not None:
        acc += tl.load(addend_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    if x_ptr is not None:
        x_offsets = pixel * x_pixel_stride + column[None, :]
        value = tl.load(x_ptr + x_offsets, mask=valid, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + column, mask=known, other=0.0)[None, :]
        shift = tl.load(shift_ptr + column, mask=known, other=0.0)[None, :]
        slope = tl.cast(prologue_slope, tl.float32)
        acc = _prologue_gradient(acc, value, scale, shift, slope, PROLOGUE)
    g = acc.to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + offsets, g, mask=valid)
    if mean_ptr is not None:
        g = tl.where(valid, g.to(tl.float32), 0.0)
        mean = tl.load(mean_ptr + column, mask=known, other=0.0)
        invstd = tl.load(invstd_ptr + column, mask=known, other=0.0)
        place = (first_tile + row_tile).to(tl.int64) * columns + column
        tl.store(sum_g_ptr + place, tl.sum(g, axis=0), mask=known)
        # Where there is no element g is 0, and a mean of inf must not make a NaN of it.
        product = tl.where(valid, g * (value - mean[None, :]), 0.0)
        tl.store(sum_g_xhat_ptr + place, tl.sum(product, axis=0) * invstd, mask=known)


@triton.jit
def conv_bn_act_backward_data_merge_kernel(
    sum_g_ptr,  # (tiles, channels), as is the next
    sum_g_xhat_ptr,
    merged_g_ptr,  # (groups, channels), as is the next
    merged_g_xhat_ptr,
    channels,
    tiles,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Adds up groups of ROWS tiles, as conv_bn_act_forward_merge_kernel merges them."""
    group = tl.program_id(0)
    tile = group * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    valid = (tile < tiles) & (channel < channels)
    offsets = tile.to(tl.int64) * channels + channel
    places = group.to(tl.int64) * channels + channel
    known = channel < channels
    total = tl.sum(tl.load(sum_g_ptr + offsets, mask=valid, other=0.0), axis=0, keep_dims=True)
    tl.store(merged_g_ptr + places, total, mask=known)
    total = tl.sum(tl.load(sum_g_xhat_ptr + offsets, mask=valid, other=0.0), axis=0, keep_dims=True)
    tl.store(merged_g_xhat_ptr + places, total, mask=known)


# ---- backward: weight ---------------------------------------------------------------------------


@_kernel
def conv_bn_act_backward_weight_kernel(
    grad_y_ptr,
    grad_y_pixel_stride,
    x_ptrs,
    pixel_strides,
    widths,
    scale_ptr,
    shift_ptr,
    inside_ptr,
    grad_ptr,  # (parts, C, taps, C_in)
    prologue_slope,
    pixels,  # of y
    part_pixels,
    filters,
    channels,
    channel_blocks,  # groups of ROWS channels of x
    height,  # of x
    width,
    out_height,
    out_width,
    stride_height,
    stride_width,
    padding_height,
    padding_width,
    dilation_height,
    dilation_width,
    taps,
    TAPS_ACROSS: tl.constexpr,
    POINTWISE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile (channels of x, channels of y) of one tap, summed over one part of the pixels."""
    filter_tiles = tl.cdiv(filters, COLS)
    program = tl.program_id(0)
    column = program % filter_tiles * COLS + tl.arange(0, COLS)
    program = program // filter_tiles
    x_ptr, pixel_stride, slice_width, first_channel, first_block = _slice(
        program % channel_blocks, x_ptrs, pixel_strides, widths, ROWS
    )
    channel = (program % channel_blocks - first_block) * ROWS + tl.arange(0, ROWS)
    program = program // channel_blocks
    tap, part = program % taps, program // taps
    down = tap // TAPS_ACROSS * dilation_height - padding_height
    across = tap % TAPS_ACROSS * dilation_width - padding_width
    known, wanted = channel < slice_width, column < filters
    slope = tl.cast(prologue_slope, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + first_channel + channel, mask=known, other=0.0)[:, None]
        shift = tl.load(shift_ptr + first_channel + channel, mask=known, other=0.0)[:, None]
    acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
    end = tl.minimum(part_pixels, pixels - part * part_pixels)
    for start in range(0, end, DEPTH):
        step = start + tl.arange(0, DEPTH)
        pixel = part * part_pixels + step
        exists = step < end
        if POINTWISE:
            source, inside = pixel, exists
        else:
            image, out_y, out_x = _divided(pixel, out_height, out_width)
            y = out_y * stride_height + down
            x = out_x * stride_width + across
            inside = exists & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            source = (image * height + y) * width + x
        offsets = source.to(tl.int64)[None, :] * pixel_stride + channel[:, None]
        a = tl.load(x_ptr + offsets, mask=inside[None, :] & known[:, None], other=0.0)
        if scale_ptr is not None:
            a = _normalised(a, scale, shift, slope, PROLOGUE)
            if inside_ptr is not None:
                read = _inside(
                    inside_ptr,
                    tap,
                    taps // TAPS_ACROSS,
                    out_y,
                    out_x,
                    out_height,
                    out_width,
                    TAPS_ACROSS,
                )
                a = tl.where(read[None, :], a, 0.0)
        offsets = pixel.to(tl.int64)[:, None] * grad_y_pixel_stride + column[None, :]
        b = tl.load(grad_y_ptr + offsets, mask=exists[:, None] & wanted[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION)
    first = (part * filters + column).to(tl.int64)[None, :] * taps + tap
    offsets = first * channels + (first_channel + channel)[:, None]
    grad = acc.to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + offsets, grad, mask=known[:, None] & wanted[None, :])


@triton.jit
def conv_bn_act_backward_weight_merge_kernel(
    partial_ptr, grad_ptr, size, parts, BLOCK: tl.constexpr
):
    """Adds up the parts in their order."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = offsets < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    place = partial_ptr + offsets
    for _ in range(parts):
        total += tl.load(place, mask=valid, other=0.0)
        place += size
    tl.store(grad_ptr + offsets, total.to(grad_ptr.dtype.element_ty), mask=valid)
