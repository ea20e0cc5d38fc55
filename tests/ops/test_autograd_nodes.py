"""Every op has two autograd nodes: one in C++ for plain calls, and a Python Function for what
torch.compile traces. They must agree to the last bit, in what they save as well."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import resops
from resops.functional import batch_norm_act, residual_add
from resops.ops import batch_norm as batch_norm_op
from resops.ops import residual_add as residual_add_op
from tests.ops.batch_norm_oracle import ACTIVATIONS
from tests.tensors import in_layout

pytestmark = pytest.mark.usefixtures("native")

LAYOUTS = ("contiguous", "channels_last", "every_second")


def run(call: Callable[..., Tensor], inputs: dict[str, Tensor], needed: set[str]) -> dict[str, Any]:
    """Output, first and second derivatives, and the sizes and dtypes of what is saved."""
    leaves = {name: t.detach().requires_grad_(name in needed) for name, t in inputs.items()}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = call(**leaves)
    differentiable = [t for t in leaves.values() if t.requires_grad]
    grad_y = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).requires_grad_()
    out: dict[str, Any] = {"y": y, "strides": y.stride(), "node": type(y.grad_fn).__name__}
    out["saved"] = sorted((tuple(t.shape), str(t.dtype)) for t in kept if t.numel() > 0)
    out["grads"] = torch.autograd.grad(y, differentiable, grad_y, retain_graph=True)
    recorded = torch.autograd.grad(y, differentiable, grad_y, create_graph=True)
    total = sum((g.double().square().sum() for g in recorded), torch.zeros(()))
    out["recorded"] = recorded
    out["second"] = torch.autograd.grad(total, [*differentiable, grad_y], allow_unused=True)
    return out


def check_equal(cpp: dict[str, Any], python: dict[str, Any]) -> None:
    assert cpp.pop("node") == "CppFunction"
    assert python.pop("node") in ("BatchNormFunctionBackward", "ResidualAddFunctionBackward")
    for name, found in cpp.items():
        if name in ("strides", "saved"):
            assert found == python[name], name
        else:
            torch.testing.assert_close(found, python[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batch_norm(activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for layout, residual, training, affine in itertools.product(
        LAYOUTS, (False, True), (False, True), (False, True)
    ):
        vector = torch.float64 if dtype == torch.float64 else torch.float32
        x = torch.randn(3, 5, 4, 3, generator=generator).to(dtype)
        inputs = {"input": in_layout(x, layout)}
        if residual:
            inputs["residual"] = in_layout(x.flip(0) * 0.5, layout)
        if affine:
            inputs["weight"] = torch.rand(5, generator=generator, dtype=vector) + 0.5
            inputs["bias"] = torch.randn(5, generator=generator, dtype=vector)
        running = torch.randn(5, dtype=vector, generator=generator), torch.ones(5, dtype=vector)

        updated: list[Tensor] = []

        def call(
            training: bool = training, updated: list[Tensor] = updated, **leaves: Tensor
        ) -> Tensor:
            updated[:] = [t.clone() for t in running]  # noqa: B023
            more: dict[str, Any] = {"running_mean": updated[0], "running_var": updated[1], **leaves}
            return batch_norm_act(
                training=training, activation=activation, negative_slope=0.2, **more
            )

        for needed in ({"input"}, set(inputs) - {"input"}, set(inputs)):
            if not needed:
                continue
            cpp = run(call, inputs, needed) | {"running": list(updated)}
            with monkeypatch.context() as patch:
                patch.setattr(batch_norm_op, "is_plain_call", lambda tensors: False)
                python = run(call, inputs, needed) | {"running": list(updated)}
            check_equal(cpp, python)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5), (1.0, 0.25), (-0.5, 2.0)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual_add(
    activation: str, weights: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    for layout, dtype in itertools.product(LAYOUTS, (torch.float64, torch.float32, torch.bfloat16)):
        x, residual = (torch.randn(3, 5, 4, 3, generator=generator).to(dtype) for _ in range(2))
        inputs = {"x": in_layout(x, layout), "residual": in_layout(residual, layout)}

        def call(x: Tensor, residual: Tensor) -> Tensor:
            return residual_add(x, residual, *weights, activation=activation, negative_slope=0.2)

        for needed in ({"x"}, {"residual"}, {"x", "residual"}):
            cpp = run(call, inputs, needed)
            with monkeypatch.context() as patch:
                patch.setattr(residual_add_op, "is_plain_call", lambda tensors: False)
                python = run(call, inputs, needed)
            check_equal(cpp, python)


@pytest.mark.parametrize("op", ["batch_norm_act", "residual_add"])
def test_a_tensor_subclass_is_dispatched_in_python(op: str) -> None:
    """__torch_function__ of a subclass sees the op, as it sees PyTorch's own."""
    seen: list[str] = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(2, 3, 4).as_subclass(Watched)
    y = (
        batch_norm_act(x, None, None, training=True)
        if op == "batch_norm_act"
        else residual_add(x, x)
    )
    assert isinstance(y, Watched)
    assert any("resops" in name for name in seen), seen


