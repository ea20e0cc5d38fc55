"""Battery A: shapes and degenerate sizes. Each test names the case that it stands for."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from resops.functional import batch_norm_act
from tests.ops.batch_norm_oracle import (
    BatchNormCase,
    random_case,
    run_native,
    run_ops,
    run_phases,
)
from tests.tensors import (
    DENSE_LAYOUTS,
    STRANGE_LAYOUTS,
    exact_batch,
    in_layout,
    lazy_zeros,
    ulps_apart,
)

pytestmark = pytest.mark.usefixtures("native")

CHANNELS = 5


def statistics(channels: int = CHANNELS) -> tuple[Tensor, Tensor]:
    return torch.full((channels,), 0.5), torch.full((channels,), 2.0)


# ---- one value per channel ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, CHANNELS), (1, CHANNELS, 1), (1, CHANNELS, 1, 1)])
def test_training_on_one_value_per_channel_raises(shape: tuple[int, ...]) -> None:
    """A: train, N*H*W = 1."""
    message = r"Expected more than 1 value per channel when training, got input size torch\.Size"
    mean, var = statistics()
    x = torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        batch_norm_act(x, mean, var, training=True)
    with pytest.raises(ValueError, match=message):
        torch.ops.resops.batch_norm_forward(
            x, None, None, None, mean, var, True, 0.1, 1e-5, "relu", 0.01
        )
    assert torch.equal(mean, statistics()[0]) and torch.equal(var, statistics()[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, CHANNELS), (1, CHANNELS, 1), (1, CHANNELS, 1, 1)])
def test_evaluation_of_one_value_per_channel(
    shape: tuple[int, ...], dtype: torch.dtype, capability: str
) -> None:
    """A: eval, N*H*W = 1."""
    case = random_case(torch.randn(shape).to(dtype), residual=True, training=False)
    case = replace(case, activation="relu").with_decided_signs()
    case.check(run_native(case))


# ---- empty tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(0, 3), (0, 3, 4), (0, 3, 4, 5), (4, 2, 0, 3), (4, 2, 3, 0), (2, 3, 0), (0, 2, 0, 3, 0)],
)
def test_no_values(shape: tuple[int, ...], residual: bool, training: bool, capability: str) -> None:
    """A: (0,C,H,W) and (4,2,0,3), forward and backward: empty y and grad_x, zero parameter
    gradients, and running statistics that do not change (torch makes them NaN)."""
    case = random_case(torch.randn(shape), residual=residual, training=training, activation="relu")
    with_grad = run_native(case)
    for name in ("y", "grad_x", *(["grad_residual"] if residual else [])):
        t = with_grad[name]
        assert t is not None and t.shape == shape
    for name in ("grad_weight", "grad_bias"):
        t = with_grad[name]
        assert t is not None and torch.equal(t, torch.zeros(shape[1])), name
    for name, before in zip(("running_mean", "running_var"), case.running, strict=True):
        after = with_grad[name]
        assert after is not None and before is not None and torch.equal(after, before), name
    if training:
        mean, var = torch.ops.resops.batch_norm_statistics(case.x)
        assert torch.equal(mean, torch.zeros(shape[1])) and torch.equal(var, mean)
    phases = run_phases(case)
    for name in ("grad_weight", "grad_bias"):
        t = phases[name]
        assert t is not None and torch.equal(t, torch.zeros(shape[1])), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 0), (2, 0, 4), (2, 0, 4, 5), (0, 0, 3, 3)])
def test_no_channels(shape: tuple[int, ...], training: bool, capability: str) -> None:
    """A: (N,0,H,W): an empty result and no crash (torch 2.13 raises IndexError)."""
    case = random_case(torch.randn(shape), residual=True, training=training, activation="relu")
    out = run_native(case)
    for name in ("y", "grad_x", "grad_residual"):
        t = out[name]
        assert t is not None and t.shape == shape
    for name in ("grad_weight", "grad_bias", "running_mean", "running_var"):
        t = out[name]
        assert t is not None and t.shape == (0,)


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.randn(3), torch.randn(0)])
@pytest.mark.parametrize("training", [True, False])
def test_fewer_than_two_dimensions_raise(x: Tensor, training: bool) -> None:
    """A: 1-D and 0-D input: an error before size(1) is touched."""
    mean, var = statistics(3)
    message = rf"got {x.dim()}-D input"
    with pytest.raises((ValueError, RuntimeError), match=message):
        batch_norm_act(x, mean, var, training=training)
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.resops.batch_norm_forward(
            x, None, None, None, mean, var, training, 0.1, 1e-5, "relu", 0.01
        )
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.resops.batch_norm_statistics(x)


# ---- exact data: nothing skipped, repeated or misplaced -----------------------------------------


@functools.lru_cache(maxsize=4)
def exact_case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return exact_batch(shape, dtype, seed=sum(shape))


def check_exact(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """mean is bit-equal and invstd within 1 ulp; so are the running statistics made of them.

    The gradient is exact data too, so grad_bias, its sum, is exact. The data is exact for plain
    sums; means that are merged in double (Chan) round there, which float32 does not see: float64
    itself may be 8 ulp off, where an element missed is off by 1e13.
    """
    values, mean, var = exact_case(shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = in_layout(values, layout, offset=3)
    case = random_case(
        x,
        affine=True,
        momentum=1.0,  # running statistics become the batch's
        grad=in_layout(values.flip(0), layout),
        parameter_dtype=wide,
    )
    out = run_ops(case)
    label = f"{shape} {dtype} {layout}"
    count = x.numel() // x.size(1)
    direct_mean, direct_var = torch.ops.resops.batch_norm_statistics(x)
    for name, got in {"mean": out["mean"], "running_mean": out["running_mean"]}.items():
        assert got is not None
        if dtype == torch.float64:
            assert (ulps_apart(got, mean) <= 8).all(), f"{name} of {label}"
        else:
            assert torch.equal(got, mean.to(wide)), f"{name} of {label}"
    assert torch.equal(direct_mean, out["mean"]), label
    invstd, running_var = out["invstd"], out["running_var"]
    assert invstd is not None and running_var is not None
    expected = torch.rsqrt(var + case.eps).to(wide)
    # 1 ulp: one rounding of the result, and those of var and var + eps, halved by the root.
    ulps = 8 if dtype == torch.float64 else 1
    assert (ulps_apart(invstd, expected) <= ulps).all(), f"invstd of {label}"
    assert (ulps_apart(direct_var, var.to(wide)) <= ulps).all(), f"var of {label}"
    unbiased = (var * (count / (count - 1))).to(wide)
    assert (ulps_apart(running_var, unbiased) <= ulps).all(), f"running_var of {label}"
    assert torch.equal(out["grad_bias"], (mean * count).to(wide)), f"grad_bias of {label}"
    # The terms of grad_weight are rounded: xhat and the product, and their sum as rule R allows.
    # One of the million terms of the largest case that is left out, or 1 % of them, is more.
    column = (1, -1, *[1] * (x.dim() - 2))
    xhat = (values.double() - mean.view(column)) * torch.rsqrt(var + case.eps).view(column)
    terms = values.flip(0).double() * xhat
    dims = [0, *range(2, x.dim())]
    error = (out["grad_weight"].double() - terms.sum(dims)).abs()  # type: ignore[union-attr]
    unit = 2.0**-24 if wide == torch.float32 else 2.0**-49
    assert (error <= 8 * unit * terms.abs().sum(dims)).all(), f"grad_weight of {label}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("spatial", [(3, 3), (7, 7)])
@pytest.mark.parametrize("N", [1023, 1024, 1025, 2047, 2048, 2049, 4096])
def test_batch_around_a_power_of_two(
    N: int, spatial: tuple[int, int], layout: str, capability: str
) -> None:
    """A: N in {1023..4096} x (H,W) in {(3,3),(7,7)}: exact data, bit-exact mean."""
    check_exact((N, 2, *spatial), torch.float32, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("N", [1, 3, 16])
@pytest.mark.parametrize(
    "spatial", [(1, 1), (1, 3), (5, 1), (5, 7), (7, 7), (147, 147)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_vector_tail(spatial: tuple[int, int], N: int, layout: str, capability: str) -> None:
    """A: H*W in {1,3,5,35,49,147^2}, N in {1,3,16}: the tail of a vector."""
    if N * math.prod(spatial) == 1:
        N = 2
    check_exact((N, 3, *spatial), torch.float32, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("C", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 257])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_channel_tail(C: int, dtype: torch.dtype, layout: str, capability: str) -> None:
    """A: channel counts around multiples of a vector, for every dtype."""
    check_exact((5, C, 3, 5), dtype, layout)


@pytest.mark.parametrize(
    "shape",
    [(37, 6), (4, 6, 11), (2, 1, 13), (3, 5, 2, 3, 7), (2, 16, 1, 1), (1, 9, 1, 8), (7, 1, 3, 3)],
    ids=str,
)
@pytest.mark.parametrize("layout", [*DENSE_LAYOUTS, *STRANGE_LAYOUTS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dimensions(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """A, B: exact data in all layouts: (N,C), (N,C,L), 4-D and 5-D, single channels and pixels."""
    check_exact(shape, dtype, layout)


@pytest.mark.parametrize(
    "shape",
    [(880801, 1, 1, 1), (65535, 1), (65536, 1), (65537, 1), (131073, 1), (262144, 2)],
    ids=str,
)
def test_large_batch(shape: tuple[int, ...]) -> None:
    """A: N of 2^16 and beyond, where launch limits used to be."""
    check_exact(shape, torch.float32, "contiguous")
    case = random_case(exact_case(shape, torch.float32)[0], activation="relu")
    case = case.with_decided_signs()
    case.check(run_native(case))


# ---- shapes that broke other libraries ----------------------------------------------------------


@functools.lru_cache(maxsize=2)
def blocking_case(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> BatchNormCase:
    x = in_layout((torch.randn(shape) * 2 + 1).to(dtype), layout)
    return random_case(x, residual=True, activation="relu").with_decided_signs()


# oneDNN's names: mb = batch, ic = channels, ih = height = width.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 10, 1, 1), torch.float32),
        ((2, 251, 28, 28), torch.float32),
        ((8, 322, 16, 16), torch.float32),
        ((12, 4, 8, 8), torch.bfloat16),
        ((1, 24, 14, 14), torch.float32),
        ((1, 24, 14, 14), torch.bfloat16),
        pytest.param((2, 64, 224, 224), torch.float32, marks=pytest.mark.slow),
        pytest.param((88, 600, 16, 16), torch.float32, marks=pytest.mark.slow),
        pytest.param((88, 600, 16, 16), torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v)[6:],
)
def test_cache_blocking_shapes(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """A: benchdnn's regression shapes and (2,10,1,1): rule R in every layout."""
    case = blocking_case(shape, dtype, layout)
    case.check(run_native(case))


