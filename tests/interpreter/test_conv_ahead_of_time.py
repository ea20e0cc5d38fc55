"""The Triton convolutions, compiled for GPUs that are not there, in every tile of the table.

No register may spill, ptxas may not serialise wgmma (its messages C7510 to C7519), and shared
memory must fit. On sm_90 the main loop is read in the machine code: what it does for every HGMMA is
printed (pytest -rP) and bounded, and so are registers and shared memory. A few on sm_90 by default,
all with -m slow.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.interpreter.ahead_of_time import (
    CAPABILITIES,
    Compiled,
    compile_launch,
    launches_of,
    on_a_gpu,
)
from tests.interpreter.kernels import import_kernels

kernels, tiles = import_kernels("conv_bn_act"), import_kernels("tiles")
BF16, FP32 = torch.bfloat16, torch.float32
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of a block
# On sm_90, what the present code needs and a little, for phase, taps and prologue: instructions for
# an HGMMA of the main loop, which is 64 rows by the columns of the tile by 16 of depth (8 in TF32),
# and registers of a thread. Of barriers there is one for two HGMMAs or more, and no store to shared
# memory: operands come from there, or, after a prologue, from registers.
BOUNDS = {
    ("forward", "1x1", "plain"): (26, 160),
    ("forward", "kxk", "plain"): (48, 165),
    ("forward", "1x1", "prologue"): (75, 168),
    ("forward", "kxk", "prologue"): (135, 188),
    ("backward_data", "1x1", "plain"): (35, 125),
    ("backward_data", "kxk", "plain"): (56, 172),
    ("backward_data", "1x1", "prologue"): (33, 235),
    ("backward_data", "kxk", "prologue"): (56, 236),
    ("backward_weight", "1x1", "plain"): (52, 240),
    ("backward_weight", "kxk", "plain"): (116, 240),
    ("backward_weight", "1x1", "prologue"): (70, 131),
    ("backward_weight", "kxk", "prologue"): (165, 172),
}
BARRIERS = 0.5
# Two programs share a multiprocessor of sm_90, whose shared memory has 228 KB.
SHARED_BY_TWO = 113 * 1024
CLASSES = [
    (phase, taps, prologue, columns)
    for (phase, taps, prologue), columns in itertools.product(BOUNDS, (16, 32, 64, 128))
]
QUICK: set[tuple[Any, ...]] = {
    ("forward", "1x1", "prologue", 128),
    ("forward", "kxk", "prologue", 128),
    ("backward_data", "kxk", "prologue", 128),
    ("backward_weight", "kxk", "prologue", 128),
}
QUICK_TF32: set[tuple[Any, ...]] = {("forward", "kxk", "prologue", 32)}


@pytest.fixture(autouse=True)
def _no_gpu_and_an_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("RESOPS_TILES", "off")
    tiles._users_table.cache_clear()
    yield
    tiles._users_table.cache_clear()


def call(phase: str, taps: str, prologue: str, columns: int, dtype: torch.dtype) -> None:
    """One phase with everything that can be in it: statistics, sums."""
    other, size = 256, 14
    C, filters = (columns, other) if phase == "backward_data" else (other, columns)
    kernel = 1 if taps == "1x1" else 3
    geometry = ([1, 1], [kernel // 2] * 2, [1, 1])

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    x, y = empty(8, C, size, size), empty(8, filters, size, size)
    weight, vector = empty(filters, C, kernel, kernel), torch.empty(C)
    before: tuple[Any, ...] = (None, None, "identity", 0.0)
    normed: tuple[Any, ...] = (None, *before, None, None, None)
    if prologue == "prologue":
        before = (vector, vector, "relu", 0.0)
        normed = (x, *before, vector, vector, None)
    if phase == "forward":
        after = (None, None, "identity", 0.0)
        kernels.conv_bn_act_forward([x], *before, weight, *after, *geometry, True)
    elif phase == "backward_data":
        kernels.conv_bn_act_backward_data(y, weight, list(x.shape), *normed, *geometry)
    else:
        kernels.conv_bn_act_backward_weight(y, [x], *before, list(weight.shape), *geometry)


def compiled(capability: int, dtype: torch.dtype, *shape: Any) -> list[Compiled]:
    """What the launches of a call become; those of merging kernels too."""
    label = " ".join(map(str, shape)) + f" {str(dtype).removeprefix('torch.')}"
    arguments: Any = (*shape, dtype)
    with on_a_gpu(capability):
        launches = dict.fromkeys(launches_of(lambda: call(*arguments), label))
    results = [compile_launch(launch, capability) for launch in launches]
    for result in results:
        print(result)
        assert result.stack == 0, str(result)
        assert result.serialised == [], str(result)
        assert result.shared <= SHARED_MEMORY[capability], str(result)
    assert sum(f"{shape[0]}_kernel" in r.launch.name for r in results) == 1
    return results


def check_bounds(result: Compiled, shape: tuple[Any, ...]) -> None:
    """Of a convolution itself, on sm_90."""
    instructions, registers = BOUNDS[shape[:3]]
    assert result.registers <= registers and result.shared <= SHARED_BY_TWO, str(result)
    loop = result.main_loop()
    assert loop is not None, str(result)
    assert loop.full_waits == loop.shared_stores == 0, str(result)
    assert loop.per_product("barriers") <= BARRIERS, str(result)
    assert loop.per_product("instructions") <= instructions, str(result)


def parameters(quick: set[tuple[Any, ...]]) -> list[Any]:
    """Every class; all but these with -m slow only."""
    return [
        pytest.param(c, marks=[] if c in quick else pytest.mark.slow, id=" ".join(map(str, c)))
        for c in CLASSES
    ]


@pytest.mark.parametrize("shape", parameters(QUICK))
def test_16_bits_on_sm_90(shape: tuple[Any, ...]) -> None:
    assert (90, 16, " ".join(map(str, shape))) in tiles.TABLE
    for result in compiled(90, BF16, *shape):
        if f"{shape[0]}_kernel" in result.launch.name:
            check_bounds(result, shape)


@pytest.mark.parametrize("shape", parameters(QUICK_TF32))
def test_tf32_on_sm_90(shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch allows it, from the table or in the heuristic's tile."""
    monkeypatch.setattr(kernels, "_precision", lambda dtype: "tf32")
    for result in compiled(90, FP32, *shape):
        if f"{shape[0]}_kernel" in result.launch.name:
            assert "tf32" in result.ptx
            check_bounds(result, shape)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c != 90])
