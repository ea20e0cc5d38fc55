"""The public functions with backend "triton" under Triton's interpreter, on CPU tensors.

Run by test_backend.py in a process of its own, since TRITON_INTERPRET counts when Triton is
imported.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resops
from resops.functional import batch_norm_act, residual_add
from resops.nn import BatchNormAct2d, ResidualAdd
from tests.dispatch import counted_calls
from tests.interpreter import block_calls
from tests.interpreter.test_backend import NAMES, SLOW
from tests.ops.batch_norm_oracle import ACTIVATIONS, random_case, run_functional, run_ops
from tests.ops.conv_phases_oracle import ConvCase
from tests.ops.conv_phases_oracle import random_case as random_conv_case
from tests.tensors import in_layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD, BACKWARD = "resops_triton::{}_forward", "resops_triton::{}_backward"


def triton_calls(op: str, call: Callable[[], Any]) -> tuple[Any, tuple[int, int]]:
    """What the call returns, and how often forward and backward of our kernels ran."""
    with counted_calls() as calls:
        result = call()
    assert not any(hasattr(torch.ops.resops, name) for name in calls), calls
    return result, (calls[FORWARD.format(op)], calls[BACKWARD.format(op)])


def batch_norm_by_name() -> None:
    """Rule R for the function and autograd; the kernels ran, once each way."""
    for i, (activation, training) in enumerate(itertools.product(ACTIVATIONS, (True, False))):
        layout = ("contiguous", "channels_last")[i % 2]
        x = in_layout(torch.randn(3, 6, 5, 3).to(DTYPES[i % 3]), layout)
        flags: dict[str, Any] = {"training": training, "activation": activation}
        case = random_case(x, residual=i % 4 < 2, **flags).with_decided_signs()
        with resops.backend("triton"):
            ours, counts = triton_calls("batch_norm", functools.partial(run_functional, case))
        assert counts == (1, 1)
        case.check(ours)
        with torch.no_grad(), resops.backend("triton"):
            y, counts = triton_calls("batch_norm", functools.partial(run_functional, case))
        assert counts == (1, 0) and torch.equal(y["y"], ours["y"])


def gradients(function: Callable[..., Tensor], *leaves: Tensor, **kwargs: Any) -> list[Tensor]:
    leaves = tuple(t.detach().requires_grad_() for t in leaves)
    y = function(*leaves, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.cos(y.detach().float()).to(y.dtype))]


def residual_add_by_name() -> None:
    """As the definition, with every kind of weight."""
    for i, activation in enumerate((None, "relu", "leaky_relu", "silu", "gelu")):
        x, residual = torch.randn(2, 2, 3, 4, 5)
        x = in_layout(x, ("contiguous", "channels_last")[i % 2])
        for weights in (
            (),
            (torch.tensor(0.3), torch.tensor([2.0])),
            (torch.rand(2), torch.rand(2, 1, 1, 1)),
            (torch.rand(2, 3, 4, 5),),
        ):
            results = []
            for backend in ("triton", "reference"):
                with resops.backend(backend):
                    results.append(
                        gradients(residual_add, x, residual, *weights, activation=activation)
                    )
            for ours, other in zip(*results, strict=True):
                torch.testing.assert_close(ours, other)
    with resops.backend("triton"):
        _, counts = triton_calls(
            "residual_add", lambda: gradients(residual_add, x, residual, activation="relu")
        )
    assert counts == (1, 1)


def residual_add_with_weights_of_backward() -> None:
    x, residual = torch.randn(2, 3, 4, 5)
    results = []
    for backend in ("triton", "reference"):
        with resops.backend(backend):
            results.append(
                gradients(
                    residual_add,
                    x,
                    residual,
                    alpha=torch.tensor([0.2, 0.8, 0.5]),
                    beta="complement",
                    activation="relu",
                    alpha_backward=torch.tensor([0.6, 0.1, 0.9]),
                    beta_backward="complement",
                )
            )
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other)


def backward_keeps_the_choice() -> None:
    x = torch.randn(3, 4, 2, requires_grad=True)
    with resops.backend("triton"):
        y = batch_norm_act(x, None, None, training=True)
        z = residual_add(y, y, activation="relu")
    with resops.backend("reference"), counted_calls() as calls:
        z.sum().backward()
    assert calls[BACKWARD.format("batch_norm")] == calls[BACKWARD.format("residual_add")] == 1
    assert calls["aten::native_batch_norm_backward"] == 0


def auto_leaves_the_interpreter_alone() -> None:
    with counted_calls() as calls:
        batch_norm_act(torch.randn(3, 4), None, None, training=True)
    assert not any(name.startswith("resops_triton::") for name in calls)


def double_backward() -> None:
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        x = torch.randn(3, 4, 5, requires_grad=True)
        with resops.backend(backend):
            y = batch_norm_act(x, None, None, training=True, activation="silu")
            y = residual_add(y, x, activation="gelu")
            (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
            results.append(torch.autograd.grad(grad.pow(2).sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def operators() -> None:
    """opcheck: schema, autograd registration, fake kernel, AOT dispatch; in a second layout what
    depends on it, the fake kernel."""
    ops: Any = torch.ops.resops_triton
    every = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    for layout, activation, tests in (
        ("contiguous", "relu", every),
        ("channels_last", "silu", ("test_faketensor",)),
    ):
        x = in_layout(torch.randn(2, 5, 3, 3), layout)
        case = random_case(x, residual=True, activation=activation)
        tensors = (x, case.residual, case.weight, case.bias)
        out = ops.batch_norm_forward(*tensors, None, None, True, 0.1, 1e-5, activation, 0.0)
        kept = case.residual if activation == "silu" else None
        saved = (case.grad_y, x, kept, out[3], case.weight, case.bias, out[1], out[2])
        mask = ops.residual_add_forward(x, x, None, None, 1.0, 1.0, False, activation, 0.0)[1]
        constants, needed = (None, None, 1.0, 1.0, False), [True, True, False, False]
        for name, arguments in {
            "batch_norm_statistics": (x,),
            "batch_norm_apply": (*tensors, out[1], out[2], activation, 0.0),
            "batch_norm_forward": (*tensors, *case.running, True, 0.1, 1e-5, activation, 0.0),
            "batch_norm_backward_reduce": (*saved, activation, 0.0),
            "batch_norm_backward_apply": (*saved, out[1], out[2], activation, 0.0, True, True),
            "batch_norm_backward": (*saved, True, activation, 0.0, [True] * 4),
            "residual_add_forward": (x, x, *constants, activation, 0.0),
            "residual_add_backward": (x, x, x, *constants, mask, activation, 0.0, needed),
        }.items():
            op = getattr(ops, name).default
            result = torch.library.opcheck(op, arguments, test_utils=tests)
            assert len(result) == len(tests) and set(result.values()) == {"SUCCESS"}, result


def conv_phases() -> ConvCase:
    """A call with everything that a training step gives the phases of a convolution."""
    torch.manual_seed(0)
    return random_conv_case(
        (2, 6, 3, 4),
        5,
        (3, 1),
        slices=(2, 4),
        prologue="relu",
        statistics=True,
        addend=True,
        stride=(2, 1),
        padding=(1, 0),
    )


def conv_operators() -> None:
    """opcheck of the phases of a convolution: strides of the fake kernels too."""
    case, ops = conv_phases(), torch.ops.resops_triton
    geometry, before = case.geometry(), case.before()
    for name, arguments in {
        "forward": (case.inputs, *before, case.conv_weight, None, None, "identity", 0.0),
        "backward_data": (
            *(case.grad_y, case.conv_weight, list(case.x.shape), case.x, *before),
            *(case.mean, case.invstd, case.addend),
        ),
        "backward_weight": (case.grad_y, case.inputs, *before, list(case.conv_weight.shape)),
    }.items():
        arguments = (*arguments, *geometry, *[True] * (name == "forward"))
        op = getattr(ops, f"conv_bn_act_{name}").default
        result = torch.library.opcheck(op, arguments)
        assert len(result) == 4 and all(v == "SUCCESS" for v in result.values()), result


def conv_phases_compiled() -> None:
    """The phases are nodes of one graph, and give the same bits."""
    case, ops = conv_phases(), torch.ops.resops_triton
    eager = case.run(ops)
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(lambda: case.run(ops), fullgraph=True, backend=backend)()
    for phase in ("forward", "backward_data", "backward_weight"):
        assert called.count(f"resops_triton.conv_bn_act_{phase}") == 1, called
    for name, t in compiled.items():
        assert torch.equal(t, eager[name]) and t.stride() == eager[name].stride(), name
    case.check(compiled)


class Block(nn.Module):
    """A residual block with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNormAct2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = BatchNormAct2d(4, momentum=0.3)
        self.shortcut = nn.Conv2d(3, 4, 1, stride=2, bias=False)
        self.bn3 = BatchNormAct2d(4, apply_act=False)
        self.join = ResidualAdd()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x))), self.bn3(self.shortcut(x)))
        return self.join(y, y.detach())


