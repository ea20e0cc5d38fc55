"""conv_bn_act: values, gradients and errors of convolution, batch norm, addition and activation.

In evaluation the batch norm is folded into the convolution. Rule R holds for the result with
A = |x| conv |w'| + |shift| + |residual|, the terms of the folded sum and of the bias added to it:
a rounding of w' or of x moves the result by a part of A (docs/math/conv_bn_act.md, F6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode

import resops
from resops.functional import conv_bn_act
from resops.reference import conv_bn_act as reference
from resops.reference.activation import ACTIVATIONS, activate
from tests.accuracy import Exact, assert_rule_R, to_numpy
from tests.dispatch import counted_calls

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# size of x, size of the weight, and what F.conv takes.
GEOMETRIES: dict[str, tuple[Sequence[int], Sequence[int], dict[str, Any]]] = {
    "3x3": ((2, 16, 9, 8), (24, 16, 3, 3), {"padding": 1}),
    "1x1": ((2, 32, 7, 7), (16, 32, 1, 1), {}),
    "7x7 stride 2": ((2, 3, 17, 17), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    "1x1 stride 2": ((3, 16, 7, 7), (32, 16, 1, 1), {"stride": 2}),
    "groups": ((2, 12, 6, 6), (18, 4, 3, 3), {"padding": 1, "groups": 3}),
    "depthwise": ((2, 16, 6, 7), (16, 1, 3, 3), {"padding": 1, "groups": 16}),
    "dilation": ((1, 8, 11, 9), (8, 8, 3, 3), {"padding": (2, 4), "dilation": (2, 4)}),
    "asymmetric": ((2, 8, 9, 9), (8, 8, 1, 5), {"padding": (0, 2), "stride": (2, 1)}),
    "same": ((2, 8, 9, 9), (8, 8, 3, 5), {"padding": "same", "dilation": (2, 1)}),
    "same, even kernel": ((2, 8, 9, 9), (8, 8, 2, 4), {"padding": "same"}),
    "valid": ((2, 8, 9, 9), (8, 8, 3, 3), {"padding": "valid"}),
    "one pixel": ((5, 8, 1, 1), (16, 8, 1, 1), {}),
    "one channel": ((2, 1, 8, 8), (1, 1, 3, 3), {}),
    "batch 1": ((1, 16, 5, 5), (16, 16, 3, 3), {"padding": 1}),
    "1d": ((2, 8, 20), (12, 8, 3), {"padding": 1}),
    "3d": ((2, 8, 4, 5, 6), (8, 8, 3, 3, 3), {"padding": 1, "stride": (1, 2, 1)}),
}


def case(
    geometry: str = "3x3",
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    with_residual: bool = False,
    with_conv_bias: bool = False,
    affine: bool = True,
    mean: float = 0.3,
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of conv_bn_act in evaluation."""
    x_size, w_size, kwargs = GEOMETRIES[geometry]
    channels = w_size[0]
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(x_size).to(dtype)
    weight = (torch.randn(w_size) / math.sqrt(math.prod(w_size[1:]))).to(dtype)
    if layout == "channels_last" and x.dim() in CHANNELS_LAST:
        x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
        weight = weight.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    conv_bias = torch.randn(channels).to(dtype) if with_conv_bias else None
    running_mean = (torch.randn(channels) + mean).to(statistics)
    running_var = (torch.rand(channels) + 0.5).to(statistics)
    gamma = torch.randn(channels).to(statistics) if affine else None
    beta = torch.randn(channels).to(statistics) if affine else None
    kwargs = dict(kwargs)
    if with_residual:
        c = reference.convolution(x, weight, None, *geometry_of(kwargs))
        kwargs["residual"] = torch.randn_like(c)  # in the layout of the output
    return [x, weight, conv_bias, running_mean, running_var, gamma, beta], kwargs


