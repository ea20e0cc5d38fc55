"""batch_norm_act_max_pool: values by rule R, the windows' own rules, autograd, bad input."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resops
from resops.functional import batch_norm_act_max_pool
from resops.reference import batch_norm_act_max_pool as reference
from tests.dispatch import counted_calls, native_calls
from tests.ops import batch_norm_oracle as oracle
from tests.ops.batch_norm_act_max_pool_oracle import (
    STEM,
    WINDOWS,
    Case,
    Windows,
    make_case,
    run_ops,
)
from tests.ops.batch_norm_oracle import ACTIVATIONS, bits, dense
from tests.subprocess_calls import run_calls
from tests.tensors import guarded, in_layout

pytestmark = pytest.mark.usefixtures("native")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CAPABLE = pytest.mark.usefixtures("capability")
OP = "batch_norm_act_max_pool"
ops = torch.ops.resops


def run_functional(case: Case) -> dict[str, Tensor]:
    """The public function and autograd; the native op must have run."""
    c = case.norm
    running = {n: getattr(c, n) for n in ("running_mean", "running_var")}
    running = {n: None if t is None else t.clone() for n, t in running.items()}
    leaves = {
        n: t.detach().requires_grad_()
        for n in ("x", "weight", "bias")
        if (t := getattr(c, n)) is not None
    }
    before = bits(c.x)
    with counted_calls() as calls:
        y = batch_norm_act_max_pool(
            leaves["x"],
            running["running_mean"],
            running["running_var"],
            leaves.get("weight"),
            leaves.get("bias"),
            c.training,
            c.momentum,
            c.eps,
            kernel_size=case.windows.kernel,
            stride=case.windows.stride,
            padding=case.windows.padding,
            activation=None if c.activation == "identity" else c.activation,
            negative_slope=c.negative_slope,
        )
        grads = torch.autograd.grad(y, list(leaves.values()), c.grad_y)
    assert native_calls(calls) == {f"{OP}_backward": 1, f"{OP}_forward": 1}
    assert torch.equal(bits(c.x), before), "the input was written to"
    out = {"y": y.detach()}
    if c.training:
        out |= {n: t for n, t in running.items() if t is not None}
    out |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    expected = oracle.expected_strides(c.x)
    assert out["grad_x"].stride() == expected and out["grad_x"].dtype == c.x.dtype
    return out


# ---- rule R -------------------------------------------------------------------------------------


@CAPABLE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rule_R(activation: str, dtype: torch.dtype) -> None:
    """Channels that are no whole vector, one and several; both layouts; training and frozen."""
    for i, channels in enumerate((1, 3, 17, 32)):
        case = make_case(
            (2, channels, 7 + i, 9),
            dtype=dtype,
            layout="contiguous" if i % 3 == 0 else "channels_last",
            seed=i,
            activation=activation,
            training=i != 1,
        )
        case.check(run_functional(case))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "every_second"])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_windows(windows: Windows, layout: str) -> None:
    for shape, activation in (((2, 5, 11, 8), "relu"), ((3, 16, 5, 4), "silu")):
        case = make_case(shape, windows, layout=layout, activation=activation)
        case.check(run_functional(case))


def test_many_bands_and_blocks() -> None:
    """More rows than a band has, and more columns than are summed in one block."""
    for layout in ("channels_last", "contiguous"):
        case = make_case((2, 4, 70, 301), layout=layout, activation="relu")
        case.check(run_functional(case))


def test_means_far_from_zero() -> None:
    for layout in ("channels_last", "contiguous"):
        case = make_case((2, 5, 12, 12), layout=layout)
        far = Case(replace(case.norm, x=case.norm.x + 1000), STEM).with_decided_maxima()
        far.check(run_functional(far))


def test_reference_passes() -> None:
    """The definition as the two passes obeys rule R too."""
    for windows, dtype in itertools.product(WINDOWS, (torch.float32, torch.bfloat16)):
        case = make_case((2, 5, 11, 8), windows, dtype, activation="leaky_relu")
        case.check(run_ops(case, reference))


@CAPABLE
@pytest.mark.parametrize("seed", range(12))
def test_fuzz_with_guard_bands(seed: int) -> None:
    """Random sizes and windows; tensors in NaN margins, in layouts and alignments of their own."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    height, width = pick(range(1, 14)), pick(range(1, 20))
    kernel = tuple(int(min(pick([1, 2, 3, 4]), size)) for size in (height, width))
    windows = Windows(
        kernel, (pick([1, 2, 3]), pick([1, 2, 5])), tuple(pick(range(k // 2 + 1)) for k in kernel)
    )
    shape = (pick([1, 2, 3]), pick([1, 2, 7, 16, 33]), height, width)
    if shape[0] * height * width == 1:
        shape = (2, *shape[1:])
    dtype = DTYPES[seed % 4]
    layouts = ["channels_last", "contiguous", "spatial_swapped", "every_second"]
    case = make_case(shape, windows, dtype, "contiguous", seed, activation=ACTIVATIONS[seed % 5])
    x = guarded(case.norm.x, pick(layouts), pick(range(17)))
    assert case.norm.grad_y is not None
    grad = guarded(case.norm.grad_y, pick(layouts), pick(range(17)))
    case = case._replace(norm=replace(case.norm, x=x.tensor, grad_y=grad.tensor))
    case.check(run_functional(case))
    x.assert_untouched()
    grad.assert_untouched()


# ---- the rules of a window ----------------------------------------------------------------------


def plain_forward(x: Tensor, windows: Windows = STEM, activation: str = "identity") -> Any:
    """Of evaluation with mean 0 and deviation 1, so that a = act(x) exactly."""
    zero, one = x.new_zeros(x.size(1)).float(), x.new_ones(x.size(1)).float()
    if x.dtype == torch.float64:
        zero, one = zero.double(), one.double()
    rest = (False, 0.1, 0.0, activation, 0.01, *windows.lists())
    return ops.batch_norm_act_max_pool_forward(x, None, None, zero, one, *rest)


@CAPABLE
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_maxima_and_indices_are_torchs(windows: Windows, layout: str) -> None:
    """Small integers, so that there are many ties, with NaN, infinities and zeros of both signs."""
    x = torch.randint(-2, 3, (2, 19, 11, 12)).float()
    for value, share in ((math.nan, 0.02), (math.inf, 0.02), (-math.inf, 0.3), (-0.0, 0.1)):
        x[torch.rand_like(x) < share] = value
    for dtype in DTYPES:
        data = in_layout(x.to(dtype), layout)
        y, _, _, index = plain_forward(data, windows)
        want, flat = windows.pool(x.to(dtype))
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.nan_to_num(9.0), want.nan_to_num(9.0))
        first_row, first_column = reference._window_starts(y, *windows.lists()[1:])
        position = index.long()
        row = first_row + position // windows.kernel[1]
        column = first_column + position % windows.kernel[1]
        assert torch.equal(row * x.size(3) + column, flat)
        assert y.stride() == index.stride()


def test_a_nan_in_the_window_is_the_maximum_through_relu() -> None:
    x = torch.ones(1, 3, 4, 4)
    x[0, 1, 1, 1] = math.nan
    for data in (x, x.contiguous(memory_format=torch.channels_last)):
        y, *_ = plain_forward(data, Windows((2, 2), (2, 2), (0, 0)), "relu")
        assert y.isnan().sum() == 1 and y[0, 1, 0, 0].isnan()


@CAPABLE
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_every_gradient_arrives_once(layout: str) -> None:
    """Integers, exact in any order: nothing is skipped or counted twice, at any width."""
    for width, channels in itertools.product((1, 2, 15, 16, 17, 130), (1, 5, 16)):
        x = in_layout(torch.randint(-50, 50, (2, channels, 6, width)).float(), layout)
        windows = STEM if width > 1 else Windows((3, 1), (2, 1), (1, 0))
        y, mean, invstd, index = plain_forward(x, windows)
        grad_y = torch.randint(-9, 9, y.shape).float()
        grads = ops.batch_norm_act_max_pool_backward(
            *(grad_y, x, None, None, mean, invstd, index, False, "identity", 0.0),
            *windows.lists(),
            [True] * 3,
        )
        leaf = dense(x).requires_grad_()
        windows.pool(leaf)[0].backward(grad_y)
        assert leaf.grad is not None
        assert torch.equal(grads[0], leaf.grad)
        assert torch.equal(grads[1], (leaf.grad * x).sum((0, 2, 3)))
        assert torch.equal(grads[2], leaf.grad.sum((0, 2, 3)))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_same_bits_for_any_number_of_threads(layout: str) -> None:
    case = make_case((3, 16, 61, 67), layout=layout, activation="silu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run_functional(case))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, t in results[0].items():
            assert torch.equal(bits(t), bits(other[name])), name


def test_empty_batch() -> None:
    x = torch.empty(0, 3, 8, 8, requires_grad=True)
    running = torch.zeros(3), torch.ones(3)
    weight = torch.ones(3, requires_grad=True)
    y = batch_norm_act_max_pool(x, *running, weight, training=True, kernel_size=3, stride=2)
    assert y.shape == (0, 3, 3, 3)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(3))
    assert torch.equal(running[1], torch.ones(3))


# ---- autograd, compiling ------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_first_and_second_derivatives(activation: str, training: bool) -> None:
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64).requires_grad_()
    weight, bias = (torch.randn(2, dtype=torch.float64).requires_grad_() for _ in range(2))
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm_act_max_pool(
            x,
            mean.clone(),
            var.clone(),
            weight,
            bias,
            training,
            kernel_size=3,
            stride=2,
            padding=1,
            activation=activation,
        )

    assert torch.autograd.gradcheck(call, (x, weight, bias))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))


