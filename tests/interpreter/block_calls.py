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
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop

import resops
from resops.models import UNet
from resops.ops import convolution, convolution_table
from resops.ops.conv_bn_act_slices import convolution_of_slices
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

PHASES = convolution_table.PHASES
CL = torch.channels_last
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


@contextmanager
def fused_phases(*fused: str) -> Iterator[None]:
    """Inside, these phases are Triton's, as a table of measurements might have it."""

    def choose(phase: str, *_: Any) -> str:
        return convolution.FUSED if phase in fused else convolution.LIBRARY

    with resops.backend("triton"), tiles.forced(TILE), pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "choose", choose)
        yield


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


def sliced(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Slices, of which one is contiguous and one a part of a wider tensor; weight and bias."""
    slices = [torch.randn(2, c, 4, 5).to(dtype, memory_format=CL) for c in (4, 3, 6)]
    slices = [slices[0], slices[1].contiguous(), slices[2][:, 1:4]]
    weight = torch.randn(5, 10, 3, 3).to(dtype, memory_format=CL)
    tensors = [t.detach().requires_grad_() for t in (*slices, weight, torch.randn(5).to(dtype))]
    return tensors[:3], tensors[3], tensors[4]


def near_to_the_concatenation(inputs: list[Tensor], found: list[Tensor], tolerance: float) -> None:
    """The result and the gradients of :func:`sliced`'s tensors, in the norm of each."""
    *tensors, weight, bias = inputs
    z = F.conv2d(torch.cat(tensors, 1), weight, bias, padding=1)
    expected = [z, *torch.autograd.grad(z, inputs, torch.ones_like(z))]
    for mine, its in zip(found, expected, strict=True):
        error = (mine.float() - its).norm() / its.norm()
        assert mine.shape == its.shape and error <= tolerance, error


def slices() -> None:
    """Tensors side by side along the channels, forward and backward, also under autocast: nobody
    concatenates them, and the gradients are those of the concatenation."""
    tensors, weight, bias = sliced(torch.float32)
    inputs = [*tensors, weight, bias]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 5e-3)):
        with fused_by_triton() as calls, counted_calls() as ops:
            with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
                y = convolution_of_slices(tensors, weight, bias, 1, 1, 1, 1)
            grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
        assert calls == dict.fromkeys(PHASES, 1) and ops["aten::cat"] == 0, (calls, ops)
        assert y.dtype == dtype
        near_to_the_concatenation(inputs, [y, *grads], tolerance)


def slices_compiled() -> None:
    """Three nodes of one graph and its backward graph, and no concatenation."""
    tensors, weight, bias = sliced(torch.float32)
    inputs = [*tensors, weight, bias]
    called: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return boxed_nop(graph, inputs)

    function = torch.compile(
        convolution_of_slices, fullgraph=True, backend=aot_autograd(fw_compiler=compiler)
    )
    with fused_by_triton():
        y = function(tensors, weight, bias, 1, 1, 1, 1)
        grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
    ours = [f"resops_triton.conv_bn_act_{phase}.default" for phase in PHASES]
    assert [called.count(name) for name in ours] == [1, 1, 1], called
    assert not any("cat" in name.split(".") for name in called), called
    near_to_the_concatenation(inputs, [y, *grads], 1e-5)


def slices_phase_by_phase() -> None:
    """A table may choose some phases only: the others are the library's, of a concatenation that
    is made when it is needed. Only the gradients that are asked for; and second derivatives."""
    tensors, weight, bias = sliced(torch.float32)
    inputs, geometry = [*tensors, weight, bias], (1, 1, 1, 1)
    z = F.conv2d(torch.cat(tensors, 1), weight, bias, padding=1)
    expected = torch.autograd.grad(z, inputs, torch.ones_like(z).cos(), retain_graph=True)
    for fused in PHASES:
        with fused_phases(fused), counted_calls() as ops:
            y = convolution_of_slices(tensors, weight, bias, *geometry)
            grads = torch.autograd.grad(y, inputs, torch.ones_like(y).cos())
        torch.testing.assert_close((y, *grads), (z, *expected), rtol=1e-4, atol=1e-4)
        for phase in PHASES:
            assert ops[f"resops_triton::conv_bn_act_{phase}"] == (phase == fused), (phase, ops)
        assert ops["aten::cat"] == (fused != "forward") + (fused != "backward_weight"), ops
    for wanted in ([weight], [tensors[1]]):
        with fused_phases(*PHASES), counted_calls() as ops:
            y = convolution_of_slices(tensors, weight, bias, *geometry)
            (grad,) = torch.autograd.grad(y, wanted, torch.ones_like(y).cos())
        place = next(i for i, t in enumerate(inputs) if t is wanted[0])
        torch.testing.assert_close(grad, expected[place], rtol=1e-4, atol=1e-4)

    def penalty(y: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(y.square().sum(), [tensors[1], weight], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))

    with fused_phases(*PHASES):
        found = penalty(convolution_of_slices(tensors, weight, bias, *geometry))
    torch.testing.assert_close(found, penalty(z), rtol=1e-3, atol=1e-2)


def slices_of_the_library() -> None:
    """Without a table, in groups, padded at one end, not channels-last, of several sizes: what the
    library says of the concatenation."""
    tensors, weight, bias = sliced(torch.float32)
    contiguous = [t.detach().contiguous() for t in tensors]
    with resops.backend("triton"), counted_calls() as ops:
        convolution_of_slices(tensors, weight, bias, 1, 1, 1, 1)
    with fused_by_triton() as calls:
        convolution_of_slices(tensors, weight[:4, :5], bias[:4], 1, 1, 1, 2)
        convolution_of_slices(tensors, weight[..., :2, :2], bias, 1, "same", 1, 1)
        convolution_of_slices(contiguous, weight.contiguous(), bias, 1, 1, 1, 1)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            convolution_of_slices([tensors[0], tensors[1][..., 1:]], weight, bias, 1, 1, 1, 1)
        with pytest.raises(RuntimeError, match="expected input"):
            convolution_of_slices(tensors[:2], weight, bias, 1, 1, 1, 1)
    assert ops["aten::cat"] == 1 and not calls


def unet() -> None:
    """A training step of a U-Net: its 3x3 convolutions are Triton's, and the one behind the skip
    connection reads the two halves where they are."""
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = UNet(2, 1, (3, 4)).to(memory_format=CL)  # type: ignore[call-overload]
        x = torch.randn(2, 1, 6, 6).contiguous(memory_format=CL)
        with fused_by_triton() if fused else resops.backend("reference") as calls:
            with counted_calls() as ops:
                loss = model(x).square().mean()
                loss.backward()
            if fused:
                expected = {"forward": 6, "backward_data": 5, "backward_weight": 6}
                assert calls == expected and ops["aten::cat"] == 0, (calls, ops)
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


CALLS: dict[str, Callable[[], None]] = {
    f"near_to_float64-{op}-{shortcut}": functools.partial(
        near_to_float64, op, shortcut == "projection"
    )
    for op, shortcut in BLOCKS
}
CALLS |= {f"compiled-{op}": functools.partial(compiled, op) for op in OPS}
CALLS["relu_and_its_mask"] = relu_and_its_mask
CALLS |= {
    call.__name__: call
    for call in (
        dense_block,
        slices,
        slices_compiled,
        slices_phase_by_phase,
        slices_of_the_library,
        unet,
    )
}