def geometry_of(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return tuple(kwargs.get(name, default) for name, default in defaults.items())


def composition(args: Sequence[Any], kwargs: dict[str, Any], training: bool = False) -> Tensor:
    """torch's own ops, one after the other."""
    x, weight, conv_bias, running_mean, running_var, gamma, beta = args
    c = reference.convolution(x, weight, conv_bias, *geometry_of(kwargs))
    z = F.batch_norm(c, running_mean, running_var, gamma, beta, training)
    if kwargs.get("residual") is not None:
        z = z + kwargs["residual"]
    return activate(z, kwargs.get("activation", "relu"), kwargs.get("negative_slope", 0.01))


def exact(args: Sequence[Any], kwargs: dict[str, Any]) -> Exact:
    wide: list[Any] = [None if t is None else t.double() for t in args]
    x, weight, conv_bias, mean, var, gamma, beta = wide
    geometry = geometry_of(kwargs)
    residual = kwargs.get("residual")
    residual = None if residual is None else residual.double()
    value = composition(wide, {**kwargs, "residual": residual})
    scale = torch.rsqrt(var + 1e-5) * (1 if gamma is None else gamma)
    row = (1, -1, *[1] * (x.dim() - 2))
    folded = weight.abs() * scale.abs().view(-1, *[1] * (weight.dim() - 1))
    terms = reference.convolution(x.abs(), folded, None, *geometry)
    shift = (mean.abs() + (0 if conv_bias is None else conv_bias.abs())) * scale.abs()
    terms = terms + (shift + (0 if beta is None else beta.abs())).view(row)
    if residual is not None:
        terms = terms + residual.abs()
    dtype = args[0].dtype
    return Exact(to_numpy(value, dtype), to_numpy(terms, dtype))


def assert_exact(args: Sequence[Any], kwargs: dict[str, Any], y: Tensor) -> None:
    expected = composition(args, kwargs)
    assert y.dtype == expected.dtype and y.stride() == expected.stride()
    assert_rule_R("y", y, expected, exact(args, kwargs), args[0].dtype)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *[("channels_last", dtype) for dtype in (*DTYPES, torch.float64)],
        *[("contiguous", dtype) for dtype in (torch.float32, torch.bfloat16)],
    ],
    ids=str,
)
@torch.no_grad()
def test_folded_values(geometry: str, layout: str, dtype: torch.dtype) -> None:
    for with_residual in (False, True):
        args, kwargs = case(geometry, dtype, layout, with_residual, with_conv_bias=with_residual)
        with counted_calls() as calls:
            y = conv_bn_act(*args, **kwargs)
        assert_exact(args, kwargs, y)
        if geometry != "same, even kernel":  # the two ends of a dimension differ: composition
            assert not any("batch_norm" in name for name in calls)
            if args[0].dim() > 3 and dtype != torch.float64:
                ours, library = "conv_bn_act_folded", "mkldnn::_convolution_pointwise"
                assert calls[ours] + calls[library] == 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", ["3x3", "1d", "3d"])
@torch.no_grad()
def test_folded_activations(activation: str, dtype: torch.dtype, geometry: str) -> None:
    for with_residual in (False, True):
        args, kwargs = case(geometry, dtype, with_residual=with_residual, affine=False)
        kwargs.update(activation=activation, negative_slope=0.2)
        y = conv_bn_act(*args, **kwargs)
        assert_exact(args, kwargs, y)
    assert torch.equal(conv_bn_act(*args, **{**kwargs, "activation": None}).isnan(), y.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [1e2, 1e4])
@torch.no_grad()
def test_mean_of_many_standard_deviations(dtype: torch.dtype, mean: float) -> None:
    """The folded bias nearly cancels the convolution."""
    args, kwargs = case(dtype=dtype, with_conv_bias=True, mean=0.0)
    args[2] += mean
    args[3] += mean
    assert_exact(args, kwargs, conv_bn_act(*args, **kwargs))


@torch.no_grad()
def test_only_weight_or_only_bias() -> None:
    args, kwargs = case()
    for missing in (5, 6):
        some = [None if i == missing else t for i, t in enumerate(args)]
        assert_exact(some, kwargs, conv_bn_act(*some, **kwargs))


@torch.no_grad()
def test_zero_weight_leaves_the_bias() -> None:
    args, kwargs = case()
    gamma, beta = args[5], args[6]
    gamma[::2] = 0
    y = conv_bn_act(*args, **kwargs)
    expected = F.relu(beta)[None, ::2, None, None].expand_as(y[:, ::2])
    assert torch.equal(y[:, ::2], expected)


