"""``batch_norm``: the four phases, and the forward and backward passes put together from them.

A reduction is two launches, an elementwise pass one: training is three each way. How a tensor is
cut into tiles, and why, is at the head of batch_norm_kernels.py.

fp32, bf16 and fp16 tensors, computed in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .activation import ACTIVATIONS, MASKED, SMOOTH
from .batch_norm_kernels import (
    batch_norm_apply_kernel,
    batch_norm_backward_apply_kernel,
    batch_norm_backward_merge_kernel,
    batch_norm_backward_reduce_kernel,
    batch_norm_frozen_kernel,
    batch_norm_statistics_kernel,
    batch_norm_statistics_merge_kernel,
)
from .launch import check_like, dense, device_of, empty_output, resident_programs

_FOLD = 16  # elements; rows of the folded matrix start on multiples of it
_TILE = 2048  # elements: 16 per thread, two or four vectors of 16 bytes
_MAX_COLUMNS = 128  # of a channels-last tile
_TILES_PER_PROGRAM = 4  # of the elementwise passes


@dataclass(frozen=True)
class _Walk:
    """How a dense tensor is cut into tiles; see the head of batch_norm_kernels.py."""

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
        return min(self.items, triton.cdiv(resident_programs(device), self.blocks))

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


def merge_flags(parts: int, channels: int) -> dict[str, int]:
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
            flags = merge_flags(parts, C)
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
            flags = merge_flags(parts, C)
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
        flags = merge_flags(parts * walk.fold, C)
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
    sum_grad = sum_grad_xhat = None
    grads = [mean.new_empty(0), mean.new_empty(0)]
    if need_weight or need_bias or (need_x and training):
        sum_grad, sum_grad_xhat = batch_norm_backward_reduce(*saved, activation, negative_slope)
        grads = [sum_grad_xhat if need_weight else grads[0], sum_grad if need_bias else grads[1]]
    count = max(x.numel() // max(x.size(1), 1), 1)
    grad_x, grad_residual = _backward_apply(
        *saved,
        sum_grad if training else None,
        sum_grad_xhat if training else None,
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
