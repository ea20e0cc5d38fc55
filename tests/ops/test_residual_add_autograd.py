"""residual_add: derivatives, weights of the backward pass, what is saved, torch.compile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import resops
from resops.functional import residual_add
from tests.dispatch import counted_calls, native_calls
from tests.ops.batch_norm_oracle import ACTIVATIONS, bits
from tests.ops.residual_add_oracle import (
    WEIGHTINGS,
    ResidualAddCase,
    op_arguments,
    random_case,
    run_functional,
)
from tests.tensors import in_layout

pytestmark = pytest.mark.usefixtures("native")

BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])


def function_of_tensors(case: ResidualAddCase) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The call as a function of all its tensors, and these as leaves."""
    leaves = {n: t.clone().requires_grad_() for n, t in case.tensors().items() if n != "grad_y"}

    def call(*tensors: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(leaves, tensors, strict=True))
        return residual_add(
            given["x"],
            given["residual"],
            given.get("alpha", case.alpha),
            given.get("beta", case.beta),
            activation=case.activation,
            negative_slope=0.2,
        )

    return call, list(leaves.values())


# ---- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck(activation: str, weighting: str) -> None:
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last)
    call, leaves = function_of_tensors(random_case(x, weighting, activation=activation, seed=3))
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("weighting", ["plain", "scalars", "per_sample_complement", "gates"])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_every_subset_of_requires_grad(activation: str, weighting: str) -> None:
    """Only what is asked for is computed, and it is the same as with all of them."""
    case = random_case(torch.randn(3, 4, 5), weighting, activation=activation)
    names = [name for name in case.tensors() if name != "grad_y"]
    everything = run_functional(case)
    for count in range(len(names) + 1):
        for subset in itertools.combinations(names, count):
            out = run_functional(case, " ".join(subset))
            assert set(out) == {"y", *(f"grad_{name}" for name in subset)}
            for name, t in out.items():
                assert torch.equal(bits(t), bits(everything[name])), (subset, name)


def test_unused_output_and_expanded_gradient() -> None:
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    residual = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = residual_add(x, residual, 2.0, activation="relu")
    y.sum().backward()  # a gradient of stride 0, whose mask bits are in channels-last order
    assert x.grad is not None and residual.grad is not None
    passes = (2 * x + residual > 0).float()
    assert torch.equal(x.grad, 2 * passes) and torch.equal(residual.grad, passes)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    unused = torch.zeros(2, requires_grad=True)
    (none,) = torch.autograd.grad(residual_add(x, residual).sum(), [unused], allow_unused=True)
    assert none is None


def test_plain_sum_needs_no_kernel_in_backward() -> None:
    """As PyTorch's +: both gradients are grad_y. After relu they are one tensor."""
    x, residual = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    grad_y = torch.randn(2, 3, 4)
    with counted_calls() as calls:
        grads = torch.autograd.grad(residual_add(x, residual), (x, residual), grad_y)
    assert native_calls(calls) == {"residual_add_forward": 1}
    assert all(grad.data_ptr() == grad_y.data_ptr() for grad in grads)
    grads = torch.autograd.grad(residual_add(x, residual, activation="relu"), (x, residual), grad_y)
    assert grads[0].data_ptr() == grads[1].data_ptr()
    # Accumulated into .grad they are two.
    residual_add(x, residual, activation="relu").backward(grad_y)
    assert x.grad is not None and residual.grad is not None
    x.grad.zero_()
    assert residual.grad.any()