@torch.no_grad()
def test_the_bias_is_not_rounded_before_it_is_added() -> None:
    """-1 + (1 + 2^-12), which no 16-bit number is."""
    for dtype in DTYPES:
        x = -torch.ones(1, 16, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.eye(16)[:, :, None, None].to(dtype)
        bias = torch.full((16,), 1 + 2.0**-12)
        y = conv_bn_act(x, weight, None, torch.zeros(16), torch.ones(16), None, bias, eps=0.0)
        assert torch.equal(y, torch.full_like(y, 2.0**-12))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_any_strides(layout: str, dtype: torch.dtype) -> None:
    args, kwargs = case("batch 1", dtype, with_residual=True)
    x, residual = args[0], kwargs["residual"]

    def strange(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.transpose(2, 3)
        if layout == "expanded":
            return t.expand(3, -1, -1, -1)
        padded = torch.full((1, 32, 11, 11), math.nan).to(dtype)[:, ::2, 1::2, :5]
        return padded.copy_(t)

    args[0], kwargs["residual"] = strange(x), strange(residual)
    y = conv_bn_act(*args, **kwargs)
    assert_rule_R("y", y, composition(args, kwargs), exact(args, kwargs), dtype)


@torch.no_grad()
def test_inputs_are_not_written_to() -> None:
    for dtype in DTYPES:
        args, kwargs = case(dtype=dtype, with_residual=True, with_conv_bias=True)
        tensors = [t for t in (*args, kwargs["residual"]) if t is not None]
        before = [(t.clone(), t._version) for t in tensors]
        conv_bn_act(*args, **kwargs)
        for t, (values, version) in zip(tensors, before, strict=True):
            assert torch.equal(t, values) and t._version == version


# ---- NaN and infinity ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@torch.no_grad()
def test_nan_and_infinity_come_through(activation: str, with_residual: bool, bad: float) -> None:
    """oneDNN's relu would make a 0 of the NaN: it must not be used then."""
    for dtype in DTYPES:
        for where in ("x", "residual") if with_residual else ("x",):
            args, kwargs = case("1x1", dtype, with_residual=with_residual)
            kwargs["activation"] = activation
            target = args[0] if where == "x" else kwargs["residual"]
            target[0, 0, 0, 0] = bad
            y, expected = conv_bn_act(*args, **kwargs), composition(args, kwargs)
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.isinf(), expected.isinf())
            assert (~y.isfinite()).any() or bad < 0


@torch.no_grad()
def test_infinity_made_by_finite_values() -> None:
    """Two layers: the first overflows, the second would make a NaN of two infinities."""
    x = torch.full((1, 2, 2, 2), 1e38).contiguous(memory_format=torch.channels_last)
    weight = torch.tensor([[5.0, 5.0], [5.0, 0.0]]).view(2, 2, 1, 1)
    statistics = torch.zeros(2), torch.ones(2)
    y = conv_bn_act(x, weight, None, *statistics)
    assert y[:, 0].isinf().all()
    weight = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).view(2, 2, 1, 1)
    y.fill_(math.inf)
    assert conv_bn_act(y, weight, None, *statistics)[:, 0].isnan().all()


@torch.no_grad()
def test_folded_weights_that_are_not_finite_are_not_used() -> None:
    """A running variance of 0: times 316, past the largest float16."""
    args, kwargs = case(dtype=torch.float16)
    args[0], args[1] = args[0] * 1e-3, args[1] * 0 + 250
    args[4].zero_()
    y, expected = conv_bn_act(*args, **kwargs), composition(args, kwargs)
    assert expected.isfinite().any()
    torch.testing.assert_close(y, expected, rtol=2**-9, atol=0.0, equal_nan=True)


