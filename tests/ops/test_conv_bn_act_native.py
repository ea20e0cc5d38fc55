"""The convolutions of csrc/cpu, phase by phase, against float64.

Errors are relative to the sum of the absolute values of an output's terms, as in rule R
(tests/accuracy.py). A Winograd convolution adds and subtracts transformed values up to a hundred
times as large as the terms, so it may not be held to twice the error of a direct one: that is the
announced exception "high". It is held to LIMIT here, a tenth of what is documented.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

import resops
from resops.functional import conv_bn_act
from resops.nn import Conv2dNormActivation
from resops.ops.conv_bn_act_convolution import convolution, convolution_path
from resops.reference import conv_bn_act as reference
from resops.reference.batch_norm import batch_norm_backward_reduce, batch_norm_statistics
from tests.accuracy import UNIT_ROUNDOFF
from tests.dispatch import counted_calls
from tests.tensors import in_poison

pytestmark = pytest.mark.usefixtures("native")

CL = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DOCUMENTED = 5e-5
LIMIT = DOCUMENTED / 10

# N, C_in, C, H, W, padding: odd channels, single rows, slices of tiles, more than one block.
SHAPES = [
    (1, 1, 1, 3, 3, (0, 0)),
    (2, 3, 17, 1, 1, (1, 1)),
    (2, 17, 3, 5, 7, (1, 2)),
    (1, 65, 33, 20, 13, (2, 1)),
    (3, 16, 48, 8, 8, (1, 1)),
    (2, 130, 32, 9, 4, (1, 0)),
    (1, 5, 5, 2, 19, (2, 2)),
]


@pytest.fixture
def choose() -> Iterator[Callable[[str], None]]:
    """Chooses the algorithm of every call that has it, also of the smallest."""
    from resops import _C

    before = _C.conv_algorithm()
    try:
        yield _C.set_conv_algorithm
    finally:
        _C.set_conv_algorithm(before)


@pytest.fixture
def winograd(choose: Callable[[str], None]) -> None:
    choose("winograd")


class Call:
    """Random arguments of all three phases."""

    def __init__(
        self,
        shape: tuple[int, int, int, int, int, tuple[int, int]],
        dtype: torch.dtype,
        activation: str = "relu",
        kernel: int = 3,
        stride: int = 1,
    ) -> None:
        n, c_in, c, h, w, padding = shape
        self.dtype, self.activation = dtype, activation
        self.geometry = ([stride] * 2, list(padding), [1, 1])
        self.x = torch.randn(n, c_in, h, w).to(dtype).contiguous(memory_format=CL)
        self.weight = torch.randn(c, c_in, kernel, kernel).to(dtype)
        self.bias = torch.randn(c).to(dtype)
        self.scale, self.shift = torch.rand(c_in) + 0.5, torch.randn(c_in)
        self.mean, self.invstd = torch.randn(c_in), torch.rand(c_in) + 0.5
        self.addend = torch.randn_like(self.x)
        out = F.conv2d(self.x.float(), self.weight.float(), None, *self.geometry[:2])
        self.residual = torch.randn_like(out).to(dtype)

    @property
    def inputs(self) -> list[Tensor]:
        """In two slices, where there are channels for two."""
        c = self.x.size(1) // 3
        return [self.x[:, :c], self.x[:, c:]] if c else [self.x]

    @property
    def prologue(self) -> tuple[Any, ...]:
        return self.scale, self.shift, self.activation, 0.1

    def wide(self, t: Any) -> Any:
        return [v.double() for v in t] if isinstance(t, list) else t.double()

    def forward(self, ops: Any, wide: bool = False) -> Tensor:
        cast = self.wide if wide else lambda t: t
        y: Tensor = ops.conv_bn_act_forward(
            cast(self.inputs),
            cast(self.scale),
            cast(self.shift),
            *self.prologue[2:],
            cast(self.weight),
            cast(self.bias),
            cast(self.residual),
            self.activation,
            0.1,
            *self.geometry,
            False,
        )[0]
        return y

    def plain_forward(self, ops: Any) -> tuple[Tensor, Tensor, Tensor]:
        """y with its statistics."""
        none = (None, None, "identity", 0.0)
        outputs: tuple[Tensor, Tensor, Tensor] = ops.conv_bn_act_forward(
            self.inputs, *none, self.weight, None, None, "identity", 0.0, *self.geometry, True
        )
        return outputs

    def backward_data(self, ops: Any, wide: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        cast = self.wide if wide else lambda t: t
        outputs: tuple[Tensor, Tensor, Tensor] = ops.conv_bn_act_backward_data(
            cast(self.residual),
            cast(self.weight),
            list(self.x.shape),
            cast(self.x),
            cast(self.scale),
            cast(self.shift),
            *self.prologue[2:],
            cast(self.mean),
            cast(self.invstd),
            cast(self.addend),
            *self.geometry,
        )
        return outputs

    def backward_weight(self, ops: Any, wide: bool = False) -> Tensor:
        cast = self.wide if wide else lambda t: t
        g: Tensor = ops.conv_bn_act_backward_weight(
            cast(self.residual),
            cast(self.inputs),
            cast(self.scale),
            cast(self.shift),
            *self.prologue[2:],
            list(self.weight.shape),
            *self.geometry,
        )
        return g

    # The sums of the absolute values of the terms of each output.

    def _magnitudes(self) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        z = self.x.double() * self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1)
        return z.abs(), self.weight.double().abs(), tuple(self.geometry)

    def forward_terms(self) -> Tensor:
        z, weight, (stride, padding, dilation) = self._magnitudes()
        terms = F.conv2d(z, weight, self.bias.double().abs(), stride, padding, dilation)
        return terms + self.residual.double().abs()

    def backward_data_terms(self) -> Tensor:
        z, weight, geometry = self._magnitudes()
        like = torch.ops.aten.convolution_backward(
            self.residual.double().abs(),
            z,
            weight,
            None,
            *geometry,
            False,
            [0, 0],
            1,
            [True, False, False],
        )
        return like[0] + self.addend.double().abs()

    def backward_weight_terms(self) -> Tensor:
        z, weight, geometry = self._magnitudes()
        like = torch.ops.aten.convolution_backward(
            self.residual.double().abs(),
            z,
            weight,
            None,
            *geometry,
            False,
            [0, 0],
            1,
            [False, True, False],
        )
        return like[1]


def assert_near(name: str, ours: Tensor, exact: Tensor, terms: Tensor, limit: float) -> None:
    """In the norm of rule R, and for the worst element."""
    assert ours.shape == exact.shape, name
    difference = (ours.double() - exact).abs()
    error = float(difference.norm() / terms.norm())
    worst = float(difference.max() / terms.max())
    assert error <= limit and worst <= 4 * limit, f"{name}: {error:.3g}, worst {worst:.3g}"


def limit(dtype: torch.dtype) -> float:
    return LIMIT + (0.0 if dtype == torch.float32 else 2 * UNIT_ROUNDOFF[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_winograd_phases(shape: Any, dtype: torch.dtype, capability: str, winograd: None) -> None:
    """Every phase with prologue and epilogue, the input in two slices."""
    ops = torch.ops.resops
    for activation in ("relu", "silu"):
        call = Call(shape, dtype, activation)
        y = call.forward(ops)
        assert y.dtype == dtype and y.is_contiguous(memory_format=CL)
        assert_near("y", y, call.forward(reference, True), call.forward_terms(), limit(dtype))
        g, *sums = call.backward_data(ops)
        exact, *_ = call.backward_data(reference, True)
        # The derivatives of relu and silu are at most 1.1.
        assert_near("g", g, exact, 1.1 * call.backward_data_terms(), limit(dtype))
        expected = batch_norm_backward_reduce(
            g.double(),
            call.x.double(),
            *(None,) * 4,
            call.mean.double(),
            call.invstd.double(),
            "identity",
            0.0,
        )
        terms = batch_norm_backward_reduce(
            g.double().abs(),
            call.mean.double().view(-1, 1, 1)
            + (call.x.double() - call.mean.double().view(-1, 1, 1)).abs(),
            *(None,) * 4,
            call.mean.double(),
            call.invstd.double(),
            "identity",
            0.0,
        )
        for name, ours, theirs, magnitude in zip(
            ("sum", "sum xhat"), sums, expected, terms, strict=True
        ):
            assert_near(name, ours, theirs, magnitude, 1e-6)  # sums of 16 in float32
        grad_weight = call.backward_weight(ops)
        assert_near(
            "grad_weight",
            grad_weight,
            call.backward_weight(reference, True),
            call.backward_weight_terms(),
            limit(dtype),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_statistics_are_those_of_the_rounded_output(
    mean: float, dtype: torch.dtype, capability: str, winograd: None
) -> None:
    """Also where the mean is a thousand times the deviation: one-pass sums have no digit left."""
    call = Call((3, 16, 20, 13, 9, (1, 1)), dtype)
    call.x = call.x * 0.01 + mean / 100
    call.geometry = ([1, 1], [0, 0], [1, 1])
    y, ours_mean, ours_var = call.plain_forward(torch.ops.resops)
    expected_mean, expected_var = batch_norm_statistics(y.double())
    torch.testing.assert_close(ours_mean.double(), expected_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours_var.double(), expected_var, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    "shape", [(2, 40, 72, 14, 14, (1, 1)), (9, 20, 40, 34, 30, (1, 1))], ids=str
)
def test_same_bits_for_any_number_of_threads(shape: Any, winograd: None) -> None:
    """Fewer blocks of tiles than threads, and more."""
    call = Call(shape, torch.float32)
    before = torch.get_num_threads()
    results: list[tuple[Tensor, ...]] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ops = torch.ops.resops
            results.append(
                (
                    call.forward(ops),
                    *call.plain_forward(ops),
                    *call.backward_data(ops),
                    call.backward_weight(ops),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def inner_calls(f: Callable[[], Any]) -> tuple[Any, set[str]]:
    """What f returns, and the names of all ops that ran, also inside of others."""
    with torch.profiler.profile() as profile:
        outputs = f()
    return outputs, {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("shape", SHAPES[2:5], ids=str)
def test_slices_need_no_copy_and_let_nothing_in(
    shape: Any, capability: str, winograd: None
) -> None:
    call = Call(shape, torch.float32)
    ops = torch.ops.resops
    expected = call.forward(ops), *call.backward_data(ops), call.backward_weight(ops)
    for name in ("x", "addend", "residual"):
        setattr(call, name, in_poison(getattr(call, name)))
    ours, inner = inner_calls(
        lambda: (call.forward(ops), *call.backward_data(ops), call.backward_weight(ops))
    )
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
    assert "resops::conv_bn_act_forward" in inner
    assert not {"aten::clone", "aten::copy_", "aten::cat"} & inner


def test_nan_and_infinity_reach_every_output_that_reads_them(winograd: None) -> None:
    call = Call((1, 4, 4, 9, 9, (1, 1)), torch.float32)
    for value in (float("nan"), float("inf")):
        x = call.x.clone()
        x[0, 1, 4, 4] = value
        y = F.relu(
            torch.ops.resops.conv_bn_act_forward(
                [x],
                None,
                None,
                "identity",
                0.0,
                call.weight,
                None,
                None,
                "identity",
                0.0,
                *call.geometry,
                False,
            )[0]
        )
        assert not y[0, :, 3:6, 3:6].isfinite().all(0).any()


@pytest.mark.parametrize("algorithm", ["onednn", "matrix_product", "transposed_product"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("h", "w"), [(5, 9), (17, 15)])
def test_pointwise_phases(
    h: int, w: int, stride: int, algorithm: str, choose: Callable[[str], None]
) -> None:
    """1x1 convolutions by every algorithm that a phase has: direct, so nearer the truth."""
    choose(algorithm)
    call = Call((2, 12, 20, h, w, (0, 0)), torch.float32, kernel=1, stride=stride)
    direct = 8 * UNIT_ROUNDOFF[torch.float32]
    ops = torch.ops.resops
    assert_near("y", call.forward(ops), call.forward(reference, True), call.forward_terms(), direct)
    g, *_ = call.backward_data(ops)
    exact, *_ = call.backward_data(reference, True)
    assert_near("g", g, exact, call.backward_data_terms(), direct)
    exact_weight = call.backward_weight(reference, True)
    terms = call.backward_weight_terms()
    assert_near("grad_weight", call.backward_weight(ops), exact_weight, terms, direct)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_other_convolutions_go_through_the_library(dtype: torch.dtype) -> None:
    call = Call((2, 6, 10, 9, 8, (2, 2)), dtype, kernel=5, stride=2)
    if dtype == torch.float64:
        for name in ("scale", "shift", "mean", "invstd"):
            setattr(call, name, getattr(call, name).double())
    ops, bound = torch.ops.resops, 4 * UNIT_ROUNDOFF[dtype] + 8 * UNIT_ROUNDOFF[torch.float32]
    y, inner = inner_calls(lambda: call.forward(ops))
    assert "aten::convolution" in inner
    assert_near("y", y, call.forward(reference, True), call.forward_terms(), bound)
    g, *_ = call.backward_data(ops)
    exact, *_ = call.backward_data(reference, True)
    assert_near("g", g, exact, call.backward_data_terms(), bound)
    exact_weight = call.backward_weight(reference, True)
    terms = call.backward_weight_terms()
    assert_near("grad_weight", call.backward_weight(ops), exact_weight, terms, bound)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_no_images(kernel: int) -> None:
    x, weight = torch.empty(0, 16, 8, 8).to(memory_format=CL), torch.randn(16, 16, kernel, kernel)
    none, geometry = (None, None, "identity", 0.0), ([1, 1], [0, 0], [1, 1])
    ops = torch.ops.resops
    y, *_ = ops.conv_bn_act_forward(
        [x], *none, weight, None, None, "identity", 0.0, *geometry, False
    )
    assert y.shape == (0, 16, 9 - kernel, 9 - kernel)
    g, *_ = ops.conv_bn_act_backward_data(
        y, weight, list(x.shape), None, *none, None, None, None, *geometry
    )
    assert g.shape == x.shape
    grad_weight = ops.conv_bn_act_backward_weight(y, [x], *none, list(weight.shape), *geometry)
    assert torch.equal(grad_weight, torch.zeros_like(weight))


def peak_memory(f: Callable[[], Any]) -> int:
    """Bytes that torch's allocator had given out at once while f ran, beyond those before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        outputs = f()  # kept until the end
    assert profile.profiler is not None and outputs is not None
    events: Any = profile.profiler.kineto_results
    now = most = 0
    for event in sorted(events.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_workspace_is_bounded(one_thread: None) -> None:
    """64 MB, however many channels there are: here the products at all points are 151 MB."""
    from resops import _C

    call = Call((1, 1024, 1024, 24, 24, (1, 1)), torch.float32)
    none, ops = (None, None, "identity", 0.0), torch.ops.resops
    y, *_ = call.plain_forward(ops)
    _C.scratch_peak()
    forward = peak_memory(lambda: call.plain_forward(ops)) - y.nbytes
    assert 0 < forward + _C.scratch_peak() < 64 << 20
    weight = peak_memory(
        lambda: ops.conv_bn_act_backward_weight(
            y, [call.x], *none, list(call.weight.shape), *call.geometry
        )
    )
    scratch = _C.scratch_peak()
    assert scratch > 0 and weight - call.weight.nbytes + scratch < 64 << 20
    assert _C.scratch_peak() == 0


def test_workspace_of_many_output_channels(one_thread: None) -> None:
    """The products of one panel of input channels with all output channels would be 83 MB."""
    from resops import _C

    channels = 18_000
    x, grad = (torch.randn(4, c, 5, 5).to(memory_format=CL) for c in (16, channels))
    none, geometry = (None, None, "identity", 0.0), ([1, 1], [1, 1], [1, 1])
    _C.scratch_peak()
    found = torch.ops.resops.conv_bn_act_backward_weight(
        grad, [x], *none, [channels, 16, 3, 3], *geometry
    )
    assert 0 < _C.scratch_peak() < 64 << 20
    some = torch.tensor([0, 139, 140, channels - 1])
    exact = conv2d_weight(x.double(), (len(some), 16, 3, 3), grad[:, some].double(), padding=1)
    terms = conv2d_weight(
        x.double().abs(), (len(some), 16, 3, 3), grad[:, some].double().abs(), padding=1
    )
    assert_near("grad_weight", found[some], exact, terms, LIMIT)


# ---- the choice of the algorithm ----------------------------------------------------------------


def path(
    direction: str = "forward", dtype: str = "float32", kernel: int = 3, **changed: Any
) -> Any:
    from resops import _C

    arguments = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]} | changed
    batch, channels, size = (arguments.pop(n, d) for n, d in (("n", 8), ("c", 64), ("size", 28)))
    in_channels = arguments.pop("c_in", channels)
    return _C.conv_path(
        direction,
        dtype,
        [batch, in_channels, size, size],
        [batch, channels, size, size],
        [channels, in_channels, kernel, kernel],
        **arguments,
    )