# ---- more than 2^31 elements, or a larger offset ------------------------------------------------


@pytest.mark.parametrize("which", ["x", "residual", "grad_y"])
def test_offset_beyond_int32(which: str) -> None:
    """A: small numel, stride * index > 2^31: gigabytes of addresses, of which little is touched."""
    shape = (3, 2, 5, 4)
    step = 2**30 + 12345
    memory = lazy_zeros(2 * step + 1000, torch.bfloat16)
    far = memory.as_strided(shape, (step, 3, 40, 7))
    case = random_case(torch.randn(shape).bfloat16(), residual=True, activation="relu")
    far.copy_(getattr(case, which))
    case = replace(case, **{which: far}).with_decided_signs()
    if which == "grad_y":  # with_decided_signs made a dense copy
        assert case.grad_y is not None
        far.copy_(case.grad_y)
        case = replace(case, grad_y=far)
    assert getattr(case, which).stride(0) * 2 > 2**31
    case.check(run_native(case))


def _sparse_values(numel: int, places: Sequence[int]) -> Tensor:
    t = lazy_zeros(numel, torch.bfloat16)
    for i, place in enumerate(places):
        t[place] = float(2 ** (i + 4))
    return t


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("extra", [0, 8])
def test_numel_of_two_to_the_31(extra: int, channels_last: bool) -> None:
    """A: numel = 2^31 and 2^31 + 8 in bfloat16: statistics, first and last element.

    All values are 0 but for the first and last of a few channels. 4.3 GB of virtual zeros each for
    x and grad_y, and as much real memory for y, and then for grad_x.
    """
    numel = 2**31 + extra
    N, C, L = (16, 8, 2**24) if extra == 0 else (17, 8, 15790321)
    assert numel == N * C * L
    M = N * L
    first, last = 0, numel - 1
    x = _sparse_values(numel, [first, last])
    grad_y = _sparse_values(numel, [first, last])
    last_channel = C - 1
    strides = (C * L, 1, C) if channels_last else (C * L, L, 1)
    x, grad_y = x.as_strided((N, C, L), strides), grad_y.as_strided((N, C, L), strides)
    assert x[-1, -1, -1] == 32 and x[0, 0, 0] == 16
    weight, bias = torch.full((C,), 2.0), torch.arange(C, dtype=torch.float32)

    values = torch.zeros(C, dtype=torch.float64)
    values[0], values[last_channel] = 16, 32
    mean = values / M
    var = values**2 / M - mean**2
    invstd = torch.rsqrt(var + 1e-5)
    u, low = 2.0**-24, 2.0**-8

    with torch.no_grad():
        y, got_mean, got_invstd, _ = torch.ops.resops.batch_norm_forward(
            x, None, weight, bias, None, None, True, 0.1, 1e-5, "identity", 0.0
        )
    # A lost or repeated value would be off by 1. Rounding: the first value, 2^28 times the mean,
    # may be what sums are shifted by: 2^28 roundings of double, 2^-25 of the mean, a block.
    torch.testing.assert_close(got_mean.double(), mean, rtol=100 * u, atol=0)
    torch.testing.assert_close(got_invstd.double(), invstd, rtol=100 * u, atol=0)
    xhat_zero = -mean * invstd
    expected_zero = weight.double() * xhat_zero + bias.double()
    for index in ((0, 0, 0), (N - 1, last_channel, L - 1)):
        c = index[1]
        xhat = (values[c] - mean[c]) * invstd[c]
        expected = float(weight[c] * xhat + bias[c])
        assert float(y[index]) == pytest.approx(expected, rel=2 * low), index
    for index in ((0, 1, L - 1), (N // 2, 3, 5), (N - 1, last_channel, L - 2), (N - 1, 0, L - 1)):
        expected = float(expected_zero[index[1]])
        assert float(y[index]) == pytest.approx(expected, rel=2 * low, abs=1e-3), index
    # Nothing was left out: y of an untouched channel is its bias everywhere.
    assert bool((y[:, 5] == bias[5]).all())
    del y

    grads = torch.ops.resops.batch_norm_backward(
        grad_y,
        x,
        None,
        None,
        weight,
        bias,
        got_mean,
        got_invstd,
        True,
        "identity",
        0.0,
        [True, False, True, True],
    )
    grad_x, _, grad_weight, grad_bias = grads
    xhat_value = (values - mean) * invstd
    sum_g, sum_g_xhat = values, values * xhat_value
    torch.testing.assert_close(grad_bias.double(), sum_g, rtol=10 * u, atol=0)
    torch.testing.assert_close(grad_weight.double(), sum_g_xhat, rtol=100 * u, atol=0)
    for index, g in (
        ((0, 0, 0), 16.0),
        ((N - 1, last_channel, L - 1), 32.0),
        ((N - 1, last_channel, L - 2), 0.0),
        ((0, 2, 1), 0.0),
    ):
        c = index[1]
        xhat = xhat_value[c] if g else xhat_zero[c]
        inner = g - sum_g[c] / M - xhat * sum_g_xhat[c] / M
        expected = float(weight[c] * invstd[c] * inner)
        terms = float(weight[c] * invstd[c] * (g + sum_g[c] / M + abs(xhat) * sum_g_xhat[c] / M))
        assert abs(float(grad_x[index]) - expected) <= 4 * low * terms, index


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_are_those_of_the_phases(
    dtype: torch.dtype, layout: str, native: None
) -> None:
    """From 64 MB on, the reduction writes grad_residual, which the second pass then reads."""
    planes = 2**26 // dtype.itemsize // (17 * 33 * 70) + 1
    x, residual, grad_y = (
        in_layout(torch.randn(planes, 70, 17, 33).to(dtype), layout) for _ in range(3)
    )
    ops = torch.ops.resops
    mean, var = ops.batch_norm_statistics(x)
    affine = (torch.rand(70) + 0.5, torch.randn(70), mean, torch.rsqrt(var + 1e-5))
    _, mask = ops.batch_norm_apply(x, residual, *affine, "relu", 0.0)
    saved = (grad_y, x, residual, mask, *affine)
    whole = ops.batch_norm_backward(*saved, True, "relu", 0.0, [True] * 4)
    grad_bias, grad_weight = ops.batch_norm_backward_reduce(*saved, "relu", 0.0)
    count = x.numel() // 70
    means = (grad_bias / count, grad_weight / count)
    parts = ops.batch_norm_backward_apply(*saved, *means, "relu", 0.0, True, True)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])  # the means were rounded to float32 in between
    torch.testing.assert_close(whole[2:], (grad_weight, grad_bias), rtol=0, atol=0)