# ---- training and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("geometry", ["3x3", "groups", "1d", "3d"])
def test_gradients(geometry: str, training: bool) -> None:
    """In float64, against autograd over torch's ops; running statistics as well."""
    args, kwargs = case(geometry, torch.float64, with_residual=True, with_conv_bias=True)
    results = []
    for function in (conv_bn_act, composition):
        own: list[Any] = [None if t is None else t.clone() for t in args]
        residual = kwargs["residual"].clone().requires_grad_()
        for i in (0, 1, 2, 5, 6):
            own[i].requires_grad_()
        call = {**kwargs, "residual": residual, "activation": "silu"}
        y = (
            conv_bn_act(*own, **{**call, "training": training})
            if function is conv_bn_act
            else composition(own, call, training)
        )
        y.square().sum().backward()
        results.append([y, residual.grad, *[own[i].grad for i in (0, 1, 2, 5, 6)], *own[3:5]])
    # A bias before a batch norm has gradient 0 in training: what is computed is rounding error.
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_gradient_that_is_wanted_is_there() -> None:
    """Each argument alone, in evaluation."""
    args, kwargs = case(with_residual=True, with_conv_bias=True)
    for i in (0, 1, 2, 5, 6, None):
        own = [t.detach().clone() for t in args]
        call = {**kwargs, "residual": kwargs["residual"].clone()}
        wanted = call["residual"] if i is None else own[i]
        wanted.requires_grad_()
        conv_bn_act(*own, **call).sum().backward()
        assert wanted.grad is not None and wanted.grad.abs().max() > 0


def test_gradcheck() -> None:
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    statistics = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return conv_bn_act(x, weight, None, *statistics, training=True, momentum=0.0)

    assert torch.autograd.gradcheck(function, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, weight), fast_mode=True)


def test_autocast() -> None:
    for training in (False, True):
        for with_residual in (False, True):
            args, kwargs = case(with_residual=with_residual, with_conv_bias=True)
            # In training the statistics are written to.
            twin = [None if t is None else t.clone() for t in args]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                y = conv_bn_act(*args, **{**kwargs, "training": training})
                expected = composition(twin, kwargs, training)
            assert y.dtype == expected.dtype
            # Two roundings to bfloat16 of values of some units.
            torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-5)


# ---- backends and errors -------------------------------------------------------------------------