@pytest.mark.parametrize(
    ("arguments", "algorithm", "reason"),
    [
        ({}, "winograd", "3x3 of stride 1"),
        ({"direction": "backward_weight"}, "winograd", "3x3 of stride 1"),
        ({"kernel": 5}, "library", "the kernel is not 3x3"),
        ({"stride": [2, 2]}, "library", "the stride is not 1"),
        ({"dilation": [2, 2]}, "library", "the dilation is not 1"),
        ({"padding": [3, 3]}, "library", "the padding is more than 2"),
        ({"n": 7, "size": 4}, "library", "there are fewer than 8 tiles of 4x4 outputs"),
        ({"n": 8, "size": 4}, "winograd", "3x3 of stride 1"),
        ({"c": 3}, "library", "there are fewer than 16 channels"),
        ({"dtype": "float64"}, "library", "float64 is there for derivative checks"),
        ({"kernel": 1, "padding": [0, 0]}, "onednn", "1x1, more than 196 positions"),
        ({"kernel": 1, "padding": [0, 0], "size": 14}, "matrix_product", "1x1"),
        (
            {"kernel": 1, "padding": [0, 0], "size": 14, "c_in": 256},
            "onednn",
            "1x1, 196 positions, four times fewer output channels",
        ),
        (
            {"kernel": 1, "padding": [0, 0], "direction": "backward_data", "size": 56},
            "onednn",
            "1x1, at least 3136 positions",
        ),
        (
            {"kernel": 1, "padding": [0, 0], "direction": "backward_weight", "c_in": 32},
            "transposed_product",
            "1x1, more output than input channels",
        ),
        (
            {"kernel": 1, "padding": [0, 0], "direction": "backward_data"},
            "matrix_product",
            "1x1",
        ),
    ],
)
def test_path_and_reason(arguments: dict[str, Any], algorithm: str, reason: str) -> None:
    assert path(**arguments) == (algorithm, reason)


