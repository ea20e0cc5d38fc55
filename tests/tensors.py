"""Test data: memory layouts inside NaN margins, exactly summable values, huge lazy memory."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Elements before and after the data; odd, so that nothing starts at a vector boundary. There are
# none under AddressSanitizer, which watches the ends of memory itself: memory ends with the data.
MARGIN = int(os.environ.get("RESOPS_TEST_MARGIN", "67"))

Strides = tuple[int, ...]


def _strides_of_order(size: Sequence[int], order: Sequence[int], pad: Sequence[int]) -> Strides:
    """Strides of dimensions laid out outermost first in ``order``; ``pad`` elements of gap are
    added after each of them, in the same order."""
    strides = [0] * len(size)
    step = 1
    for dim, gap in zip(reversed(order), reversed(pad), strict=True):
        strides[dim] = step
        step = step * (size[dim] + gap)
    return tuple(strides)


def _order(name: str) -> Callable[[Sequence[int]], Strides]:
    def strides(size: Sequence[int]) -> Strides:
        if len(size) == 1:
            return (1,)
        spatial = list(range(2, len(size)))
        order = {
            "contiguous": [0, 1, *spatial],
            "channels_last": [0, *spatial, 1],
            "channels_outermost": [1, 0, *spatial],
            "batch_innermost": [1, *spatial, 0],
            "spatial_swapped": [0, 1, *spatial[::-1]],
            "all_reversed": [*spatial[::-1], 1, 0],
        }[name]
        return _strides_of_order(size, order, [0] * len(size))

    return strides


def _padded_channels_last(size: Sequence[int]) -> Strides:
    order = [0, *range(2, len(size)), 1]
    return _strides_of_order(size, order, [0] * (len(size) - 1) + [3])


def _padded_contiguous(size: Sequence[int]) -> Strides:
    return _strides_of_order(size, range(len(size)), [0, 1, *[2] * (len(size) - 2)])


def _every_second(size: Sequence[int]) -> Strides:
    """x[:, ::2, ..., ::3] of a contiguous tensor: no dimension has stride 1."""
    strides = [3 * s for s in _strides_of_order(size, range(len(size)), [0] * len(size))]
    for dim in (0, 1):
        strides[dim] *= 2
    return tuple(strides)


def _expanded_batch(size: Sequence[int]) -> Strides:
    return (0, *_order("contiguous")([1, *size[1:]])[1:])


def _expanded_spatial(size: Sequence[int]) -> Strides:
    return (size[1], 1, *[0] * (len(size) - 2))


def _expanded(size: Sequence[int]) -> Strides:
    return (0,) * len(size)


DENSE_LAYOUTS: dict[str, Callable[[Sequence[int]], Strides]] = {
    "contiguous": _order("contiguous"),
    "channels_last": _order("channels_last"),
}
STRANGE_LAYOUTS: dict[str, Callable[[Sequence[int]], Strides]] = {
    **{
        name: _order(name)
        for name in (
            "channels_outermost",
            "batch_innermost",
            "spatial_swapped",
            "all_reversed",
        )
    },
    "padded_channels_last": _padded_channels_last,
    "padded_contiguous": _padded_contiguous,
    "every_second": _every_second,
}
# Several elements share memory; the values of the first along such a dimension are taken.
EXPANDED_LAYOUTS: dict[str, Callable[[Sequence[int]], Strides]] = {
    "expanded_batch": _expanded_batch,
    "expanded_spatial": _expanded_spatial,
    "expanded": _expanded,
}
LAYOUTS = {**DENSE_LAYOUTS, **STRANGE_LAYOUTS, **EXPANDED_LAYOUTS}


@dataclass
class Guarded:
    """A tensor and the memory around it, which is NaN (255 for integers)."""

    tensor: Tensor
    buffer: Tensor
    _before: Tensor

    def remember(self) -> None:
        """Take the present contents for the original ones."""
        self._before = _bits(self.buffer)

    def assert_untouched(self) -> None:
        """Nothing was written, neither into the tensor nor around it."""
        assert torch.equal(_bits(self.buffer), self._before), "an input was written to"

    def assert_margins_untouched(self) -> None:
        """Nothing was written around the tensor, which itself may have changed."""
        inside = torch.zeros(self.buffer.numel(), dtype=torch.bool)
        inside.as_strided(
            self.tensor.size(), self.tensor.stride(), self.tensor.storage_offset()
        ).fill_(True)
        changed = (_bits(self.buffer) != self._before) & ~inside
        assert not changed.any(), f"written outside, at {changed.nonzero().flatten().tolist()[:5]}"


def _bits(t: Tensor) -> Tensor:
    """A copy of ``t``'s bits as integers: NaN equals itself there."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[t.element_size()]
    return t.detach().clone().view(integer)


