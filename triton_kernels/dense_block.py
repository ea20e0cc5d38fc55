"""``dense_block``: a norm on the first channels of a buffer, its backward pass into a sum over all
such norms, the gradient of a slice of the buffer from that sum, and all running statistics.

Tensors are rows of pixels, (M, C), each with a stride of its own: the first channels of a buffer
are short rows in longer ones. A tile of ROWS x COLS elements holds whole channels along its
columns, and a program does several tiles of the same channels: what is per channel is read once. A
reduction has two stages, as that of batch_norm_kernels.py, with a fixed order.

fp32, bf16 and fp16 tensors, computed in fp32. docs/math/dense_block.md has the formulas.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of a kernel are pointers and numbers, typed when it is compiled)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, blocked_gradient
from .batch_norm import merge_flags
from .batch_norm_kernels import (
    batch_norm_backward_merge_kernel,
    load_affine,
    load_float,
    pre_activation,
)
from .launch import (
    DTYPES,
    by_pixel,
    check_device,
    device_of,
    empty_channels_last,
    resident_programs,
)

_TILE = 2048  # elements: 16 per thread, two or four vectors of 16 bytes
_MAX_COLUMNS = 128
_TILES_PER_PROGRAM = 4  # of the elementwise passes
_BLOCK = 128  # channels of a program that updates running statistics


@triton.jit
def _tile(item, rows, channel, channels, ROWS: tl.constexpr):
    """Rows (ROWS, 1) of a tile, and which of its elements exist."""
    row = item * ROWS + tl.arange(0, ROWS)[:, None]
    return row, (row < rows) & (channel < channels)


@triton.jit
def dense_block_apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    invstd_ptr,
    y_ptr,
    x_stride,
    y_stride,
    rows,
    channels,
    blocks,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    channel = program % blocks * COLS + tl.arange(0, COLS)[None, :]
    mean, _, scale, bias = load_affine(
        weight_ptr, bias_ptr, mean_ptr, invstd_ptr, channel, channel < channels
    )
    for tile in range(TILES):
        row, valid = _tile(program // blocks * TILES + tile, rows, channel, channels, ROWS)
        centred = load_float(x_ptr, row * x_stride + channel, valid) - mean
        y = activate(pre_activation(centred, scale, bias), 0.0, "relu")
        tl.store(y_ptr + row * y_stride + channel, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def dense_block_accumulate_kernel(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    invstd_ptr,
    grad_sum_ptr,
    sum_grad_ptr,  # the sums of a program, (parts, channels)
    sum_grad_xhat_ptr,
    grad_stride,
    x_stride,
    sum_stride,
    rows,
    channels,
    items,
    blocks,
    parts,
    TRAINING: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part = program // blocks
    channel = program % blocks * COLS + tl.arange(0, COLS)[None, :]
    known = channel < channels
    mean, invstd, scale, bias = load_affine(
        weight_ptr, bias_ptr, mean_ptr, invstd_ptr, channel, known
    )
    factor = scale
    if TRAINING:
        if weight_ptr is None:
            factor = tl.full((1, COLS), 1.0, dtype=tl.float32)
        else:
            factor = load_float(weight_ptr, channel, known)
    sum_grad = tl.zeros((ROWS, COLS), dtype=tl.float32)
    sum_grad_centred = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for item in range(part, items, parts):
        row, valid = _tile(item, rows, channel, channels, ROWS)
        g = load_float(grad_y_ptr, row * grad_stride + channel, valid)
        centred = load_float(x_ptr, row * x_stride + channel, valid) - mean
        g = blocked_gradient(g, pre_activation(centred, scale, bias) <= 0, 0.0, "relu")
        sum_grad += tl.where(valid, g, 0.0)
        sum_grad_centred += tl.where(valid, g * centred, 0.0)
        total = g * factor
        places = grad_sum_ptr + row * sum_stride + channel
        if not FIRST:
            total += tl.load(places, mask=valid, other=0.0).to(tl.float32)
        tl.store(places, total.to(grad_sum_ptr.dtype.element_ty), mask=valid)
    offsets = part * channels + channel
    tl.store(sum_grad_ptr + offsets, tl.sum(sum_grad, axis=0, keep_dims=True), mask=known)
    total = tl.sum(sum_grad_centred, axis=0, keep_dims=True) * invstd
    tl.store(sum_grad_xhat_ptr + offsets, total, mask=known)


@triton.jit
def dense_block_gradient_kernel(
    grad_y_ptr,  # None for 0, as is grad_sum
    x_ptr,
    grad_sum_ptr,
    mean_ptr,  # None with constant statistics
    invstd_ptr,
    mean_grad_ptr,
    mean_grad_xhat_ptr,
    out_ptr,
    grad_stride,
    x_stride,
    sum_stride,
    rows,
    channels,
    blocks,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    channel = program % blocks * COLS + tl.arange(0, COLS)[None, :]
    known = channel < channels
    if mean_ptr is not None:
        mean = load_float(mean_ptr, channel, known)
        invstd = load_float(invstd_ptr, channel, known)
        mean_grad = load_float(mean_grad_ptr, channel, known)
        slope = invstd * load_float(mean_grad_xhat_ptr, channel, known)
    for tile in range(TILES):
        row, valid = _tile(program // blocks * TILES + tile, rows, channel, channels, ROWS)
        g = tl.zeros((ROWS, COLS), dtype=tl.float32)
        if grad_sum_ptr is not None:
            g = load_float(grad_sum_ptr, row * sum_stride + channel, valid)
            if mean_ptr is not None:
                centred = load_float(x_ptr, row * x_stride + channel, valid) - mean
                g = (g - mean_grad - centred * slope) * invstd
        if grad_y_ptr is not None:
            g += load_float(grad_y_ptr, row * grad_stride + channel, valid)
        tl.store(out_ptr + row * channels + channel, g.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _move_towards(running_ptr, batch, keep, momentum, channel, valid):
    new = keep * load_float(running_ptr, channel, valid) + momentum * batch
    tl.store(running_ptr + channel, new.to(running_ptr.dtype.element_ty), mask=valid)


@triton.jit
def dense_block_update_running_kernel(
    mean_ptr,
    var_ptr,
    running_mean_ptrs,  # of each consumer, as are the next four
    running_var_ptrs,
    channels,
    momenta,
    keeps,  # 1 - momentum
    unbiased,  # M / (M - 1)
    widest,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mean = load_float(mean_ptr, channel, channel < widest)
    var = load_float(var_ptr, channel, channel < widest) * tl.cast(unbiased, tl.float32)
    for i in tl.static_range(len(running_mean_ptrs)):
        valid = channel < channels[i]
        keep, momentum = tl.cast(keeps[i], tl.float32), tl.cast(momenta[i], tl.float32)
        _move_towards(running_mean_ptrs[i], mean, keep, momentum, channel, valid)
        _move_towards(running_var_ptrs[i], var, keep, momentum, channel, valid)


# ---- launchers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Walk:
    """How rows are cut into tiles."""

    rows: int
    channels: int
    tile_rows: int
    tile_cols: int

    @classmethod
    def of(cls, t: Tensor, channels: int, tile: int = _TILE) -> _Walk:
        """Of the rows of ``t``, not empty, and so many channels."""
        rows = t.size(0) * t.size(2) * t.size(3)
        cols = min(triton.next_power_of_2(channels), _MAX_COLUMNS)
        return cls(rows, channels, min(triton.next_power_of_2(rows), tile // cols), cols)

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.channels, self.tile_cols)

    @property
    def items(self) -> int:
        return triton.cdiv(self.rows, self.tile_rows)

    def elementwise(self) -> tuple[tuple[int], dict[str, int]]:
        """The grid, and flags."""
        tiles = min(_TILES_PER_PROGRAM, self.items)
        return (self.blocks * triton.cdiv(self.items, tiles),), {"TILES": tiles, **self.flags()}

    def flags(self) -> dict[str, int]:
        return {"ROWS": self.tile_rows, "COLS": self.tile_cols}


def dense_block_apply(
    buffer: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    y: Tensor,
) -> None:
    """Write relu( weight * (x - mean) * invstd + bias ) to ``y``, x the buffer's first C channels.

    Raises:
        NotImplementedError: a dtype that these kernels do not have.
        ValueError: a size or a dtype that does not fit.
    """
    channels = _check_norm(buffer, weight, bias, mean, invstd)
    _check_images("y", y, buffer, channels)
    if y.numel() == 0:
        return
    x, x_stride = by_pixel(buffer[:, :channels])
    out, y_stride = by_pixel(y)
    walk = _Walk.of(y, channels)
    grid, flags = walk.elementwise()
    with device_of(buffer):
        dense_block_apply_kernel[grid](
            x,
            *_contiguous(weight, bias, mean, invstd),
            out,
            x_stride,
            y_stride,
            walk.rows,
            channels,
            walk.blocks,
            **flags,
        )
    if out is not y:
        y.copy_(out)


def dense_block_accumulate(
    grad_y: Tensor,
    buffer: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    grad_sum: Tensor,
    training: bool,
    first: bool,
) -> tuple[Tensor, Tensor]:
    """Add weight * g, with constant statistics weight * invstd * g, to the first C channels of
    ``grad_sum``, or store it there; sum(g) and sum(g * xhat) per channel.

    Raises:
        NotImplementedError: a dtype that these kernels do not have.
        ValueError: a size or a dtype that does not fit.
    """
    channels = _check_norm(buffer, weight, bias, mean, invstd)
    _check_images("grad_y", grad_y, buffer, channels)
    _check_images("grad_sum", grad_sum, buffer, channels, is_sum=True)
    sums = [torch.zeros(channels, dtype=torch.float32, device=buffer.device) for _ in range(2)]
    if grad_y.numel() == 0:
        return sums[0], sums[1]
    g, grad_stride = by_pixel(grad_y)
    x, x_stride = by_pixel(buffer[:, :channels])
    target = grad_sum[:, :channels]
    total, sum_stride = by_pixel(target)
    walk = _Walk.of(grad_y, channels)
    parts = min(walk.items, triton.cdiv(resident_programs(buffer.device), walk.blocks))
    partial = torch.empty(2, parts, channels, dtype=torch.float32, device=buffer.device)
    flags = merge_flags(parts, channels)
    with device_of(buffer):
        dense_block_accumulate_kernel[(walk.blocks * parts,)](
            g,
            x,
            *_contiguous(weight, bias, mean, invstd),
            total,
            *partial,
            grad_stride,
            x_stride,
            sum_stride,
            walk.rows,
            channels,
            walk.items,
            walk.blocks,
            parts,
            TRAINING=training,
            FIRST=first,
            **walk.flags(),
        )
        batch_norm_backward_merge_kernel[(triton.cdiv(channels, flags["COLS"]),)](
            *partial, *sums, channels, parts, **flags
        )
    if total is not target:
        target.copy_(total)
    return sums[0], sums[1]


def dense_block_gradient(
    grad_y: Tensor | None,
    buffer: Tensor,
    grad_sum: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    mean_grad: Tensor | None,
    mean_grad_xhat: Tensor | None,
    begin: int,
    end: int,
) -> Tensor:
    """[grad_y] + invstd * (grad_sum - mean_grad - xhat * mean_grad_xhat) of the buffer's channels
    [begin, end), channels-last; without the four vectors [grad_y] + grad_sum.

    Raises:
        NotImplementedError: a dtype that these kernels do not have.
        ValueError: a size or a dtype that does not fit; some of the vectors without the others.
    """
    _check_buffer(buffer)
    if not 0 <= begin <= end <= buffer.size(1):
        raise ValueError(
            f"channels [{begin}, {end}) should lie in the buffer of size {list(buffer.shape)}"
        )
    channels = end - begin
    if grad_y is not None:
        _check_images("grad_y", grad_y, buffer, buffer.size(1))
    if grad_sum is not None:
        _check_images("grad_sum", grad_sum, buffer, end, is_sum=True)
    vectors = {
        "mean": mean,
        "invstd": invstd,
        "mean_grad": mean_grad,
        "mean_grad_xhat": mean_grad_xhat,
    }
    given = [t for t in vectors.values() if t is not None]
    if given and (len(given) < len(vectors) or grad_sum is None):
        raise ValueError(f"{', '.join(vectors)} and grad_sum should be given together")
    _check_vectors(buffer, channels, (torch.float32,), **vectors)
    out = empty_channels_last((buffer.size(0), channels, *buffer.shape[2:]), buffer)
    if out.numel() == 0:
        return out

    def of_slice(t: Tensor | None) -> tuple[Tensor | None, int]:
        return (None, 0) if t is None else by_pixel(t[:, begin:end])

    (g, grad_stride), (x, x_stride), (total, sum_stride) = map(of_slice, (grad_y, buffer, grad_sum))
    # Beside 16 bits a sum in float32 takes the registers of half a tile.
    wide_sum = total is not None and total.element_size() > out.element_size()
    walk = _Walk.of(out, channels, _TILE // 2 if wide_sum else _TILE)
    grid, flags = walk.elementwise()
    with device_of(buffer):
        dense_block_gradient_kernel[grid](
            g,
            x,
            total,
            *_contiguous(*vectors.values()),
            out,
            grad_stride,
            x_stride,
            sum_stride,
            walk.rows,
            channels,
            walk.blocks,
            **flags,
        )
    return out


def dense_block_update_running(
    mean: Tensor,
    var: Tensor,
    count: int,
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    momenta: Sequence[float],
) -> None:
    """running = (1 - momentum) * running + momentum * batch, with the unbiased variance, of the
    first channels for each consumer.

    Raises:
        NotImplementedError: a dtype that these kernels do not have.
        ValueError: a size or a dtype that does not fit, or lists that are not as many.
    """
    check_device("dense_block", mean)
    _check_vectors(mean, mean.numel(), (torch.float32,), mean=mean, var=var)
    if not len(running_means) == len(running_vars) == len(momenta):
        raise ValueError(
            "running_means, running_vars and momenta should be as many, but got "
            f"{len(running_means)}, {len(running_vars)} and {len(momenta)}"
        )
    for running_mean, running_var in zip(running_means, running_vars, strict=True):
        channels = min(running_mean.numel(), mean.numel())
        vectors = {"running_means": running_mean, "running_vars": running_var}
        _check_vectors(mean, channels, DTYPES, **vectors)
    if mean.numel() == 0 or len(momenta) == 0:
        return
    written = [*running_means, *running_vars]
    updated = [t.contiguous() for t in written]
    consumers = len(momenta)
    with device_of(mean):
        dense_block_update_running_kernel[(triton.cdiv(mean.numel(), _BLOCK),)](
            mean.contiguous(),
            var.contiguous(),
            tuple(updated[:consumers]),
            tuple(updated[consumers:]),
            tuple(t.numel() for t in running_means),
            tuple(float(momentum) for momentum in momenta),
            tuple(1.0 - momentum for momentum in momenta),
            count / max(count - 1, 1),
            mean.numel(),
            BLOCK=_BLOCK,
        )
    for given, new in zip(written, updated, strict=True):
        if new is not given:
            given.copy_(new)


# ---- checks -------------------------------------------------------------------------------------


def _check_buffer(buffer: Tensor) -> None:
    check_device("dense_block", buffer)
    if buffer.dtype not in DTYPES:
        raise NotImplementedError(f'"dense_block" of triton not implemented for {buffer.dtype}')
    if buffer.dim() != 4:
        raise ValueError(
            f"dense_block expects a buffer of size (N, C, H, W), but got size {list(buffer.shape)}"
        )


def _check_norm(
    buffer: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor
) -> int:
    """Raise for what does not fit; the number of channels that the norm reads."""
    _check_buffer(buffer)
    channels = mean.numel()
    if channels > buffer.size(1):
        raise ValueError(
            f"mean should contain at most the {buffer.size(1)} channels of the buffer, but has "
            f"{channels} elements"
        )
    _check_vectors(buffer, channels, (torch.float32,), mean=mean, invstd=invstd)
    _check_vectors(buffer, channels, (buffer.dtype, torch.float32), weight=weight, bias=bias)
    return channels


def _check_vectors(
    like: Tensor, channels: int, dtypes: tuple[torch.dtype, ...], **vectors: Tensor | None
) -> None:
    for name, t in vectors.items():
        if t is not None and (
            tuple(t.shape) != (channels,) or t.dtype not in dtypes or t.device != like.device
        ):
            wanted = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
            raise ValueError(
                f"{name} should be {wanted} of size [{channels}] on {like.device}, but got "
                f"{t.dtype} of size {list(t.shape)} on {t.device}"
            )


def _check_images(
    name: str, t: Tensor, buffer: Tensor, channels: int, is_sum: bool = False
) -> None:
    """``t`` is beside the buffer; a sum may have more channels, and be of float32."""
    fits = t.dim() == 4 and (t.size(0), t.shape[2:]) == (buffer.size(0), buffer.shape[2:])
    enough = fits and (t.size(1) == channels or (is_sum and t.size(1) >= channels))
    dtypes = (buffer.dtype, torch.float32) if is_sum else (buffer.dtype,)
    if not enough or t.dtype not in dtypes or t.device != buffer.device:
        size = [buffer.size(0), channels, *buffer.shape[2:]]
        raise ValueError(
            f"{name} should be {' or '.join(map(str, dict.fromkeys(dtypes)))} of size {size} on "
            f"{buffer.device}, but got {t.dtype} of size {list(t.shape)} on {t.device}"
        )


def _contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in vectors]