@torch.no_grad()
def test_the_reference_folds_nothing() -> None:
    args, kwargs = case(with_residual=True)
    with resops.backend("reference"), counted_calls() as calls:
        y = conv_bn_act(*args, **kwargs)
    assert calls["aten::convolution"] == calls["aten::native_batch_norm"] == 1
    assert torch.equal(y, composition(args, kwargs))
    with resops.backend("triton"), pytest.raises(resops.BackendError):
        conv_bn_act(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch warns of its own switch
@torch.no_grad()
def test_without_onednn() -> None:
    args, kwargs = case(with_residual=True)
    with torch.backends.mkldnn.flags(enabled=False), counted_calls() as calls:
        y = conv_bn_act(*args, **kwargs)
    assert calls["mkldnn::_convolution_pointwise"] == 0 and calls["aten::convolution"] == 1
    assert_exact(args, kwargs, y)


CONV2D = next(op for op in op_db if op.name == "nn.functional.conv2d")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_samples_of_torch(dtype: torch.dtype) -> None:
    """J: every convolution that torch tests itself with, by rule R; one image without a batch is a
    batch of one."""
    count = 0
    for sample in CONV2D.sample_inputs("cpu", dtype, requires_grad=False):
        x, (weight, *rest) = sample.input, sample.args
        names = ("bias", "stride", "padding", "dilation", "groups")
        call = {**dict(zip(names, rest, strict=False)), **sample.kwargs}
        conv_bias = call.pop("bias", None)
        channels = weight.size(0)
        statistics = torch.randn(channels).to(dtype), (torch.rand(channels) + 0.5).to(dtype)
        args = [x, weight, conv_bias, *statistics, None, None]
        y = conv_bn_act(*args, **call)
        if x.dim() == 3:
            args[0], y = x.unsqueeze(0), y.unsqueeze(0)
        expected = composition(args, call)
        assert y.dtype == dtype
        assert_rule_R("y", y, expected, exact(args, call), dtype)
        count += 1
    assert count >= 30  # in torch 2.13


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("geometry", ["1d", "groups", "3d"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_image_without_a_batch(training: bool, geometry: str, backend: str) -> None:
    """J: as F.conv2d takes it. Its channels are not the batch of the norm, also where there are as
    many rows as channels."""
    args, kwargs = case(geometry, torch.float64, "contiguous", with_residual=True)
    x, residual = args[0][:1], kwargs["residual"][:1]
    kwargs["residual"] = residual
    batch = [x, *(None if t is None else t.clone() for t in args[1:])]
    expected = composition(batch, kwargs, training)
    leaves = [x[0].clone().requires_grad_(training), residual[0].clone().requires_grad_(training)]
    image = [leaves[0], *args[1:]]
    with resops.backend(backend):
        y = conv_bn_act(*image, **{**kwargs, "residual": leaves[1], "training": training})
    torch.testing.assert_close(y, expected[0])
    for ours, theirs in zip(image[3:5], batch[3:5], strict=True):
        torch.testing.assert_close(ours, theirs)
    if training:
        grads = torch.autograd.grad(y.sum(), leaves)
        assert [g.shape for g in grads] == [t.shape for t in leaves]


def test_rows_are_not_taken_for_channels() -> None:
    """J: one image whose output has as many rows as channels."""
    x, weight = torch.randn(4, 6, 6), torch.randn(4, 1, 3, 3)
    statistics = torch.randn(4), torch.rand(4) + 0.5
    y = conv_bn_act(x, weight, None, *statistics, groups=4)
    expected = F.relu(F.batch_norm(F.conv2d(x[None], weight, groups=4), *statistics))
    torch.testing.assert_close(y, expected[0])


@pytest.mark.parametrize(
    "sample", list(CONV2D.error_inputs("cpu")), ids=lambda sample: sample.error_regex[:40]
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "folded"])
def test_error_inputs_of_torch(sample: Any, grad: bool) -> None:
    """I: torch's own wording, folded or not."""
    x, (weight, *rest) = sample.sample_input.input, sample.sample_input.args
    names = ("bias", "stride", "padding", "dilation", "groups")
    call = {**dict(zip(names, rest, strict=False)), **sample.sample_input.kwargs}
    conv_bias = call.pop("bias", None)
    channels = max(weight.size(0), 1) if weight.dim() else 1
    statistics = torch.zeros(channels), torch.ones(channels)
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError, TypeError)) as info:
        conv_bn_act(x, weight, conv_bias, *statistics, **call)
    with pytest.raises(sample.error_type, match=sample.error_regex) as expected:
        CONV2D(x, weight, conv_bias, **call)
    if weight.dim() == 4:  # of one dimension less it is a conv1d's
        assert str(info.value) == str(expected.value)