def test_reasons_in_python() -> None:
    """convolution_path is what `convolution` goes by."""
    x, weight = torch.randn(2, 32, 10, 10).to(memory_format=CL), torch.randn(32, 32, 3, 3)
    geometry: dict[str, Any] = {"padding": 1}
    assert convolution_path(x, weight, **geometry) == ("winograd", "3x3 of stride 1")
    cases: list[tuple[Tensor, dict[str, Any], str]] = [
        (x.contiguous(), {}, "neither the input nor the weight is channels-last"),
        (x.double(), {}, "only plain float32 tensors"),
        (x, {"stride": 2}, "the stride is not 1"),
        (x, {"dilation": 2}, "the dilation is not 1"),
        (x, {"padding": 3}, "the padding is more than 2"),
        (x, {"groups": 2}, "of one group"),
    ]
    for t, changed, reason in cases:
        algorithm, why = convolution_path(t, weight, **{**geometry, **changed})
        assert algorithm == "library" and reason in why
    with resops.backend("reference"):
        assert "'reference' was chosen" in convolution_path(x, weight, **geometry)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution_path(x, weight, **geometry)[1] == "autocast is on"


def test_precision() -> None:
    """As a function, as a context manager, and what "highest" gives: torch's own convolution."""
    x, weight = torch.randn(2, 32, 10, 10).to(memory_format=CL), torch.randn(32, 32, 3, 3)
    plain = F.conv2d(x, weight, padding=1)
    geometry = (None, 1, 1, 1, 1)
    assert resops.get_conv_precision() == "high" and path()[0] == "winograd"
    assert not torch.equal(convolution(x, weight, *geometry), plain)
    with resops.set_conv_precision("highest"):
        assert path() == ("library", "the convolution precision is highest")
        assert torch.equal(convolution(x, weight, *geometry), plain)
    assert resops.get_conv_precision() == "high"
    resops.set_conv_precision("highest")
    try:
        assert path()[0] == "library"
    finally:
        resops.set_conv_precision("high")
    with pytest.raises(ValueError, match="conv_precision must be one of high, highest"):
        resops.set_conv_precision("low")