@pytest.mark.parametrize("shape", CLASSES, ids=lambda shape: " ".join(map(str, shape)))
def test_other_architectures(shape: tuple[Any, ...], capability: int) -> None:
    compiled(capability, BF16, *shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "precision"),
    [pair for pair in itertools.product(CAPABILITIES, ("tf32", "ieee")) if pair != (90, "tf32")],
)
@pytest.mark.parametrize("shape", CLASSES, ids=lambda shape: " ".join(map(str, shape)))
def test_float32(
    shape: tuple[Any, ...], precision: str, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TF32 and without: tensor cores where torch allows them only."""
    monkeypatch.setattr(kernels, "_precision", lambda dtype: precision)
    for result in compiled(capability, FP32, *shape):
        tf32 = precision == "tf32" and f"{shape[0]}_kernel" in result.launch.name
        assert ("tf32" in result.ptx) == tf32, str(result)


def test_tf32_follows_the_setting_of_torch() -> None:
    cudnn: Any = torch.backends.cudnn
    setting = cudnn.conv
    before = setting.fp32_precision
    try:
        for value in ("ieee", "tf32"):
            setting.fp32_precision = value
            assert kernels._precision(FP32) == value and kernels._precision(BF16) == "ieee"
    finally:
        setting.fp32_precision = before


def test_every_kernel_is_compiled() -> None:
    """The launches above are of all kernels of the op, and of the table's every class."""
    with on_a_gpu(90):
        seen = {
            launch.name
            for shape in CLASSES
            for launch in launches_of(functools.partial(call, *shape, BF16))
        }
    names = {name for name in vars(kernels) if name.endswith("_kernel")}
    assert seen == names
    assert {" ".join(map(str, shape)) for shape in CLASSES} == tiles.CLASSES
