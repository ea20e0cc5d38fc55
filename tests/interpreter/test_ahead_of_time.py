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

from tests.interpreter.ahead_of_time import CAPABILITIES, Compiled, compile_launch, launches_of
from tests.interpreter.kernels import import_kernels

# These walk over the whole tensor: 16 bytes at a time where the rows are whole vectors.
BATCH_NORM_STREAMS = {
    "batch_norm_statistics_kernel",
    "batch_norm_apply_kernel",
    "batch_norm_backward_reduce_kernel",
    "batch_norm_backward_apply_kernel",
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
CASES = {**BATCH_NORM, **RESIDUAL_ADD}


def compiled(label: str, capability: int) -> list[Compiled]:
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
        lean = CASES[label][1] and "gelu" not in label
        assert result.registers <= (FOUR_PROGRAMS if lean else THREE_PROGRAMS), str(result)
        if CASES[label][1] and result.launch.name in BATCH_NORM_STREAMS:
            assert result.widest("ld") == 16, str(result)
            if result.launch.name.endswith("apply_kernel"):
                assert result.widest("st") == 16, str(result)


def test_every_kernel_is_compiled() -> None:
    names = {
        name
        for op in ("batch_norm", "residual_add")
        for name in vars(import_kernels(op))
        if name.endswith("_kernel")
    }
    seen = {launch.name for call, _ in CASES.values() for launch in launches_of(call)}
    assert seen == names