def train(module: Any, parameters_of: nn.Module, backend: str) -> list[Tensor]:
    """Outputs of three steps, and the state and the gradients after them."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(parameters_of.parameters(), lr=0.1)
    results = []
    with resops.backend(backend):
        for _ in range(3):
            x = torch.randn(2, 3, 6, 6, generator=generator)
            optimizer.zero_grad()
            y = module(x.contiguous(memory_format=torch.channels_last))
            y.square().mean().backward()
            optimizer.step()
            results.append(y.detach())
    results += [t.clone() for t in parameters_of.state_dict().values()]
    return results + [p.grad for p in parameters_of.parameters() if p.grad is not None]


def compare(wrap: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    blocks = [Block(), Block()]
    blocks[1].load_state_dict(blocks[0].state_dict())
    expected = train(blocks[0], blocks[0], "reference")
    ours = train(wrap(blocks[1]), blocks[1], "triton")
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for block in blocks:
        block.eval()
    x = torch.randn(2, 3, 6, 6)
    with resops.backend("triton"):
        y = blocks[1](x)
    torch.testing.assert_close(y, blocks[0](x), rtol=1e-4, atol=1e-5)


def residual_block() -> None:
    """Three steps of a residual block: outputs, running statistics, parameters, gradients."""
    compare(lambda block: block)


def residual_block_compiled() -> None:
    """The same as one graph, through Inductor."""
    compare(lambda block: torch.compile(block, fullgraph=True))


def residual_block_compiled_dynamic() -> None:
    compare(lambda block: torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True))


def refused() -> None:
    x = torch.randn(3, 4)
    with resops.backend("triton"):
        with pytest.raises(resops.BackendError, match=r"batch_norm does not take torch.float64"):
            batch_norm_act(x.double(), None, None, training=True)
        with pytest.raises(resops.BackendError, match=r"residual_add does not take torch.float64"):
            residual_add(x.double(), x.double())
        # The checks of every backend come before a kernel.
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            batch_norm_act(x[:1], None, None, training=True)
        with pytest.raises(RuntimeError, match="weight should contain 4 elements not 3"):
            batch_norm_act(x, None, None, torch.ones(3), training=True)
        with pytest.raises(RuntimeError, match="alpha should have 1 element"):
            residual_add(x, x, torch.ones(7))


def direct_calls() -> None:
    """torch.ops.resops_triton gives what the launchers give."""
    case = random_case(torch.randn(3, 6, 5), residual=True, activation="relu")
    case = case.with_decided_signs()
    case.check(run_ops(case, torch.ops.resops_triton))


CALLS: dict[str, Callable[[], None]] = {
    call.__name__: call
    for call in (
        batch_norm_by_name,
        residual_add_by_name,
        residual_add_with_weights_of_backward,
        backward_keeps_the_choice,
        auto_leaves_the_interpreter_alone,
        double_backward,
        operators,
        conv_operators,
        conv_phases_compiled,
        residual_block,
        residual_block_compiled,
        residual_block_compiled_dynamic,
        refused,
        direct_calls,
    )
}
CALLS |= block_calls.CALLS
assert set(CALLS) == {*NAMES, *SLOW}
