"""Every Triton kernel, compiled for GPUs that are not there, from the launches of real calls.

No register may spill to local memory, and the wide walks must move 16 bytes at a time. Registers
and shared memory are printed (pytest -rP). sm_90 by default, the others with -m slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from tests.interpreter.ahead_of_time import (
    CAPABILITIES,
    Compiled,
    compile_launch,
    launches_of,
    on_a_gpu,
)
from tests.interpreter.kernels import import_kernels

# These walk over the whole tensor: 16 bytes at a time where the rows are whole vectors.
STREAMS = {
    "batch_norm_statistics_kernel",
    "batch_norm_apply_kernel",
    "batch_norm_backward_reduce_kernel",
    "batch_norm_backward_apply_kernel",
    "dense_block_apply_kernel",
    "dense_block_accumulate_kernel",
    "dense_block_gradient_kernel",
}
# Of a thread, so that 4 programs of 128 threads, or 3, share a multiprocessor's 65536 registers.
FOUR_PROGRAMS, THREE_PROGRAMS = 128, 168
SHARED_MEMORY = 48 * 1024


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def batch_norm_call(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    activation: str,
    residual: bool,
    training: bool = True,
) -> None:
    kernels = import_kernels("batch_norm")
    x = torch.empty(shape, dtype=dtype).to(memory_format=memory_format)
    r = torch.empty_like(x) if residual else None
    vectors = [torch.empty(shape[1]) for _ in range(4)]
    y, mean, invstd, mask = kernels.batch_norm_forward(
        x, r, *vectors, training, 0.1, 1e-5, activation, 0.01
    )
    kernels.batch_norm_backward(
        torch.empty_like(y),
        x,
        r if activation in ("silu", "gelu") else None,
        mask,
        *vectors[:2],
        mean,
        invstd,
        training,
        activation,
        0.01,
        [True, residual, True, True],
    )


LAST, PLANES = torch.channels_last, torch.contiguous_format
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# label -> a call, and whether its rows are whole vectors.
BATCH_NORM: dict[str, tuple[Callable[[], None], bool]] = {
    label: (functools.partial(batch_norm_call, *arguments), vectors)
    for label, vectors, *arguments in (
        ("64x56x56 bf16 nhwc relu", True, (8, 64, 56, 56), BF16, LAST, "relu", False),
        ("256x14x14 bf16 nhwc add relu", True, (8, 256, 14, 14), BF16, LAST, "relu", True),
        ("256x14x14 fp32 nhwc add relu", True, (8, 256, 14, 14), FP32, LAST, "relu", True),
        ("48x14x14 fp16 nhwc add gelu", True, (8, 48, 14, 14), FP16, LAST, "gelu", True),
        ("64x28x28 bf16 nhwc silu eval", True, (8, 64, 28, 28), BF16, LAST, "silu", True, False),
        ("64x56x56 bf16 nchw add relu", True, (8, 64, 56, 56), BF16, PLANES, "relu", True),
        ("65x7x7 bf16 nhwc add leaky", False, (3, 65, 7, 7), BF16, LAST, "leaky_relu", True),
        ("64x7x7 fp32 nchw identity", False, (8, 64, 7, 7), FP32, PLANES, "identity", False),
    )
}


def residual_add_call(alpha: Any, beta: Any, complement: bool, activation: str) -> None:
    kernels = import_kernels("residual_add")
    x = torch.empty(8, 64, 56, 56, dtype=BF16)
    weights = (alpha, beta, 1.0, 1.0, complement)
    y, mask = kernels.residual_add_forward(x, x, *weights, activation, 0.01)
    needed = [isinstance(t, Tensor) for t in (alpha, beta)]
    kernels.residual_add_backward(y, x, x, *weights, mask, activation, 0.01, [True, True, *needed])


RESIDUAL_ADD: dict[str, tuple[Callable[[], None], bool]] = {
    label: (functools.partial(residual_add_call, *arguments), False)
    for label, *arguments in (
        ("plain relu", None, None, False, "relu"),
        ("scalars", torch.ones(1), torch.ones(1), False, "identity"),
        ("per sample, complement", torch.ones(8), None, True, "leaky_relu"),
        ("gate", torch.empty(8, 64, 56, 56, dtype=BF16), None, True, "relu"),
    )
}


def dense_block_call(dtype: torch.dtype, wide_sum: bool, channels: int, total: int) -> None:
    """A consumer of a buffer, forward and backward, with and without a gradient from outside."""
    kernels = import_kernels("dense_block")

    def images(count: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(8, count, 14, 14, dtype=kind).to(memory_format=LAST)

    buffer, grads, y = images(total), images(total), images(channels)
    weight, bias, mean, invstd = (torch.empty(channels) for _ in range(4))
    norm = (buffer, weight, bias, mean, invstd)
    kernels.dense_block_apply(*norm, y)
    grad_sum = images(total, FP32 if wide_sum else dtype)
    for training, first in ((True, True), (True, False), (False, False)):
        kernels.dense_block_accumulate(y, *norm, grad_sum, training, first)
    vectors = tuple(torch.empty(32) for _ in range(4))
    for outside in (grads, None):
        kernels.dense_block_gradient(outside, buffer, grad_sum, *vectors, channels - 32, channels)
    kernels.dense_block_gradient(grads, buffer, grad_sum, None, None, None, None, 0, channels)
    widths = range(64, 64 + 32 * 25, 32)  # 25 consumers: the third block of DenseNet-121
    running = [[torch.empty(n) for n in widths] for _ in range(2)]
    mean, var = (torch.empty(widths[-1]) for _ in range(2))
    kernels.dense_block_update_running(mean, var, 1568, *running, [0.1] * len(widths))


DENSE_BLOCK: dict[str, tuple[Callable[[], None], bool]] = {
    label: (functools.partial(dense_block_call, *arguments), vectors)
    for label, vectors, *arguments in (
        ("dense block bf16", True, BF16, False, 224, 512),
        ("dense block fp16, sum fp32", True, FP16, True, 96, 256),
        ("dense block fp32", True, FP32, False, 128, 256),
        ("dense block bf16, k = 12", False, BF16, False, 60, 84),
    )
}
CASES = {**BATCH_NORM, **RESIDUAL_ADD, **DENSE_BLOCK}


def compiled(label: str, capability: int) -> list[Compiled]:
    with on_a_gpu(capability):
        launches = dict.fromkeys(launches_of(CASES[label][0], label))
    assert launches
    results = [compile_launch(launch, capability) for launch in launches]
    for result in results:
        print(result)
    return results


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=[pytest.mark.slow] * (c != 90)) for c in CAPABILITIES]
)
@pytest.mark.parametrize("label", CASES)
def test_compiles_without_spills(label: str, capability: int) -> None:
    for result in compiled(label, capability):
        assert result.stack == 0, str(result)
        assert result.shared <= SHARED_MEMORY, str(result)
        # gelu and a sum in float32 beside 16 bits leave room for three programs.
        lean = CASES[label][1] and not any(word in label for word in ("gelu", "sum fp32"))
        assert result.registers <= (FOUR_PROGRAMS if lean else THREE_PROGRAMS), str(result)
        if CASES[label][1] and result.launch.name in STREAMS:
            assert result.widest("ld") == 16, str(result)
            if result.launch.name.endswith("apply_kernel"):
                assert result.widest("st") == 16, str(result)


def test_every_kernel_is_compiled() -> None:
    names = {
        name
        for op in ("batch_norm", "dense_block", "residual_add")
        for name in vars(import_kernels(op))
        if name.endswith("_kernel")
    }
    with on_a_gpu(90):
        seen = {launch.name for call, _ in CASES.values() for launch in launches_of(call)}
    assert seen == names