def test_every_subset_of_gradients() -> None:
    case = make_case((2, 3, 6, 6))
    full = run_functional(case)
    c = case.norm
    assert c.running_mean is not None and c.running_var is not None
    for wanted in itertools.product([True, False], repeat=3):
        assert c.weight is not None and c.bias is not None
        tensors = (c.x, c.weight, c.bias)
        leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        y = batch_norm_act_max_pool(
            leaves[0],
            None,
            None,
            leaves[1],
            leaves[2],
            training=True,
            kernel_size=3,
            stride=2,
            padding=1,
            activation=None,
        )
        if any(wanted):
            y.backward(c.grad_y)
        for leaf, want, name in zip(leaves, wanted, ("x", "weight", "bias"), strict=True):
            if want:
                assert leaf.grad is not None and torch.equal(leaf.grad, full[f"grad_{name}"])
            else:
                assert leaf.grad is None


def test_saved_for_backward_are_x_and_eight_bits_a_window() -> None:
    x = torch.randn(2, 16, 20, 20, requires_grad=True)
    weight = torch.ones(16, requires_grad=True)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        batch_norm_act_max_pool(x, None, None, weight, training=True, kernel_size=2)
    large = [(t.dtype, tuple(t.shape)) for t in kept if t.numel() > 16]
    assert len(large) == 2
    assert set(large) == {(torch.float32, (2, 16, 20, 20)), (torch.uint8, (2, 16, 10, 10))}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second"])