def test_precision_from_the_environment() -> None:
    code = "import resops; print(resops.get_conv_precision())"
    for value, expected in (("highest", "highest"), ("lowest", "RESOPS_CONV_PRECISION must be")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RESOPS_CONV_PRECISION": value},
            capture_output=True,
            text=True,
        )
        assert expected in done.stdout + done.stderr


@pytest.mark.parametrize("size", [(8, 64, 64, 14), (1, 256, 256, 14), (2, 512, 512, 7)])
def test_documented_bound(size: tuple[int, int, int, int]) -> None:
    """5e-5 on layers of ResNet (bench/ops/conv.py has all of them)."""
    n, c_in, c, side = size
    call = Call((n, c_in, c, side, side, (1, 1)), torch.float32)
    ops = torch.ops.resops
    y = call.forward(ops)
    assert_near("y", y, call.forward(reference, True), call.forward_terms(), DOCUMENTED)


# ---- in layers ----------------------------------------------------------------------------------


def channels_last(layer: Any) -> Any:
    return layer.to(memory_format=CL)


def layer_calls(layer: nn.Module, x: Tensor) -> Any:
    with counted_calls() as calls:
        layer(x)
    return calls


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(kernel: int, bias: bool) -> None:
    """First and second derivatives of the convolution of a layer, against float64."""
    x = torch.randn(2, 16, 9, 8).to(memory_format=CL).requires_grad_()
    weight = torch.randn(24, 16, kernel, kernel, requires_grad=True)
    b = torch.randn(24, requires_grad=True) if bias else None
    arguments = [t for t in (x, weight, b) if t is not None]
    geometry = (1, kernel // 2, 1, 1)
    with counted_calls() as calls:
        y = convolution(x, weight, b, *geometry)
        grad_y = torch.randn_like(y)
        first = torch.autograd.grad(y, arguments, grad_y, create_graph=False, retain_graph=True)
    assert calls["conv_bn_act_forward"] == 1
    assert calls["conv_bn_act_backward_data"] == calls["conv_bn_act_backward_weight"] == 1
    wide = [t.detach().double().requires_grad_() for t in arguments]
    z = F.conv2d(wide[0], wide[1], wide[2] if bias else None, *geometry[:2])
    exact = torch.autograd.grad(z, wide, grad_y.double(), create_graph=True)
    for ours, theirs in zip(first, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    graph = torch.autograd.grad(y, arguments[:2], grad_y, create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in graph), arguments[:2])
    exact_second = torch.autograd.grad(sum((g * g).sum() for g in exact[:2]), wide[:2])
    for ours, theirs in zip(second, exact_second, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-2)


def test_only_the_gradients_that_are_asked_for() -> None:
    x = torch.randn(2, 16, 9, 8).to(memory_format=CL)
    weight = torch.randn(16, 16, 3, 3, requires_grad=True)
    with counted_calls() as calls:
        convolution(x, weight, None, 1, 1, 1, 1).sum().backward()
    assert calls["conv_bn_act_backward_weight"] == 1 and not calls["conv_bn_act_backward_data"]


def test_layers_take_it_in_training() -> None:
    layer = channels_last(Conv2dNormActivation(16, 24))
    x = torch.randn(2, 16, 9, 8).to(memory_format=CL)
    assert layer_calls(layer, x)["conv_bn_act_forward"] == 1
    assert not layer_calls(layer, x.contiguous().bfloat16().float()[:, :, :, :1])["mm"]
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer_calls(layer, x)["conv_bn_act_forward"]
    with resops.backend("reference"):
        assert not layer_calls(layer, x)["conv_bn_act_forward"]
    seen: list[Tensor] = []
    handle = layer[0].register_forward_hook(lambda module, args, y: seen.append(y))
    assert not layer_calls(layer, x)["conv_bn_act_forward"] and len(seen) == 1
    handle.remove()


def test_compile_and_export() -> None:
    layer = channels_last(Conv2dNormActivation(16, 24))
    x = torch.randn(2, 16, 9, 8).to(memory_format=CL)
    expected = layer(x)
    expected.sum().backward()
    gradient = layer[0].weight.grad.clone()
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer[0].weight.grad, gradient)
    graph = torch.export.export(layer.eval(), (x,)).graph
    targets = {str(node.target) for node in graph.nodes}
    assert not any("resops" in target for target in targets), targets


