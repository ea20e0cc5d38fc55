"""resops' own kernel for 1x1 convolutions: rule R, slices, threads, and outputs into slices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.conv_phases_oracle import ConvCase, random_case
from tests.tensors import in_poison

pytestmark = pytest.mark.usefixtures("native")

CL = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Size of x and output channels: odd channels, one row, rows that are no multiple of a block, more
# than one panel, more than one run of input channels, and more than one block of rows.
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((2, 3, 5, 9), 17),
    ((1, 17, 1, 1), 3),
    ((3, 65, 4, 7), 33),
    ((1, 130, 5, 3), 65),
    ((1, 512, 3, 5), 20),
    ((2, 16, 16, 15), 48),
]


@pytest.fixture
def pointwise() -> Iterator[None]:
    """The kernel for every 1x1 convolution that it can compute."""
    from resops import _C

    before = _C.conv_algorithm()
    _C.set_conv_algorithm("pointwise")
    try:
        yield
    finally:
        _C.set_conv_algorithm(before)


def case_of(size: Any, filters: int, dtype: torch.dtype = torch.float32, **flags: Any) -> ConvCase:
    """With everything that a phase can have, in channels-last."""
    channels = size[1]
    slices = (channels // 3, channels - channels // 3) if channels >= 3 else ()
    flags = {"prologue": "relu", "slices": slices, "addend": True} | flags
    case = random_case(size, filters, dtype=dtype, **flags)
    case.inputs = [t.contiguous(memory_format=CL) for t in case.inputs]
    return case


def all_outputs(case: ConvCase) -> list[Tensor]:
    outputs = case.run(torch.ops.resops)
    return [outputs[name] for name in sorted(outputs)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "filters"), SHAPES)
def test_phases(
    size: Any, filters: int, dtype: torch.dtype, capability: str, pointwise: None
) -> None:
    """Prologue and epilogue in all phases; then statistics, and a plain input in one slice."""
    ops = torch.ops.resops
    for activation in ("relu", "silu"):
        flags = {"prologue": activation, "activation": activation, "bias": True, "residual": True}
        case = case_of(size, filters, dtype, **flags)
        case.check(case.run(ops))
    plain = case_of(size, filters, dtype, prologue=None, slices=(), statistics=True)
    plain.check(plain.run(ops))


@pytest.mark.parametrize(("size", "filters"), SHAPES[1:])
def test_stride(size: Any, filters: int, capability: str, pointwise: None) -> None:
    """Every other row and column is read where it is; the gradient of the input is not ours."""
    case = case_of(size, filters, stride=(2, 2), statistics=True)
    case.check(case.run(torch.ops.resops))


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_statistics_of_a_far_mean(mean: float, capability: str, pointwise: None) -> None:
    """One-pass sums would have no digit left where the mean is a thousand deviations."""
    case = case_of((2, 16, 16, 15), 48, prologue=None, slices=(), statistics=True)
    case.inputs[0] = case.inputs[0] * 0.01 + mean / 100
    case.check(case.forward(torch.ops.resops))


@pytest.mark.parametrize(("size", "filters"), [((1, 20, 9, 9), 70), ((9, 20, 34, 30), 40)])
def test_same_bits_for_any_number_of_threads(size: Any, filters: int, pointwise: None) -> None:
    """Fewer blocks of rows than threads, and more."""
    case = case_of(size, filters, statistics=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(all_outputs(case))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("size", "filters"), SHAPES[1:5])
def test_slices_let_nothing_in(size: Any, filters: int, capability: str, pointwise: None) -> None:
    case = case_of(size, filters, residual=True)
    expected = all_outputs(case)
    case.inputs = [in_poison(t) for t in case.inputs]
    assert case.addend is not None and case.residual is not None
    case.addend, case.residual = in_poison(case.addend), in_poison(case.residual)
    case.grad_y = in_poison(case.grad_y)
    for a, b in zip(all_outputs(case), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL])
def test_any_layout_of_the_weight(layout: torch.memory_format, pointwise: None) -> None:
    """Also a slice of a larger one, whose input channels lie apart."""
    case = case_of((2, 6, 5, 4), 10, prologue=None)
    wide = torch.randn(11, 14, 1, 1).contiguous(memory_format=layout)
    case.conv_weight = wide[1:, 1:13:2]
    case.check(case.run(torch.ops.resops))


def test_no_channels_apart(pointwise: None) -> None:
    """A bottleneck's two ends: one input channel, one output channel."""
    for channels, filters in ((1, 40), (40, 1)):
        case = case_of((2, channels, 3, 5), filters, statistics=True)
        case.check(case.run(torch.ops.resops))