@pytest.mark.parametrize("shape", [(2, 3, 6, 7), (1, 1, 4, 4), (3, 4, 1, 2), (2, 1, 3, 1)], ids=str)
def test_opcheck(shape: tuple[int, ...], layout: str) -> None:
    windows = (
        STEM if min(shape[2:]) > 1 else Windows((1, 2) if shape[3] > 1 else (2, 1), (1, 1), (0, 0))
    )
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(shape, windows, dtype, layout)
        arguments = case.arguments()
        torch.library.opcheck(ops.batch_norm_act_max_pool_forward.default, arguments)
        _, mean, invstd, index = ops.batch_norm_act_max_pool_forward(*arguments)
        c = case.norm
        saved = (c.grad_y, c.x, c.weight, c.bias, mean, invstd, index, True, c.activation, 0.0)
        for mask in ([True] * 3, [False, True, False]):
            torch.library.opcheck(
                ops.batch_norm_act_max_pool_backward.default, (*saved, *windows.lists(), mask)
            )


def test_compiled_gives_the_same_bits() -> None:
    case = make_case((2, 16, 10, 12), activation="relu")
    eager = run_functional(case)
    c = case.norm
    assert c.running_mean is not None and c.running_var is not None
    assert c.weight is not None and c.bias is not None
    running = (c.running_mean.clone(), c.running_var.clone())
    leaves = [t.detach().requires_grad_() for t in (c.x, c.weight, c.bias)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm_act_max_pool(
            x, *running, weight, bias, True, kernel_size=3, stride=2, padding=1
        )

    y = call(*leaves)
    y.backward(c.grad_y)
    got: dict[str, Any] = {"y": y, "running_mean": running[0], "running_var": running[1]}
    got |= {f"grad_{n}": leaf.grad for n, leaf in zip(("x", "weight", "bias"), leaves, strict=True)}
    for name, t in got.items():
        assert torch.equal(t, eager[name]) and t.stride() == eager[name].stride(), name


def test_exported_and_transformed_as_atens_own() -> None:
    x = torch.randn(2, 3, 8, 8)
    running = torch.zeros(3), torch.ones(3)

    class Stem(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return batch_norm_act_max_pool(x, *running, kernel_size=3, stride=2, padding=1)

    exported = torch.export.export(Stem(), (x,))
    assert "resops" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), Stem()(x))
    mapped = torch.func.vmap(Stem())(x.expand(2, *x.shape))
    torch.testing.assert_close(mapped[1], Stem()(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_backend_is_the_composition(dtype: torch.dtype) -> None:
    case = make_case((2, 5, 9, 8), dtype=dtype, activation="relu")
    c = case.norm
    with resops.backend("reference"), counted_calls() as calls:
        y = batch_norm_act_max_pool(
            c.x, None, None, c.weight, c.bias, True, kernel_size=3, stride=2, padding=1
        )
    assert not native_calls(calls)
    case._replace(norm=replace(c, running_mean=None, running_var=None)).check({"y": y})


def test_triton_says_that_it_has_no_such_kernel() -> None:
    with resops.backend("triton"), pytest.raises(resops.BackendError, match=f"{OP}|riton"):
        batch_norm_act_max_pool(torch.ones(2, 3, 4, 4), None, None, training=True, kernel_size=2)


# ---- wrong arguments ----------------------------------------------------------------------------

X = torch.ones(2, 3, 8, 8)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no image": ({"x": torch.ones(2, 3, 8)}, ValueError, r"size \(N, C, H, W\), but got .*2, 3, 8"),
    "integers": ({"x": X.int()}, NotImplementedError, "not implemented for"),
    "no kernel": ({"kernel_size": 0}, RuntimeError, "kernel_size should be greater than zero"),
    "no stride": ({"stride": (1, 0)}, RuntimeError, "stride should be greater than zero"),
    "padding": ({"padding": 2}, RuntimeError, "at most half of kernel_size, but got padding="),
    "negative": ({"padding": -1}, RuntimeError, "padding should be at least 0"),
    "three": ({"kernel_size": (1, 2, 3)}, RuntimeError, "kernel_size should have 2 elements"),
    "large": (
        {"x": torch.ones(1, 1, 20, 20), "kernel_size": 17},
        NotImplementedError,
        "windows of up to 256 positions",
    ),
    "too small": ({"kernel_size": 9}, RuntimeError, "Output size is too small"),
    "no columns": ({"x": torch.ones(2, 3, 8, 0)}, RuntimeError, "sizes are not 0"),
    "float kernel": ({"kernel_size": 2.0}, TypeError, "kernel_size' must be int or a tuple"),
    "activation": ({"activation": "tanh"}, ValueError, "activation must be one of"),
    "weight": ({"weight": torch.ones(4)}, RuntimeError, "weight should contain 3 elements not 4"),
    "one statistic": ({"running_mean": torch.ones(3)}, ValueError, "running_mean and running_var"),
    "one value": ({"x": torch.ones(1, 3, 1, 1), "kernel_size": 1}, ValueError, "more than 1 value"),
    "eps": ({"eps": 0.0}, ValueError, "eps must be positive"),
    "dilation": ({"dilation": 2}, NotImplementedError, "dilation=1"),
    "ceil_mode": ({"ceil_mode": True}, NotImplementedError, "ceil_mode=False"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, backend: str) -> None:
    fields, error, message = WRONG[name]
    call = {"x": X, "running_mean": None, "running_var": None, "training": True, "kernel_size": 2}
    call |= fields
    with resops.backend(backend), pytest.raises(error, match=message):
        batch_norm_act_max_pool(call.pop("x"), **call)


def _backward(**fields: Any) -> None:
    call = {
        "grad_y": torch.ones(2, 3, 4, 4),
        "x": X,
        "weight": None,
        "bias": None,
        "mean": torch.zeros(3),
        "invstd": torch.ones(3),
        "index": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        "training": True,
        "activation": "relu",
        "negative_slope": 0.0,
        "kernel_size": [2, 2],
        "stride": [2, 2],
        "padding": [0, 0],
        "output_mask": [True] * 3,
    }
    ops.batch_norm_act_max_pool_backward(*(call | fields).values())


CRASHING: dict[str, dict[str, Any]] = {
    "short index": {"index": torch.zeros(2, 3, 4, 3, dtype=torch.uint8)},
    "wide index": {"index": torch.zeros(2, 3, 4, 4, dtype=torch.int64)},
    "short gradient": {"grad_y": torch.ones(1, 3, 4, 4)},
    "short mean": {"mean": torch.zeros(2)},
    "double invstd": {"invstd": torch.ones(3, dtype=torch.float64)},
    "kernel of one": {"kernel_size": [2]},
    "huge kernel": {"kernel_size": [2**62, 4]},
    "huge padding": {"padding": [2**62, 0]},
    "no stride": {"stride": [0, 2]},
}
CALLS = {name: (lambda f=fields: _backward(**f)) for name, fields in CRASHING.items()}


def test_wrong_calls_of_the_op_raise() -> None:
    """In another process: an exception, never a signal. No index leads out of its window."""
    outcomes = run_calls(__name__, list(CALLS))
    for name, outcome in outcomes.items():
        assert outcome.error in ("RuntimeError", "NotImplementedError"), (name, outcome)
    index = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    _backward(index=index)