def wrong_calls() -> list[tuple[str, Callable[[], Tensor]]]:
    x, running = torch.randn(2, 3, 4), (torch.zeros(3), torch.ones(3))

    def norm(**wrong: Any) -> Callable[[], Tensor]:
        arguments: dict[str, Any] = {"training": True, **wrong}
        return lambda: batch_norm_act(x, *running, **arguments)

    def add(*tensors: Any, **wrong: Any) -> Callable[[], Tensor]:
        return lambda: residual_add(*tensors, **wrong)

    return [
        ("weight", norm(weight=[1.0, 1.0, 1.0])),
        ("eps", norm(eps="small")),
        ("eps", norm(eps=None)),
        ("momentum", norm(momentum=None)),
        ("training", norm(training=None)),
        ("training", norm(training=2.5)),
        ("activation", norm(activation=b"relu")),
        ("residual", norm(residual=3.0)),
        ("residual", add(x, 3.0)),
        ("residual", add(x, None)),
        ("input", add(3.0, x)),
        ("negative_slope", add(x, x, negative_slope="steep")),
        ("activation", add(x, x, activation=b"relu")),
    ]


@pytest.mark.parametrize("number", range(13))
def test_wrong_types_are_named(number: int) -> None:
    """By the op's own checks: pybind11 would convert some, and list a signature of 11 arguments for
    others. They cover every wrong call."""
    assert len(wrong_calls()) == 13
    name, call = wrong_calls()[number]
    with pytest.raises((TypeError, RuntimeError, ValueError), match=name):
        call()


def test_an_error_of_somebody_else_runs_nothing_twice() -> None:
    """A TypeError out of a hook is not taken for a wrong argument."""
    x, running = torch.randn(2, 3, 4, requires_grad=True), (torch.zeros(3), torch.ones(3))
    expected = torch.zeros(3), torch.ones(3)
    batch_norm_act(x, *expected, training=True)

    def pack(t: Tensor) -> Tensor:
        raise TypeError("not this one")

    with pytest.raises(TypeError, match="not this one"), saved_tensors_hooks(pack, lambda t: t):
        batch_norm_act(x, *running, training=True)
    assert torch.equal(running[0], expected[0]) and torch.equal(running[1], expected[1])


@pytest.mark.parametrize("op", ["batch_norm_act", "residual_add"])
def test_symbolic_sizes(op: str) -> None:
    """A fake tensor's symbolic batch stays one."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    mode = FakeTensorMode(shape_env=ShapeEnv())
    dynamic = [DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC]
    context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic)
    x = mode.from_tensor(torch.randn(4, 6, 5).requires_grad_(), symbolic_context=context)
    with mode:
        if op == "batch_norm_act":
            y = batch_norm_act(x, None, None, training=True, residual=x)
        else:
            y = residual_add(x, x, activation="relu")
    batch: Any = y.shape[0]
    assert isinstance(batch, torch.SymInt) and y.shape[1:] == (6, 5)


class Subclass(Tensor):
    """A tensor that nothing overrides."""


@pytest.mark.parametrize(
    ("case", "node"),
    [
        ("layer", "CppFunction"),
        ("fused", "CppFunction"),
        ("subclass", "BatchNormFunctionBackward"),
        ("prelu", "BatchNormPReLUFunctionBackward"),
        ("reference", "ReluBackward0"),
    ],
)
def test_which_node_a_call_takes(case: str, node: str) -> None:
    """As docs/fuse.md says: the one in C++, which takes less time, wherever users call a layer."""
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    activation = nn.PReLU() if case == "prelu" else nn.ReLU()
    if case == "fused":
        model: nn.Module = resops.fuse(nn.Sequential(nn.BatchNorm2d(3), activation))
    else:
        model = resops.nn.BatchNormAct2d(3, act_layer=type(activation))
    with resops.backend("reference" if case == "reference" else "auto"):
        y = model(x.as_subclass(Subclass) if case == "subclass" else x)
    assert type(y.grad_fn).__name__ == node