def test_a_kept_weight_is_never_stale() -> None:
    """Written in place under no_grad, by an optimizer, by load_state_dict, through .data."""
    layer = channels_last(Conv2dNormActivation(16, 24)).eval()
    x = torch.randn(2, 16, 9, 8).to(memory_format=CL)
    weight = layer[0].weight

    def write_in_place() -> None:
        with torch.no_grad():
            weight.mul_(1.5)

    def step() -> None:
        weight.grad = torch.randn_like(weight)
        torch.optim.SGD([weight], 0.1).step()

    def load() -> None:
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        state["0.weight"] = torch.randn_like(state["0.weight"])
        layer.load_state_dict(state)

    def write_data() -> None:
        weight.data = torch.randn_like(weight)

    with torch.no_grad():
        assert layer_calls(layer, x)["conv_bn_act_folded"] == 1
    for change in (write_in_place, step, load, write_data):
        change()
        with torch.no_grad():
            y = layer(x)
            with resops.backend("reference"):
                torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


def test_a_kept_weight_of_another_instruction_set_is_not_used(capability: str) -> None:
    """(The fixture has chosen one; the weight is kept with each of the others.)"""
    from resops import _C

    layer = channels_last(Conv2dNormActivation(48, 48)).eval()
    x = torch.randn(2, 48, 9, 8).to(memory_format=CL)
    for other in _C.cpu_capabilities():
        _C.set_cpu_capability(other)
        with torch.no_grad():
            layer(x)
            _C.set_cpu_capability(capability)
            y = layer(x)
            with resops.backend("reference"):
                torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


