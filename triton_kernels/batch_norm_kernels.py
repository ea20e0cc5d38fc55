"""The kernels of ``batch_norm``; batch_norm.py launches them.

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

import triton
import triton.language as tl

from .activation import activate, blocked_gradient, smooth_gradient

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
    begin = row.to(tl.int64) * width
    offsets = begin + column
    valid = exists & (column < width)
    if RAGGED:  # in 64 bits for a row, not for an element
        left = tl.minimum(numel - begin, width).to(column.dtype)
        valid = valid & (column < left)
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
def load_float(ptr, offsets, valid):
    return tl.load(ptr + offsets, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def load_affine(weight_ptr, bias_ptr, mean_ptr, invstd_ptr, channel, exists):
    """mean, invstd, weight * invstd and bias of a block's channels."""
    mean = load_float(mean_ptr, channel, exists)
    invstd = load_float(invstd_ptr, channel, exists)
    scale = invstd
    if weight_ptr is not None:
        scale = load_float(weight_ptr, channel, exists) * invstd
    bias = tl.zeros_like(mean)
    if bias_ptr is not None:
        bias = load_float(bias_ptr, channel, exists)
    return mean, invstd, scale, bias


# ---- statistics ---------------------------------------------------------------------------------


@triton.jit
def merge_lanes(count, mean, m2, AXIS: tl.constexpr):
    """Chan's merge of all lanes along an axis: M2 = sum(M2_i + n_i * (mean_i - mean)^2).

    Means are averaged as distances from one of them: equal ones stay what they are. As distances
    from that average they are averaged again, which leaves little more than the rounding of the
    result: where few elements have a gradient, the error of the mean is that of their sum.
    """
    total = tl.sum(count, axis=AXIS, keep_dims=True)
    anchor = tl.max(tl.where(count > 0, mean, float("-inf")), axis=AXIS, keep_dims=True)
    anchor = tl.where(total > 0, anchor, 0.0)
    share = count / tl.maximum(total, 1.0)
    apart = tl.where(count > 0, mean - anchor, 0.0)
    merged = anchor + tl.sum(apart * share, axis=AXIS, keep_dims=True)
    apart = tl.where(count > 0, mean - merged, 0.0)
    merged += tl.sum(apart * share, axis=AXIS, keep_dims=True)
    apart = tl.where(count > 0, mean - merged, 0.0)
    return total, merged, tl.sum(m2 + apart * apart * count, axis=AXIS, keep_dims=True)


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
        x = load_float(x_ptr, offsets, valid)
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
    count, mean, m2 = merge_lanes(count, mean, m2, 0 if LAST else 1)
    if LAST:
        columns = width
        column = block * COLS + tl.arange(0, COLS)[None, :]
    else:
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
        more = load_float(count_ptr, offsets, valid)
        delta = load_float(mean_ptr, offsets, valid) - mean
        delta = tl.where(more > 0, delta, 0.0)
        count_before = count
        count += more
        share = more / tl.maximum(count, 1.0)
        mean += delta * share
        m2 += load_float(m2_ptr, offsets, valid) + delta * (count_before * share) * delta
    count, mean, m2 = merge_lanes(count, mean, m2, 0)
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
        value = old * load_float(running_mean_ptr, channel, valid) + new * mean
        tl.store(
            running_mean_ptr + channel, value.to(running_mean_ptr.dtype.element_ty), mask=valid
        )
        var *= tl.cast(unbiased, tl.float32)
        value = old * load_float(running_var_ptr, channel, valid) + new * var
        tl.store(running_var_ptr + channel, value.to(running_var_ptr.dtype.element_ty), mask=valid)


@triton.jit
def batch_norm_frozen_kernel(
    running_mean_ptr, running_var_ptr, mean_ptr, invstd_ptr, eps, channels, COLS: tl.constexpr
):
    """Mean and invstd of frozen statistics: copies, which a later update leaves alone."""
    channel = tl.program_id(0) * COLS + tl.arange(0, COLS)
    valid = channel < channels
    var = load_float(running_var_ptr, channel, valid)
    tl.store(mean_ptr + channel, load_float(running_mean_ptr, channel, valid), mask=valid)
    invstd = tl.div_rn(1.0, tl.sqrt_rn(var + tl.cast(eps, tl.float32)))
    tl.store(invstd_ptr + channel, invstd, mask=valid)


# ---- apply --------------------------------------------------------------------------------------


@triton.jit
def pre_activation(centred, scale, bias):
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
    mean, _, scale, bias = load_affine(weight_ptr, bias_ptr, mean_ptr, invstd_ptr, channel, known)
    slope = tl.cast(negative_slope, tl.float32)
    for tile in range(TILES):
        item = group * TILES + (TILES - 1 - tile)
        row, exists, first = _tile_corner(item, block, channels, batch, rows, LAST, ROWS, COLS)
        offsets, valid = _elements(row, exists, first, width, numel, RAGGED, COLS)
        z = pre_activation(load_float(x_ptr, offsets, valid) - mean, scale, bias)
        if residual_ptr is not None:
            z += load_float(residual_ptr, offsets, valid)
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
    g = load_float(grad_y_ptr, offsets, valid)
    centred = load_float(x_ptr, offsets, valid) - mean
    if ACTIVATION == "relu" or ACTIVATION == "leaky_relu":
        if mask_ptr is not None:
            places, inside = _mask_bytes(row, exists, first, width, numel, RAGGED, COLS)
            packed = tl.load(mask_ptr + places, mask=inside, other=0)
            blocked = _unpack(packed, ROWS, COLS) == 0
        else:
            blocked = pre_activation(centred, scale, bias) <= 0
        g = blocked_gradient(g, blocked, slope, ACTIVATION)
    elif ACTIVATION != "identity":
        z = pre_activation(centred, scale, bias)
        if residual_ptr is not None:
            z += load_float(residual_ptr, offsets, valid)
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
    mean, invstd, scale, bias = load_affine(
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
    AXIS: tl.constexpr = 0 if LAST else 1
    if LAST:
        columns = width
        column = block * COLS + tl.arange(0, COLS)[None, :]
    else:
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
        sum_grad += load_float(sum_grad_ptr, offsets, valid)
        sum_grad_xhat += load_float(sum_grad_xhat_ptr, offsets, valid)
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
    mean, invstd, scale, bias = load_affine(
        weight_ptr, bias_ptr, mean_ptr, invstd_ptr, channel, known
    )
    if sum_grad_ptr is not None:
        size = tl.cast(count, tl.float32)
        mean_grad = load_float(sum_grad_ptr, channel, known) / size
        mean_grad_xhat = load_float(sum_grad_xhat_ptr, channel, known) / size
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