def test_input_modified_in_place_before_backward_raises() -> None:
    x, residual = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    alpha = torch.ones(1, requires_grad=True)
    inner = x * 1
    y = residual_add(inner, residual, alpha)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool) -> None:
    x, residual = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    alpha = torch.rand(2, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return residual_add(x, residual, alpha, "complement", activation="relu")

    expected = torch.autograd.grad(block(x).square().sum(), (x, alpha))
    y = checkpoint(block, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert x.grad is not None and alpha.grad is not None
    assert torch.equal(x.grad, expected[0]) and torch.equal(alpha.grad, expected[1])


def test_functorch_grad() -> None:
    x, residual, alpha = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.rand(2)

    def loss(x: Tensor, alpha: Tensor) -> Tensor:
        return residual_add(x, residual, alpha, "complement", activation="relu").square().sum()

    leaves = [x.clone().requires_grad_(), alpha.clone().requires_grad_()]
    with resops.backend("reference"):  # the plain ops that run under a transform
        expected = torch.autograd.grad(loss(*leaves), leaves)
    for ours, theirs in zip(torch.func.grad(loss, (0, 1))(x, alpha), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_forward_mode(grad: bool) -> None:
    """F: forward-mode AD, with a learned weight as well: PyTorch's own ops compute."""
    x, residual, tangent = torch.randn(3, 2, 3, 4)
    alpha, tangent_of_alpha = torch.rand(2), torch.randn(2)

    def stock(x: Tensor, alpha: Tensor) -> Tensor:
        return torch.relu(alpha.view(2, 1, 1) * x + (1 - alpha.view(2, 1, 1)) * residual)

    def ours(x: Tensor, alpha: Tensor) -> Tensor:
        return residual_add(x, residual, alpha, "complement", activation="relu")

    results = []
    for f in (ours, stock):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            y = f(forward_ad.make_dual(x, tangent), forward_ad.make_dual(alpha, tangent_of_alpha))
            results.append(tuple(forward_ad.unpack_dual(y)))
    for a, b in zip(*results, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_grad(mode: Any) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with mode():
        y = residual_add(x, x, activation="relu")
    assert not y.requires_grad and torch.equal(y, (2 * x).relu())


# ---- weights of the backward pass ---------------------------------------------------------------


def shake(N: int, shape: str) -> Any:
    generator = torch.Generator().manual_seed(N)
    return {
        "number": 0.25,
        "scalar": torch.rand(1, generator=generator),
        "per_sample": torch.rand(N, 1, 1, generator=generator),
    }[shape]


@BACKENDS
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("shape", ["number", "scalar", "per_sample"])
def test_shake_shake(shape: str, activation: str | None, backend: str) -> None:
    """y has the forward weights, the gradients have the backward weights and the forward mask."""
    x, residual, grad_y = torch.randn(3, 3, 4, 5)
    x.requires_grad_()
    residual.requires_grad_()
    alpha = torch.rand(3, requires_grad=True)
    a = alpha.detach().view(3, 1, 1)
    other = shake(3, shape)
    z = (a * x + (1 - a) * residual).detach()
    passes = torch.where(z > 0, 1.0, {None: 1.0, "relu": 0.0}.get(activation, 0.01))
    with resops.backend(backend):
        y = residual_add(
            x, residual, alpha, "complement", activation=activation, alpha_backward=other
        )
        torch.testing.assert_close(y.detach(), z * passes)
        y.backward(grad_y)
    assert alpha.grad is None
    torch.testing.assert_close(x.grad, other * passes * grad_y)
    torch.testing.assert_close(residual.grad, (1 - other) * passes * grad_y)


@BACKENDS
def test_one_backward_weight_leaves_the_other_one_as_it_is(backend: str) -> None:
    """ShakeDrop: beta is 1 in both directions; and beta_backward alone."""
    x, residual = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    with resops.backend(backend):
        y = residual_add(x, residual, torch.tensor([0.0, 1.0]), alpha_backward=0.5)
        assert torch.equal(y[0], residual[0])
        grads = torch.autograd.grad(y.sum(), (x, residual))
        assert torch.equal(grads[0], torch.full((2, 3), 0.5))
        assert torch.equal(grads[1], torch.ones(2, 3))
        y = residual_add(x, residual, 2.0, 3.0, beta_backward=torch.tensor([4.0, 5.0]))
        grads = torch.autograd.grad(y.sum(), (x, residual))
        assert torch.equal(grads[0], torch.full((2, 3), 2.0))
        assert torch.equal(grads[1], torch.tensor([[4.0] * 3, [5.0] * 3]))
        y = residual_add(x, residual, 2.0, 3.0, alpha_backward=0.25, beta_backward="complement")
        grads = torch.autograd.grad(y.sum(), (x, residual))
        assert torch.equal(grads[0], torch.full((2, 3), 0.25))
        assert torch.equal(grads[1], torch.full((2, 3), 0.75))


@BACKENDS
def test_second_derivative_of_the_backward_formula(backend: str) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with resops.backend(backend):
        y = residual_add(x, x.detach(), 1.0, activation="relu", alpha_backward=3.0)
        (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
        (second,) = torch.autograd.grad(grad_x.sum(), grad_y)
    torch.testing.assert_close(second, 3.0 * (y > 0).double())


@BACKENDS
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_backward_weights_beside_a_smooth_activation_raise(activation: str, backend: str) -> None:
    x = torch.randn(2, 3)
    with (
        resops.backend(backend),
        pytest.raises(ValueError, match="alpha_backward and beta_backward go with identity"),
    ):
        residual_add(x, x, 0.5, activation=activation, alpha_backward=0.5)


# ---- what is saved ------------------------------------------------------------------------------


def saved_bytes(case: ResidualAddCase) -> int:
    total = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        total += t.nbytes
        return t

    call, leaves = function_of_tensors(case)
    with saved_tensors_hooks(pack, lambda t: t):
        call(*leaves)
    return total


@pytest.mark.parametrize(
    ("weighting", "activation", "tensors"),
    [
        ("plain", "identity", 0),
        ("constants", "identity", 0),
        ("constant_complement", "relu", 0),
        ("scalar", "relu", 1),
        ("scalars", "leaky_relu", 2),
        ("scalar_complement", "identity", 2),
        ("per_sample", "relu", 1),
        ("gate", "relu", 2),
        ("gates", "identity", 4),
        ("plain", "silu", 2),
        ("scalars", "gelu", 2),
    ],
)
def test_saved_for_backward(weighting: str, activation: str, tensors: int) -> None:
    """One bit per element for relu and leaky_relu; tensors like x only where docs/math says."""
    case = random_case(torch.randn(3, 5, 7, 3), weighting, activation=activation)
    length = math.prod(case.x.shape[1:])
    weights = [w for name, w in case.tensors().items() if name in ("alpha", "beta")]
    small = sum(w.nbytes for w in weights if w.shape != case.x.shape)
    mask = 3 * -(-length // 8) if activation in ("relu", "leaky_relu") else 0
    assert saved_bytes(case) == tensors * case.x.nbytes + small + mask


def test_saved_weights_are_those_that_backward_reads() -> None:
    """A gate is not kept where only the other tensor needs a gradient."""
    x, gate = torch.randn(2, 8), torch.rand(2, 8)
    residual = torch.randn(2, 8, requires_grad=True)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        residual_add(x, residual, gate, activation="relu")
    assert [t.shape for t in kept] == [(2, 1)]


# ---- opcheck and torch.compile ------------------------------------------------------------------


# Wherever an argument requires grad, torch warns that the op has no derivative.
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize(
    ("weighting", "activation", "layout", "shape"),
    [
        ("plain", "relu", "contiguous", (3, 4, 5, 2)),
        ("plain", "relu", "channels_last", (2, 3, 1, 1)),
        ("scalar_complement", "silu", "channels_last", (3, 4, 5, 2)),
        ("per_samples", "leaky_relu", "every_second", (3, 4, 5, 2)),
        ("gates", "identity", "channels_last", (2, 3, 4)),
        ("gate_complement", "relu", "every_second", (2, 4)),
        ("constants", "gelu", "contiguous", (5,)),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(
    weighting: str, activation: str, layout: str, shape: tuple[int, ...], requires_grad: bool
) -> None:
    """F: schema, fake kernels with their strides, autograd registration, AOT dispatch; dtypes
    take turns."""
    ops = torch.ops.resops
    turn = ACTIVATIONS.index(activation) + len(shape) + 2 * requires_grad
    dtype = (torch.float64, torch.float32, torch.bfloat16, torch.float16)[turn % 4]
    x = torch.randn(shape).to(dtype)
    x = x if len(shape) == 1 else in_layout(x, layout)
    case = random_case(x, weighting, activation=activation)
    arguments = op_arguments(case)
    y, mask = ops.residual_add_forward(*arguments.values())
    if requires_grad:
        for t in arguments.values():
            if isinstance(t, Tensor):
                t.requires_grad_()
    result = torch.library.opcheck(ops.residual_add_forward.default, tuple(arguments.values()))
    assert len(result) == 4 and all(v == "SUCCESS" for v in result.values()), result
    wanted = [True, True, *(arguments[name] is not None for name in ("alpha", "beta"))]
    grad_y = torch.randn_like(y)
    backward = (grad_y, x, case.residual, *list(arguments.values())[2:7], mask)
    for output_mask in (wanted, [False, not wanted[2], wanted[2], False], [False] * 4):
        torch.library.opcheck(
            ops.residual_add_backward.default,
            (*backward, activation, 0.01, output_mask),
            test_utils="ALL" if output_mask is wanted else ("test_schema", "test_faketensor"),
        )


def join(x: Tensor, residual: Tensor, alpha: Tensor, gate: Tensor, other: Tensor) -> Tensor:
    """Every kind of weight in one function."""
    z = residual_add(x, residual, activation="relu")
    z = residual_add(z, residual, alpha, "complement", activation="silu")
    z = residual_add(z, x, gate, "complement")
    return residual_add(z, residual, other, "complement", activation="relu", alpha_backward=0.25)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(join, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N, layout in ((3, torch.contiguous_format), (4, torch.channels_last)):
        shape = (N, 4, 5, 3)
        tensors = [torch.randn(shape).to(memory_format=layout) for _ in range(2)]
        tensors += [torch.rand(N), torch.rand(shape), torch.rand(1)]
        leaves = [t.requires_grad_() for t in tensors]
        ours, expected = compiled(*leaves), join(*leaves)
        assert ours.stride() == expected.stride() and torch.equal(ours, expected)
        grads = [torch.autograd.grad(y.square().sum(), leaves[:4]) for y in (ours, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_compile_inductor() -> None:
    torch._dynamo.reset()
    leaves = [torch.randn(2, 4, 5, 3).requires_grad_() for _ in range(2)]
    leaves += [torch.rand(size).requires_grad_() for size in ((2,), (2, 4, 5, 3), (1,))]
    y = torch.compile(join, fullgraph=True)(*leaves)
    expected = join(*leaves)
    torch.testing.assert_close(y, expected)
    for a, b in zip(
        torch.autograd.grad(y.sum(), leaves[:4]),
        torch.autograd.grad(expected.sum(), leaves[:4]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_export_emits_plain_aten() -> None:
    class Join(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return residual_add(x, residual, 0.5, activation="relu")

    x, residual = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    program = torch.export.export(Join(), (x, residual))
    assert "resops" not in str(program.graph)
    torch.testing.assert_close(program.module()(x, residual), Join()(x, residual))


# ---- autocast -----------------------------------------------------------------------------------


def test_autocast() -> None:
    """A bf16 branch and an fp32 shortcut give fp32, as + does; parameters keep their dtype."""
    linear = torch.nn.Linear(8, 8)
    x, alpha = torch.randn(4, 8), torch.ones(1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        branch = linear(x)
        assert branch.dtype == torch.bfloat16
        assert residual_add(branch, x, alpha).dtype == torch.float32
        y = residual_add(branch, branch, alpha, activation="relu")
        assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert alpha.grad is not None and alpha.grad.dtype == torch.float32