# ---- output into a slice ------------------------------------------------------------------------


def into(case: ConvCase, out: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.resops.conv_bn_act_forward_into(
        case.inputs,
        *case.before(),
        case.conv_weight,
        case.conv_bias,
        case.residual,
        case.activation,
        case.slope,
        *case.geometry(),
        case.statistics,
        out,
    )
    return found


@pytest.mark.parametrize("algorithm", ["pointwise", "winograd", "library"])
def test_output_into_a_slice(algorithm: str, capability: str) -> None:
    """Channels of a wider tensor, of which the others stay as they are; also uneven places."""
    from resops import _C

    kernel, padding = ((3, 3), (1, 1)) if algorithm == "winograd" else ((1, 1), (0, 0))
    before = _C.conv_algorithm()
    _C.set_conv_algorithm(algorithm)
    try:
        case = case_of((2, 6, 5, 7), 20, kernel=kernel, padding=padding, statistics=True)
        expected = case.forward(torch.ops.resops)
        wide = torch.zeros(2, 31, 5, 7).contiguous(memory_format=CL)
        inner = torch.zeros(2, 31, 8, 9).contiguous(memory_format=CL)[:, :, 1:6, 2:9]
        for buffer in (wide, inner, torch.zeros(2, 31, 5, 7)):
            out = buffer[:, 4:24]
            mean, var = into(case, out)
            assert torch.equal(out, expected["y"])
            assert torch.equal(mean, expected["mean"]) and torch.equal(var, expected["var"])
            assert not buffer[:, :4].any() and not buffer[:, 24:].any()
    finally:
        _C.set_conv_algorithm(before)


def test_output_of_another_size_or_overlapping(pointwise: None) -> None:
    case = case_of((2, 6, 5, 7), 20)
    with pytest.raises(RuntimeError, match="out should have the size"):
        into(case, torch.empty(2, 19, 5, 7))
    with pytest.raises(RuntimeError, match="out should have the dtype"):
        into(case, torch.empty(2, 20, 5, 7, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        into(case, torch.empty(1, 20, 5, 7).expand(2, -1, -1, -1))
    same = case_of((2, 20, 5, 7), 20, slices=())
    with pytest.raises(RuntimeError, match="some elements of the input tensor"):
        into(same, same.inputs[0])


def test_registration_of_the_op_with_an_output() -> None:
    case = case_of((2, 6, 5, 7), 20, slices=())
    arguments = (case.inputs, *case.before(), case.conv_weight, None, None, "identity", 0.0)
    out = torch.empty(2, 20, 5, 7).contiguous(memory_format=CL)
    torch.library.opcheck(
        torch.ops.resops.conv_bn_act_forward_into.default, (*arguments, *case.geometry(), True, out)
    )


def test_a_folded_layer_equals_the_library(pointwise: None) -> None:
    """Bias, residual and activation in one pass."""
    case = case_of((2, 16, 6, 5), 24, prologue=None, bias=True, residual=True, activation="relu")
    y = case.forward(torch.ops.resops)["y"]
    assert case.residual is not None
    z = F.relu(F.conv2d(case.x, case.conv_weight, case.conv_bias) + case.residual)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
