"""The CUDA ops as torch sees them, run by the emulator, and on a GPU where there is one: arguments,
layouts, outputs and their strides, against the oracles of the CPU ops, by rule R."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from resops import _dispatch, functional
from resops.ops import batch_norm as batch_norm_op
from resops.ops import batch_norm_act_max_pool as pool_op
from resops.ops import conv_bn_act_phases, convolution
from resops.reference import conv_bn_act as convolutions
from resops.reference.activation import activate
from tests.accuracy import Exact, assert_rule_R, to_numpy
from tests.dispatch import counted_calls
from tests.gpu.device_ops import DeviceOps
from tests.ops import batch_norm_act_max_pool_oracle as pool_oracle
from tests.ops import batch_norm_oracle, dense_block_cases, residual_add_oracle
from tests.ops import dense_block_phases_oracle as dense_block_oracle
from tests.ops.conv_bn_act_bad_calls import FORWARD, Bad, good_forward
from tests.tensors import LAYOUTS, exact_batch, guarded, in_layout, ulps_apart

from . import emulated_ops, emulator

# Compiling the bindings with torch's headers takes a minute.
pytestmark = pytest.mark.slow

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(3, 5), (2, 3, 9), (2, 17, 5, 3), (3, 1, 4, 4), (2, 16, 4, 4), (2, 3, 2, 3, 5)]


@pytest.fixture(scope="module", params=["emulator", "cuda"])
def ops(request: pytest.FixtureRequest) -> Any:
    if request.param == "cuda":
        if not (torch.cuda.is_available() and "cuda" in _dispatch._KERNELS["native"]["batch_norm"]):
            pytest.skip("no GPU, or the extension was built without CUDA")
        return DeviceOps("cuda")
    reason = emulator.missing("plain")
    if reason is not None:
        pytest.skip(reason)
    return emulated_ops.load()


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[1]))
    return (2 * x + 1).to(dtype)


# ---- batch_norm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_norm_layouts(
    ops: Any, dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> None:
    """x, residual and gradient each in a layout, in NaN margins and at an odd address."""
    for residual in (False, True):
        x = guarded(values(shape, dtype), layout, offset=1)
        r = guarded(values(shape, dtype).neg(), layout) if residual else None
        g = guarded(values(shape, dtype).sub(1), "every_second", offset=2)
        case = batch_norm_oracle.random_case(
            x.tensor, residual=False if r is None else r.tensor, grad=g.tensor, activation="relu"
        ).with_decided_signs()
        out = batch_norm_oracle.run_ops(case, ops)
        case.check(out)
        batch_norm_oracle.assert_metadata(case, out)
        case.check(batch_norm_oracle.run_phases(case, ops))
        for guard in filter(None, (x, r)):
            guard.assert_untouched()


@pytest.mark.parametrize("activation", batch_norm_oracle.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_flags(ops: Any, dtype: torch.dtype, activation: str) -> None:
    for residual in (False, True):
        for training in (False, True):
            for parameters in {torch.float32, dtype}:
                x = in_layout(values((4, 9, 3, 5), dtype), "channels_last")
                case = batch_norm_oracle.random_case(
                    x,
                    residual=residual,
                    training=training,
                    activation=activation,
                    parameter_dtype=parameters,
                ).with_decided_signs()
                case.check(batch_norm_oracle.run_ops(case, ops))
                for missing in ("weight", "bias", "running_mean"):
                    if missing == "running_mean" and not training:
                        continue
                    without = {missing: None}
                    if missing == "running_mean":
                        without["running_var"] = None
                    some = replace(case, **without)
                    some.check(batch_norm_oracle.run_ops(some, ops))


def test_batch_norm_strided_vectors(ops: Any) -> None:
    """Parameters and running statistics that are every second element of something."""
    case = batch_norm_oracle.random_case(values((3, 6, 4), torch.float32), activation="silu")

    def spread(t: torch.Tensor) -> torch.Tensor:
        return torch.full((2 * t.numel(),), torch.nan).index_copy_(
            0, torch.arange(0, 2 * t.numel(), 2), t
        )[::2]

    fields = ("weight", "bias", "running_mean", "running_var")
    strided = replace(case, **{name: spread(getattr(case, name)) for name in fields})
    strided.check(batch_norm_oracle.run_ops(strided, ops))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 7, 7, 7), (5, 64, 3, 3), (128, 3), (1, 2, 33, 31)], ids=str)
def test_exact_statistics(ops: Any, shape: tuple[int, ...], layout: str) -> None:
    """Bit-equal means, invstd within one unit in the last place; twice the same bits."""
    values, mean, var = exact_batch(shape)
    x = in_layout(values, layout)
    got_mean, got_var = ops.batch_norm_statistics(x)
    assert torch.equal(got_mean.double(), mean)
    assert torch.equal(got_var, var.float())
    _, again, invstd, _ = ops.batch_norm_forward(
        x, None, None, None, None, None, True, 0.1, 1e-5, "relu", 0.0
    )
    assert torch.equal(again, got_mean)
    assert ulps_apart(invstd, (1 / (var + 1e-5).sqrt()).float()).max() <= 1


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 4), (0, 3)], ids=str)
def test_empty(ops: Any, shape: tuple[int, ...]) -> None:
    case = batch_norm_oracle.random_case(torch.empty(shape), residual=True, activation="relu")
    out = batch_norm_oracle.run_ops(case, ops)
    assert out["y"] is not None and out["y"].shape == shape
    assert torch.equal(out["running_mean"], case.running_mean)
    assert torch.equal(out["running_var"], case.running_var)
    for name in ("grad_weight", "grad_bias"):
        assert torch.equal(out[name], torch.zeros(shape[1]))


def test_refusals(ops: Any) -> None:
    """The same checks as on the CPU, and no float64."""
    x = torch.randn(2, 3, 4)
    rest = (None, None, None, True, 0.1, 1e-5, "relu", 0.0)
    with pytest.raises(RuntimeError, match="weight should contain 3 elements not 4"):
        ops.batch_norm_forward(x, None, torch.ones(4), *rest)
    with pytest.raises(ValueError, match="activation must be one of"):
        ops.batch_norm_forward(x, None, None, *rest[:-2], "tanh", 0.0)
    with pytest.raises(NotImplementedError, match="not implemented for 'Double' by the CUDA"):
        ops.batch_norm_forward(x.double(), None, None, *rest)
    with pytest.raises(NotImplementedError, match="not implemented for 'Double' by the CUDA"):
        ops.residual_add_forward(x.double(), x.double(), None, None, 1, 1, False, "relu", 0.0)


def test_strides_are_those_of_the_fake_kernels(ops: Any) -> None:
    for layout in LAYOUTS:
        for shape in (*SHAPES, (2, 3, 1, 1), (1, 3, 1, 5)):
            x = in_layout(values(shape, torch.float32), layout)
            args = (x, x, None, None, None, None, True, 0.1, 1e-5, "relu", 0.0)
            real, fake = ops.batch_norm_forward(*args), batch_norm_op._fake_forward(*args)
            for r, f in zip(real, fake, strict=True):
                assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


# ---- residual_add -------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", sorted(residual_add_oracle.WEIGHTINGS))
@pytest.mark.parametrize("activation", batch_norm_oracle.ACTIVATIONS)
def test_residual_add(ops: Any, activation: str, weighting: str) -> None:
    for dtype in DTYPES:
        for shape, layout in [
            ((3, 5, 4), "contiguous"),
            ((4, 6, 2, 3), "channels_last"),
            ((5, 7), "padded_contiguous"),
            ((2, 3, 5, 3), "all_reversed"),
        ]:
            case = residual_add_oracle.random_case(
                in_layout(values(shape, dtype), layout, offset=1), weighting, activation=activation
            )
            out = residual_add_oracle.run_ops(case, ops)
            case.check({name: t for name, t in out.items() if name != "mask"})
            residual_add_oracle.assert_metadata(case, out)


# ---- conv_bn_act --------------------------------------------------------------------------------

GEOMETRIES = [
    # kernel, stride, padding, dilation
    ((1, 1), [1, 1], [0, 0], [1, 1]),
    ((3, 3), [1, 1], [1, 1], [1, 1]),
    ((3, 3), [2, 2], [1, 1], [1, 1]),
    ((5, 2), [1, 3], [0, 4], [1, 2]),
]


class ConvCase:
    """Arguments of conv_bn_act_forward in the order of the schema, and what is exact."""

    def __init__(self, x: list[torch.Tensor], out: int, geometry: Any, **changes: Any) -> None:
        kernel, stride, padding, dilation = geometry
        channels = sum(t.size(1) for t in x)
        scaled = values((out, channels, *kernel), torch.float32).div(channels**0.5)
        self.arguments: dict[str, Any] = {
            "inputs": x,
            "scale": None,
            "shift": None,
            "prologue": "identity",
            "prologue_slope": 0.1,
            "conv_weight": scaled.to(x[0].dtype),
            "conv_bias": None,
            "residual": None,
            "activation": "identity",
            "negative_slope": 0.1,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "statistics": False,
        } | changes

    def check(self, ops: Any) -> tuple[torch.Tensor, ...]:
        a = self.arguments
        outputs: tuple[torch.Tensor, ...] = ops.conv_bn_act_forward(*a.values())
        fakes = conv_bn_act_phases.fake_forward(**a)
        for real, fake in zip(outputs, fakes, strict=True):
            assert (real.shape, real.stride(), real.dtype) == (
                fake.shape,
                fake.stride(),
                fake.dtype,
            )
        y, mean, var = outputs
        assert_rule_R("y", y, None, self.exact(), y.dtype)
        if a["statistics"] and y.numel() > 0:
            stored = y.double()
            expected = torch.var_mean(stored, (0, 2, 3), correction=0)
            kappa = to_numpy(stored.abs().mean((0, 2, 3)) / (expected[0] + 1e-5).sqrt(), y.dtype)
            for name, got, value, terms in (
                ("mean", mean, expected[1], stored.abs().mean((0, 2, 3))),
                ("var", var, expected[0], 2 * expected[0]),
            ):
                exact = Exact(to_numpy(value, y.dtype), to_numpy(terms, y.dtype), 0)
                assert_rule_R(name, got, None, exact, y.dtype, kappa)
        return outputs

    def exact(self) -> Exact:
        a = self.arguments
        x = convolutions._convolved(
            a["inputs"], a["scale"], a["shift"], a["prologue"], a["prologue_slope"]
        )
        geometry = (tuple(a["stride"]), tuple(a["padding"]), tuple(a["dilation"]), 1)
        pairs = []
        for wide in (torch.Tensor.double, lambda t: t.double().abs()):
            bias = None if a["conv_bias"] is None else wide(a["conv_bias"])
            z = convolutions.convolution(wide(x), wide(a["conv_weight"]), bias, *geometry)
            pairs.append(z if a["residual"] is None else z + wide(a["residual"]))
        value = activate(pairs[0], a["activation"], a["negative_slope"])
        dtype = a["inputs"][0].dtype
        return Exact(to_numpy(value, dtype), to_numpy(pairs[1], dtype))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conv_bn_act_layouts(ops: Any, dtype: torch.dtype, layout: str) -> None:
    """x, weight and residual each in a layout, x in NaN margins and at an odd address."""
    for channels, out in ((16, 24), (5, 3)):
        x = guarded(values((2, channels, 5, 7), dtype), layout, offset=1)
        for geometry in GEOMETRIES:
            plain = ConvCase([x.tensor], out, geometry)
            size = plain.exact().value.shape
            weight = in_layout(plain.arguments["conv_weight"], layout, offset=3)
            residual = in_layout(values(size, dtype), layout, offset=1)
            changes = {"conv_weight": weight, "residual": residual, "activation": "relu"}
            ConvCase([x.tensor], out, geometry, **changes).check(ops)
        x.assert_untouched()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conv_bn_act_flags(ops: Any, dtype: torch.dtype) -> None:
    for channels, out in ((16, 72), (7, 5)):
        x = in_layout(values((2, channels, 6, 5), dtype), "channels_last")
        scale, shift = values((channels, 2), torch.float32).unbind(1)  # strided
        for geometry in GEOMETRIES:
            before = {"scale": scale, "shift": shift, "prologue": "relu"}
            ConvCase([x], out, geometry, **before, statistics=True).check(ops)
            for bias in (values((1, out), dtype)[0], values((1, out), torch.float32)[0]):
                ConvCase([x], out, geometry, conv_bias=bias, activation="silu").check(ops)


def test_conv_bn_act_takes_slices(ops: Any) -> None:
    """Some channels of a wider tensor, and several inputs beside each other."""
    wide = in_layout(values((2, 24, 6, 5), torch.bfloat16), "channels_last")
    for first, last in ((8, 24), (3, 20)):
        ConvCase([wide[:, first:last]], 16, GEOMETRIES[1]).check(ops)
    three = [wide[:, :8], wide[:, 16:], values((2, 3, 6, 5), torch.bfloat16)]
    ConvCase(three, 8, GEOMETRIES[2]).check(ops)
    ConvCase([wide[:, :8], wide[:, 11:]], 8, GEOMETRIES[2], statistics=True).check(ops)


def test_conv_bn_act_empty(ops: Any) -> None:
    x = torch.empty(0, 8, 5, 5, dtype=torch.float16)
    y, mean, var = ConvCase([x], 16, GEOMETRIES[1], statistics=True).check(ops)
    assert y.shape == (0, 16, 5, 5)
    assert torch.equal(mean, torch.zeros(16)) and torch.equal(var, torch.zeros(16))


REFUSED_ON_A_GPU = {
    "fp32": Bad(
        {"inputs": [torch.ones(2, 8, 5, 5)], "conv_weight": torch.ones(4, 8, 3, 3)},
        NotImplementedError,
        "not implemented for 'Float' by the CUDA kernels",
    ),
    "too large": Bad({"padding": [2**29, 1]}, NotImplementedError, "too large for the CUDA"),
}


@pytest.mark.parametrize("name", [*FORWARD, *REFUSED_ON_A_GPU])
def test_conv_bn_act_refusals(ops: Any, name: str) -> None:
    """The checks of the CPU, and what the CUDA kernels do not take."""
    bad = {**FORWARD, **REFUSED_ON_A_GPU}[name]
    arguments = good_forward() | bad.changes
    with pytest.raises(bad.error, match=bad.message):
        ops.conv_bn_act_forward(*arguments.values())


# ---- batch_norm_act_max_pool --------------------------------------------------------------------


@pytest.mark.parametrize("windows", pool_oracle.WINDOWS, ids=str)
def test_batch_norm_act_max_pool(ops: Any, windows: pool_oracle.Windows) -> None:
    for i, activation in enumerate(batch_norm_oracle.ACTIVATIONS):
        for layout in ("contiguous", "channels_last", "every_second"):
            dtype, channels = DTYPES[i % 3], (1, 5, 16)[i % 3]
            case = pool_oracle.make_case(
                (2, channels, 11, 8),
                windows,
                dtype,
                layout,
                activation=activation,
                parameter_dtype=dtype if i % 2 else torch.float32,
                training=i != 3,
            )
            case.check(pool_oracle.run_ops(case, ops))


def test_strides_of_batch_norm_act_max_pool(ops: Any) -> None:
    for layout in ("contiguous", "channels_last", "every_second"):
        for shape in ((2, 3, 6, 7), (1, 1, 4, 4), (3, 4, 3, 3)):
            arguments = pool_oracle.make_case(shape, layout=layout).arguments()
            real = ops.batch_norm_act_max_pool_forward(*arguments)
            fake = pool_op._fake_forward(*arguments)
            for r, f in zip(real, fake, strict=True):
                assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


# ---- dense_block --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 12, 37, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_block_phases(ops: Any, dtype: torch.dtype, channels: int) -> None:
    dense_block_oracle.assert_definition(ops, dtype, channels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_block_rule_R(ops: Any, dtype: torch.dtype) -> None:
    """Of 49 consumers with biased gradients, and of the running statistics of several."""
    dense_block_oracle.assert_gradient_of_many_consumers(ops, dtype, 49, 1.0)
    dense_block_oracle.assert_running_statistics(ops, dtype)


def test_dense_block_in_other_layouts(ops: Any) -> None:
    norm = dense_block_oracle.case(torch.float32, 12, 16)
    contiguous = {**norm, "buffer": norm["buffer"].contiguous()}
    y, its = (dense_block_oracle.like(norm["buffer"], 12) for _ in range(2))
    y = y.contiguous()
    ops.dense_block_apply(**contiguous, y=y)
    ops.dense_block_apply(**norm, y=its)
    assert torch.equal(y, its)


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_dense_block_from_end_to_end(
    ops: Any, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block on these phases; the library's convolutions between them."""
    if isinstance(ops, DeviceOps):
        pytest.skip("tests/gpu has it on a GPU")
    monkeypatch.setitem(convolution.NAMESPACES, "native", ops)
    args = dense_block_cases.block(torch.float32, layers=2, channels=8, training=training)
    its = dense_block_cases.results(dense_block_cases.definition, dense_block_cases.fresh(args))
    with convolution.convolutions("library"), counted_calls() as calls:
        mine = dense_block_cases.results(functional.dense_block, args)
    assert calls["resops_simt::dense_block_accumulate"] == 3
    for name, t in mine.items():
        # Sums of up to 90 values through 5 convolutions; a wrong formula is off by far more.
        torch.testing.assert_close(t, its[name], rtol=1e-3, atol=1e-3, msg=name)


# ---- how often tensors are read -----------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["reverse", "single_read"])
def test_schemes(ops: Any, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule R with each, twice the same bits, and a name that is none is refused."""
    monkeypatch.setenv("RESOPS_CUDA_BATCH_NORM", scheme)
    for dtype, activation, training in itertools.product(DTYPES, ("relu", "silu"), (True, False)):
        for channels in (8, 40, 17):  # 17 channels are read twice in any case
            x = in_layout(values((3, channels, 4, 5), dtype), "channels_last", offset=1)
            case = batch_norm_oracle.random_case(
                x, residual=True, activation=activation, training=training, parameter_dtype=dtype
            ).with_decided_signs()
            out, again = (batch_norm_oracle.run_ops(case, ops) for _ in range(2))
            case.check(out)
            for name, t in out.items():
                other = again[name]
                assert t is None or (other is not None and torch.equal(t, other)), name
    monkeypatch.setenv("RESOPS_CUDA_BATCH_NORM", "once")
    with pytest.raises(ValueError, match="two_reads, reverse or single_read, but got 'once'"):
        batch_norm_oracle.run_ops(case, ops)