def test_folded_op_with_a_weight_of_another_size() -> None:
    """Not one that was transformed for these points: it is transformed again."""
    x, weight, bias = torch.randn(2, 16, 9, 8), torch.randn(16, 16, 3, 3), torch.randn(16)
    y = torch.ops.resops.conv_bn_act_folded(
        x, weight, torch.empty(0), bias, None, "relu", 0.0, [1, 1], [1, 1]
    )
    torch.testing.assert_close(
        y, F.relu(F.conv2d(x, weight, bias, padding=1)), rtol=1e-3, atol=1e-3
    )


def test_registration_of_the_folded_op() -> None:
    from resops import _C

    x = torch.randn(2, 16, 9, 8).to(memory_format=CL)
    weight, bias = torch.randn(20, 16, 3, 3), torch.randn(20)
    prepared = _C.prepared_weight(weight, 9, 8)
    arguments = (x, weight, prepared, bias, None, "relu", 0.0, [1, 1], [1, 1])
    torch.library.opcheck(torch.ops.resops.conv_bn_act_folded.default, arguments)


def test_functional_in_training() -> None:
    x = torch.randn(4, 16, 9, 8).to(memory_format=CL)
    weight = torch.randn(24, 16, 3, 3)
    statistics = torch.zeros(24), torch.ones(24)
    with counted_calls() as calls:
        y = conv_bn_act(x, weight, None, *statistics, training=True, padding=1)
    assert calls["conv_bn_act_forward"] == 1
    exact = F.relu(
        F.batch_norm(F.conv2d(x.double(), weight.double(), padding=1), None, None, training=True)
    )
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
