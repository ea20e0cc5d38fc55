"""Memory layouts: which strides an output gets, and in which order mask bits are stored.

Every backend follows these few rules, so that an output of one can be handed to another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def is_channels_last_1d(x: Tensor) -> bool:
    """Whether ``x`` is (N, C, L) with strides (L*C, 1, C), C and L above 1."""
    if x.dim() != 3 or x.size(1) <= 1 or x.size(2) <= 1:
        return False
    return x.stride(1) == 1 and x.stride(2) == x.size(1) and x.stride(0) == x.size(1) * x.size(2)


def empty_output(x: Tensor) -> Tensor:
    """An uninitialised tensor for y or grad_x: x's size and dtype, dense.

    Its strides are those that torch's own batch norm returns (channels-last where x is, else
    contiguous); a 1-D channels-last input, which torch makes contiguous, keeps its strides.
    """
    if is_channels_last_1d(x):
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def empty_channels_last(like: Tensor, size: Sequence[int]) -> Tensor:
    """An uninitialised tensor of ``size``, (N, C, *spatial), stored as (N, *spatial, C)."""
    return like.new_empty((size[0], *size[2:], size[1])).movedim(-1, 1)


def is_channels_last(y: Tensor) -> bool:
    """Whether neighbours in memory are neighbouring channels; where C or S is 1 the two layouts
    are one, and count as channels-last."""
    channels, spatial = y.size(1), math.prod(y.shape[2:])
    return channels == 1 or spatial == 1 or not y.is_contiguous()


def is_channels_last_only(t: Tensor) -> bool:
    """Whether 4-D ``t`` is channels-last beyond doubt, not contiguous at the same time."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _memory_order(like: Tensor) -> list[int]:
    dims = list(range(like.dim()))
    return [0, *dims[2:], 1] if not like.is_contiguous() else dims


def mask_sizes(y: Tensor) -> tuple[int, int]:
    """Bytes of the 1-bit mask of a tensor of ``y``'s size: flat bits in channels-last, padded
    planes in contiguous."""
    spatial = math.prod(y.shape[2:])
    return (y.numel() + 7) // 8, y.size(0) * y.size(1) * ((spatial + 7) // 8)


def mask_size(y: Tensor) -> int:
    """Bytes of the 1-bit mask of ``y``, in its layout."""
    flat, planes = mask_sizes(y)
    return flat if is_channels_last(y) else planes


def _mask_rows(y: Tensor) -> tuple[int, int]:
    return (1, y.numel()) if is_channels_last(y) else (y.size(0) * y.size(1), -1)


def pack_mask(bits: Tensor, like: Tensor) -> Tensor:
    """uint8 mask with one bit per element of ``bits`` (bool), lowest bit first, in the memory
    order of ``like``."""
    rows, _ = _mask_rows(like)
    if bits.numel() == 0:
        return torch.zeros(0, dtype=torch.uint8, device=bits.device)
    flat = bits.permute(_memory_order(like)).reshape(rows, -1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.size(1) % 8)).view(rows, -1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (flat * weights).sum(-1, dtype=torch.uint8).flatten()


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The bool tensor, of ``like``'s size, whose bits :func:`pack_mask` stored."""
    if like.numel() == 0:
        return torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    rows, _ = _mask_rows(like)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.view(rows, -1, 1) >> shifts) & 1
    order = _memory_order(like)
    sizes = [like.size(d) for d in order]
    bits = bits.reshape(rows, -1)[:, : like.numel() // rows].reshape(sizes)
    inverse = [order.index(d) for d in range(like.dim())]
    return bits.permute(inverse).to(torch.bool)