def guarded(values: Tensor, layout: str = "contiguous", offset: int = 0) -> Guarded:
    """``values`` in memory of the named layout; gaps and margins hold NaN.

    Args:
        layout: one of LAYOUTS; for an expanded one the values are those of the first element
            along the expanded dimensions.
        offset: elements by which the data is moved: another alignment.
    """
    size = values.size()
    strides = LAYOUTS[layout](size)
    extent = 1 + sum((n - 1) * s for n, s in zip(size, strides, strict=True) if n > 0)
    extent = 0 if values.numel() == 0 else extent
    poison = math.nan if values.dtype.is_floating_point else 255
    buffer = torch.full((extent + offset + 2 * MARGIN,), poison, dtype=values.dtype)
    view = buffer.as_strided(size, strides, MARGIN + offset)
    if 0 in strides and values.numel() > 0:
        first = values[tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)]
        buffer.as_strided(first.size(), strides, view.storage_offset()).copy_(first)
    else:
        view.copy_(values)
    return Guarded(view, buffer, _bits(buffer))


def in_layout(values: Tensor, layout: str, offset: int = 0) -> Tensor:
    """:func:`guarded` where only the tensor is needed."""
    return guarded(values, layout, offset).tensor


def exact_batch(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Values whose mean and variance are exact in float32 for any order of summation.

    The mean of a channel is a signed power of two, 8 units; to it integers of units are added
    that cancel in pairs (one 0 is left over where the count is odd), in an order of their own.
    Every partial sum, of values or of squares, shifted by any of the values or not, is an integer
    of units below 2^24, so no addition rounds. An element that is skipped, counted twice or taken
    from another channel changes the sum. (The idea is that of oneDNN's benchdnn.)

    Returns:
        x (contiguous), and its exact mean and biased variance per channel, float64.
    """
    N, C, *spatial = shape
    M = N * math.prod(spatial)
    generator = np.random.default_rng(seed)
    largest = int(min(7, math.isqrt(2**24 // max(M, 1))))
    assert largest >= 1 and 15 * M < 2**24, f"{M} values per channel are too many"
    half = generator.integers(1, largest + 1, size=(C, M // 2))
    offsets = np.concatenate([half, -half, np.zeros((C, M % 2), dtype=half.dtype)], axis=1)
    offsets = generator.permuted(offsets, axis=1)
    unit = 2.0 ** generator.integers(-4, 3, size=(C, 1))
    sign = generator.choice([-1.0, 1.0], size=(C, 1))
    values = (8 * sign + offsets) * unit
    x = torch.from_numpy(values.reshape(C, N, *spatial)).transpose(0, 1).contiguous()
    mean = torch.from_numpy((8 * sign * unit)[:, 0].copy())
    var = torch.from_numpy((offsets**2).sum(1) / max(M, 1) * unit[:, 0] ** 2)
    exact = x.to(dtype)
    assert torch.equal(exact.double(), x)
    return exact, mean, var


def lazy_zeros(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which the kernel gives memory only to what is touched: gigabytes of addresses."""
    memory = mmap.mmap(-1, numel * torch.empty(0, dtype=dtype).element_size())
    return torch.frombuffer(memory, dtype=dtype)


def ulps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers lie between ``a`` and ``b``, of one sign and dtype."""
    assert a.dtype == b.dtype and torch.equal(a.sign(), b.sign())
    integer = torch.int64 if a.dtype == torch.float64 else torch.int32
    return (a.contiguous().view(integer) - b.contiguous().view(integer)).abs()


def in_poison(t: Tensor) -> Tensor:
    """The same values inside a tensor with more channels, rows and columns, which are NaN."""
    n, c, h, w = t.shape
    wide = t.new_full((n, c + 7, h + 2, w + 3), float("nan")).contiguous(
        memory_format=torch.channels_last
    )
    inner = wide[:, 3 : 3 + c, 1 : 1 + h, 2 : 2 + w]
    inner.copy_(t)
    return inner