def changed(**changes: Any) -> tuple[list[Any], dict[str, Any]]:
    names = ["x", "conv_weight", "conv_bias", "running_mean", "running_var", "weight", "bias"]
    args, kwargs = case(with_residual=True)
    for name, value in changes.items():
        if name in names:
            args[names.index(name)] = value
        else:
            kwargs[name] = value
    return args, kwargs


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"running_mean": None}, RuntimeError, "running_mean must be defined in evaluation"),
        ({"running_var": torch.ones(23)}, RuntimeError, "running_var should contain 24 elements"),
        ({"weight": torch.ones(24, 1)}, RuntimeError, "weight should be a vector of 24 elements"),
        ({"bias": torch.ones(24).bfloat16()}, RuntimeError, "mixed dtype"),
        ({"weight": torch.ones(24).double()}, RuntimeError, "mixed dtype"),
        ({"residual": torch.ones(2, 24, 9, 7)}, RuntimeError, "residual should have the size"),
        ({"residual": torch.ones(1, 24, 9, 8)}, RuntimeError, "residual should have the size"),
        ({"residual": torch.ones(24)}, RuntimeError, "residual should have the size"),
        ({"activation": "relo"}, ValueError, "activation must be one of"),
        ({"eps": -1.0}, ValueError, "eps must be non-negative"),
        ({"conv_weight": torch.ones(24, 16)}, ValueError, "conv_weight of size"),
        ({"conv_bias": torch.ones(23)}, RuntimeError, "bias"),
        ({"stride": 0}, RuntimeError, "non-positive stride"),
        ({"dilation": 0}, RuntimeError, "non-positive dilation"),
        ({"padding": -1}, RuntimeError, "negative padding"),
        ({"padding": "sane"}, RuntimeError, "padding"),
        ({"groups": 0}, RuntimeError, "non-positive groups"),
        ({"groups": 5}, RuntimeError, "groups"),
        ({"x": torch.ones(2, 15, 9, 8)}, RuntimeError, "to have 16 channels, but got 15 channels"),
        ({"x": torch.ones(2, 16, 9, 0)}, RuntimeError, "Kernel size can't be greater"),
        ({"x": torch.ones(16)}, RuntimeError, "got input of size: \\[16\\]"),
        ({"x": torch.ones(2, 16, 9, 8).bfloat16()}, RuntimeError, "should be the same"),
        (
            {"x": torch.ones(2, 16, 9, 8).int()},
            RuntimeError,
            "expected scalar type Int|should be the same",
        ),
        ({"x": torch.ones(2, 16, 9, 8, device="meta")}, RuntimeError, "device"),
        ({"x": torch.ones(2, 16, 9, 8).numpy()}, TypeError, "'input' must be Tensor, not ndarray"),
        ({"conv_weight": torch.ones(24, 16, 3, 3).double()}, RuntimeError, "should be the same"),
        ({"conv_weight": torch.ones(24, 16, 30, 3)}, RuntimeError, "Kernel size can't be greater"),
        ({"conv_weight": None}, TypeError, "'conv_weight' must be Tensor, not NoneType"),
        ({"residual": 1.0}, TypeError, "'residual' must be Tensor, not float"),
        ({"running_mean": [0.0] * 24}, TypeError, "'running_mean' must be Tensor, not list"),
        ({"momentum": math.nan, "training": True}, ValueError, "momentum must be a number"),
        ({"eps": math.nan}, ValueError, "eps must be non-negative"),
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "folded"])
def test_wrong_arguments(
    changes: dict[str, Any], error: type[Exception], message: str, grad: bool
) -> None:
    args, kwargs = changed(**changes)
    if grad:
        args[6].requires_grad_()
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        conv_bn_act(*args, **kwargs)


@torch.no_grad()
def test_empty_batch() -> None:
    args, kwargs = case()
    args[0] = args[0][:0]
    assert conv_bn_act(*args, **kwargs).shape == (0, 24, 9, 8)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_mode(training: bool, grad: bool) -> None:
    """F: the tangent is not lost in what was folded; PyTorch's own ops compute."""
    args, kwargs = case(with_residual=True)
    kwargs["activation"] = "silu"
    tangent = torch.randn_like(args[0])
    results = []
    for function in (
        lambda x: conv_bn_act(x, *args[1:], **{**kwargs, "training": training}),
        lambda x: composition([x, *args[1:]], kwargs, training),
    ):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            y = function(forward_ad.make_dual(args[0], tangent))
            results.append(tuple(forward_ad.unpack_dual(y)))
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_functional_transforms() -> None:
    args, _ = case()
    x = args[0]
    gradient = torch.func.grad(lambda t: conv_bn_act(t, *args[1:]).sum())(x)
    own = x.clone().requires_grad_()
    with torch.enable_grad():
        expected = torch.autograd.grad(conv_bn_act(own, *args[1:]).sum(), own)[0]
    torch.testing.assert_close(gradient, expected)


def test_weights_are_packed_for_any_number_of_threads() -> None:
    """oneDNN's layout for one image on two threads was slow for batches: one thread packs, and the
    number of threads is the caller's again afterwards."""
    seen: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func._schema.name == "mkldnn::_reorder_convolution_weight":
                seen.append(torch.get_num_threads())
            return func(*args, **(kwargs or {}))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(16, 8, 3, 3).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), Watch():
            conv_bn_act(x, weight, None, torch.zeros(16), torch.ones(16))
        assert seen == [1] or not torch.backends.mkldnn.is_available()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
