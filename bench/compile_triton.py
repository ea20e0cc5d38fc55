"""Compiles the Triton kernels that the gate launches into Triton's own cache, in several processes.

    python -m bench.compile_triton CAPABILITY [--processes N]      for example 90

Each process calls the launchers as the gate's tests and timings do, on tensors of the CPU and with
every launch recorded instead of done, and compiles its share of the distinct ones: for each the key
in the cache is that which the launch will look up on the GPU (tests/bench compares the two). A
kernel differs with the types of its arguments, and with which sizes are 1 or multiples of 16.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench import gpu_convolutions
from bench.convolution_shapes import NETWORKS
from bench.gpu_convolutions import Case
from bench.session import DTYPES
from bench.shapes import DENSENET121, RESNET50, BatchNormShape

if TYPE_CHECKING:
    from tests.interpreter.ahead_of_time import Launch

BATCH = 256
DENSENET_BATCH, GROWTH = 128, 32  # of the gate's DenseNet-121
# Channels and size of the input of each of its blocks, and its layers.
DENSENET_BLOCKS = ((64, 56, 6), (128, 28, 12), (256, 14, 24), (512, 7, 16))
HALF = (torch.bfloat16, torch.float16)
RELU = ("relu", 0.0)


def kernels(op: str) -> Any:
    """The launchers of an op."""
    return importlib.import_module(f"resops.triton_kernels.{op}")


def images(channels: int, size: int, batch: int, dtype: torch.dtype) -> Tensor:
    """Channels-last, of memory that nobody touches."""
    shape = (batch, channels, size, size)
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def vectors(count: int, channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.empty(channels, dtype=dtype) for _ in range(count)]


def batch_norm(shape: BatchNormShape, batch: int, dtype: torch.dtype) -> None:
    """A training step of a norm."""
    op = kernels("batch_norm")
    x = images(shape.channels, shape.height, batch, dtype)
    residual = torch.empty_like(x) if shape.residual else None
    weight, bias, *running = vectors(4, shape.channels)
    act = RELU if shape.relu else ("identity", 0.0)
    y, mean, invstd, mask = op.batch_norm_forward(
        x, residual, weight, bias, *running, True, 0.1, 1e-5, *act
    )
    wanted = [True, residual is not None, True, True]
    op.batch_norm_backward(y, x, None, mask, weight, bias, mean, invstd, True, *act, wanted)


def convolution(case: Case) -> None:
    """The fused phase, and the phases of batch norm that go with the library's."""
    op, norm = kernels("conv_bn_act"), kernels("batch_norm")
    shape, dtype = case.shape, DTYPES[case.dtype]
    x = images(shape.channels_in, shape.size, case.batch, dtype)
    y = images(shape.channels, shape.output_size, case.batch, dtype)
    taps = (shape.channels, shape.channels_in, shape.kernel, shape.kernel)
    weight = torch.empty(taps, dtype=dtype, memory_format=torch.channels_last)
    statistics, affine = vectors(2, shape.channels_in), vectors(2, shape.channels_in)
    before: tuple[Any, ...] = (None, None, "identity", 0.0)
    normed: tuple[Any, ...] = (None, *before, None, None, None)
    if shape.prologue:
        before = (*affine, *RELU)
        normed = (x, *before, *statistics, None)
    geometry = case.geometry.lists()
    if case.phase == "forward":
        op.conv_bn_act_forward([x], *before, weight, None, None, "identity", 0.0, *geometry, True)
        norm.batch_norm_statistics(y)
    elif case.phase == "backward_data":
        op.conv_bn_act_backward_data(y, weight, list(x.shape), *normed, *geometry)
    else:
        op.conv_bn_act_backward_weight(y, [x], *before, list(taps), *geometry)
    if shape.prologue:
        gradient = case.phase == "backward_data"
        saved = (*affine, *statistics, *RELU)
        if gradient:
            norm.batch_norm_backward_reduce(x, x, None, None, *saved)
        else:
            norm.batch_norm_apply(x, None, *saved)


def dense_block(channels: int, size: int, layers: int, dtype: torch.dtype) -> None:
    """A training step of a block of DenseNet-121 and its transition, but for the convolutions."""
    op, norm = kernels("dense_block"), kernels("batch_norm")
    widths = [channels + GROWTH * i for i in range(layers + 1)]
    last = size == 7  # no transition follows, and the gradient comes from outside
    buffer, grad_sum = (images(widths[-1], size, DENSENET_BATCH, dtype) for _ in range(2))
    outside = torch.empty_like(buffer) if last else None
    consumers = widths[:-1] if last else widths
    for width in consumers:
        y, statistics = images(width, size, DENSENET_BATCH, dtype), vectors(2, width)
        for affine in (vectors(2, width), vectors(2, width, dtype)):  # the latter in inference
            op.dense_block_apply(buffer, *affine, *statistics, y)
        of_norm = (*vectors(2, width), *statistics)
        for first in (False, True):
            op.dense_block_accumulate(y, buffer, *of_norm, grad_sum, True, first)
    for begin, end in itertools.pairwise([0, *widths]):
        four = vectors(4, end - begin)
        op.dense_block_gradient(outside, buffer, grad_sum, *four, begin, end)
    op.dense_block_gradient(outside, buffer, None, *[None] * 4, *widths[-2:])
    of_channels = vectors(2, consumers[-1])
    running = [[torch.empty(width) for width in consumers] for _ in range(2)]
    count = DENSENET_BATCH * size**2
    op.dense_block_update_running(*of_channels, count, *running, [0.1] * len(consumers))
    for new in (channels, GROWTH):
        norm.batch_norm_statistics(images(new, size, DENSENET_BATCH, dtype))


def calls() -> Iterator[Callable[[], None]]:
    """Of the launchers, as the gate's stages make them with the backend "triton"."""
    norms = sorted({*RESNET50, *DENSENET121})
    for shape, dtype in itertools.product(norms, (*HALF, torch.float32)):
        yield functools.partial(batch_norm, shape, BATCH, dtype)
    for dtype in HALF:
        for shape in sorted(DENSENET121):
            yield functools.partial(batch_norm, shape, DENSENET_BATCH, dtype)
        for block in DENSENET_BLOCKS:
            yield functools.partial(dense_block, *block, dtype)
    for network, batch in itertools.product(NETWORKS, gpu_convolutions.BATCHES):
        for case in gpu_convolutions.cases_of(network, gpu_convolutions.PHASES, batch, "bf16"):
            yield functools.partial(convolution, case)


def launches(capability: int, processors: int) -> list[Launch]:
    """The distinct ones of all calls, on a GPU with so many multiprocessors."""
    from tests.interpreter.ahead_of_time import on_a_gpu, recorded_launches

    with on_a_gpu(capability, processors), recorded_launches() as found:
        for call in calls():
            call()
    return list(dict.fromkeys(found))


def compile_share(capability: int, processors: int, share: int, shares: int) -> int:
    """How many kernels this process has compiled."""
    from tests.interpreter.ahead_of_time import compile_launch

    mine = launches(capability, processors)[share::shares]
    for launch in mine:
        compile_launch(launch, capability)
    return len(mine)


def multiprocessors() -> int:
    """Of the GPU at hand; without one, of an H200."""
    if not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compile_triton", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("capability", type=int, help="90 for sm_90")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    gpu, shares = (options.capability, multiprocessors()), options.processes
    with ProcessPoolExecutor(shares) as pool:
        done = [pool.submit(compile_share, *gpu, share, shares) for share in range(shares)]
        compiled = sum(share.result() for share in done)
    print(f"{compiled} kernels compiled for sm_{options.capability}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
