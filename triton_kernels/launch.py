"""What every launcher needs: dense operands in the memory order of the output, and its device."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor
from torch._prims_common import suggest_memory_format

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = {"cuda", "cpu"} if triton.knobs.runtime.interpret else {"cuda"}


def empty_output(x: Tensor) -> Tensor:
    """As resops.reference.layout.empty_output."""
    if x.dim() == 3 and x.size(1) > 1 and x.size(2) > 1:
        strides = (x.size(1) * x.size(2), 1, x.size(1))
        if x.stride() == strides:
            return torch.empty_strided(x.size(), strides, dtype=x.dtype, device=x.device)
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def dense(t: Tensor, like: Tensor) -> Tensor:
    """The values of ``t`` in the memory order of ``like``: ``t`` itself where it has it."""
    if t.stride() == like.stride():
        return t
    return torch.empty_like(like).copy_(t)


def pixel_stride_of(t: Tensor) -> int | None:
    """Elements from one pixel of (N, C, H, W) to the next; None where memory has another order."""
    N, C, H, W = t.shape
    if C > 1 and t.stride(1) != 1:
        return None
    steps = [
        (n, s) for n, s in zip((W, H, N), (t.stride(3), t.stride(2), t.stride(0)), strict=True)
    ]
    pixel_stride, expected = C, None
    for count, step in steps:
        if count == 1:
            continue
        if expected is None:
            pixel_stride = step
        elif step != expected:
            return None
        expected = step * count
    return pixel_stride


def by_pixel(t: Tensor) -> tuple[Tensor, int]:
    """``t`` where its pixels have one distance, else a copy, and that distance."""
    pixel_stride = pixel_stride_of(t)
    if pixel_stride is None or pixel_stride >= 2**31:
        return channels_last(t), t.size(1)
    return t, pixel_stride


def channels_last(t: Tensor) -> Tensor:
    """``t``, dense with its channels innermost."""
    if pixel_stride_of(t) == t.size(1):
        return t
    return empty_channels_last(t.shape, t).copy_(t)


def empty_channels_last(size: tuple[int, ...] | list[int], like: Tensor) -> Tensor:
    """(N, C, H, W), with its channels innermost."""
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter is one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def resident_programs(device: torch.device) -> int:
    """Programs of 4 warps that run at a time: as many as fit with 64 registers a thread."""
    return 8 * processors(device)


def check_device(op: str, x: Tensor) -> None:
    """Raise unless kernels can run where ``x`` is."""
    if x.device.type not in DEVICES:
        raise NotImplementedError(
            f"{op} of triton has no kernel for {x.device.type} tensors"
            + (", unless TRITON_INTERPRET=1 is set when Python starts" * (x.device.type == "cpu"))
        )


def check_like(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless the kernels take the dtype of ``like``, and all tensors are like it."""
    if like.dtype not in DTYPES:
        raise NotImplementedError(f'"{op}" of triton not implemented for {like.dtype}')
    for name, t in tensors.items():
        if t is not None and (
            (t.shape, t.dtype, t.device) != (like.shape, like.dtype, like.device)
        ):
            raise ValueError(
                f"{name} should be {like.dtype} of size {list(like.shape)} on {like.device}, but "
                f"got {t.dtype} of size {list(t.shape)} on {t.device}"
            )
