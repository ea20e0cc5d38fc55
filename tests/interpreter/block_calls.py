"""The block Functions over Triton's phases under Triton's interpreter, on CPU tensors.

A part of backend_calls.py, in whose process they run.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import resops
from resops.ops import convolution
from tests.dispatch import counted_calls
from tests.interpreter.kernels import import_kernels
from tests.interpreter.test_backend import BLOCKS
from tests.ops import dense_block_cases
from tests.ops.residual_block_cases import (
    DEFINITIONS,
    OPS,
    assert_near_to_float64,
    block,
    fresh,
    results,
)

PHASES = ("forward", "backward_data", "backward_weight")
kernels, tiles = import_kernels("conv_bn_act"), import_kernels("tiles")
# Few programs: it is the arguments of the phases that are tested here, not the tiles.
TILE = tiles.Tile(64, 32, 32, 4, 2)


@contextmanager
def fused_by_triton() -> Iterator[Counter[str]]:
    """Inside, every convolution of a block is Triton's; counts the calls of the launchers, which
    the ops of an eager call and of a compiled graph share."""
    calls: Counter[str] = Counter()

    def counting(phase: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            calls[phase] += 1
            return launch(*args)

        return counted

    with (
        resops.backend("triton"),
        convolution.convolutions("fused"),
        tiles.forced(TILE),
        pytest.MonkeyPatch.context() as patch,
    ):
        for phase in PHASES:
            name = f"conv_bn_act_{phase}"
            patch.setattr(kernels, name, counting(phase, getattr(kernels, name)))
        yield calls


def tiny_block(op: str, projection: bool, dtype: torch.dtype = torch.float32) -> list[Any]:
    """x and the layers; a basic block's are narrower, since both its kernels are 3x3."""
    return block(op, dtype, projection=projection, width=4 if op == "basic_block" else 6)


def near_to_float64(op: str, projection: bool) -> None:
    """Values, gradients and running statistics, each op and each shortcut in both dtypes; no phase
    is the library's."""
    dtype = torch.float32 if projection == (op == "bottleneck") else torch.float16
    args = tiny_block(op, projection, dtype)
    copied = fresh(args)
    with fused_by_triton() as calls:
        mine = results(OPS[op], args, activation="silu")
    assert_near_to_float64(op, copied, mine)
    assert calls == dict.fromkeys(PHASES, sum(a is not None for a in args[1:]))


def relu_and_its_mask() -> None:
    """The same with relu, whose mask is a bit: in float32, as the composition of PyTorch's ops."""
    for op, projection in (("bottleneck", True), ("basic_block", False)):
        args = tiny_block(op, projection)
        its = results(DEFINITIONS[op], fresh(args), "relu", 0.01)
        with fused_by_triton():
            mine = results(OPS[op], args)
        for name, t in mine.items():
            torch.testing.assert_close(t, its[name], rtol=1e-3, atol=1e-3, msg=name)


def compiled(op: str) -> None:
    """Three steps as one graph, of a bottleneck through Inductor; running statistics go on from
    step to step."""
    args = tiny_block(op, projection=op == "bottleneck")
    copied = fresh(args)
    backend = "inductor" if op == "bottleneck" else "aot_eager"
    function = torch.compile(OPS[op], fullgraph=True, backend=backend)
    for _ in range(3):
        with fused_by_triton() as calls:
            mine = results(function, args, activation="silu")
        assert calls == dict.fromkeys(PHASES, sum(a is not None for a in args[1:]))
        its = results(DEFINITIONS[op], copied, "silu", 0.01)
        for name, t in mine.items():
            torch.testing.assert_close(t, its[name], rtol=1e-3, atol=1e-3, msg=name)


def dense_block() -> None:
    """Two layers and a transition: every phase is Triton's, and the 1x1 convolutions of the layers
    normalise the buffer on load, forward and for the gradient of their weight."""
    args = dense_block_cases.block(torch.float32, layers=2, size=(2, 4, 4))
    its = dense_block_cases.results(dense_block_cases.definition, dense_block_cases.fresh(args))
    with fused_by_triton() as calls, counted_calls() as ops:
        mine = dense_block_cases.results(resops.functional.dense_block, args)
    assert calls == dict.fromkeys(PHASES, 5)  # two convolutions of a layer, and the transition's
    expected = {"apply": 2, "accumulate": 3, "gradient": 3, "update_running": 1}  # transition only
    for phase, count in expected.items():
        assert ops[f"resops_triton::dense_block_{phase}"] == count, phase
    for name, t in mine.items():
        torch.testing.assert_close(t, its[name], rtol=1e-3, atol=1e-3, msg=name)


CALLS: dict[str, Callable[[], None]] = {
    f"near_to_float64-{op}-{shortcut}": functools.partial(
        near_to_float64, op, shortcut == "projection"
    )
    for op, shortcut in BLOCKS
}
CALLS |= {f"compiled-{op}": functools.partial(compiled, op) for op in OPS}
CALLS["relu_and_its_mask"] = relu_and_its_mask
CALLS["dense_block"] = dense_block
