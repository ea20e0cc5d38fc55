"""Battery B: numerics, on every instruction set. Each test names the case that it stands for."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resops.functional import batch_norm_act
from tests.ops.batch_norm_oracle import (
    ACTIVATIONS,
    PIECEWISE_LINEAR,
    BatchNormCase,
    bits,
    random_case,
    run_native,
    run_ops,
    run_phases,
)
from tests.tensors import LAYOUTS, STRANGE_LAYOUTS, guarded, in_layout

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]
SHAPES_AND_LAYOUTS = [
    ((13, 7), "contiguous"),
    ((3, 6, 9), "contiguous"),
    ((3, 6, 9), "channels_last"),
    ((3, 19, 5, 7), "contiguous"),
    ((3, 19, 5, 7), "channels_last"),
    ((2, 32, 4, 4), "channels_last"),
    ((2, 5, 2, 3, 4), "contiguous"),
    ((2, 5, 2, 3, 4), "channels_last"),
]

pytestmark = pytest.mark.usefixtures("native")


@functools.cache
def core_case(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    activation: str,
    training: bool,
    residual: bool,
) -> BatchNormCase:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(shape, generator=generator) * 1.5 + 1).to(dtype)
    case = random_case(in_layout(x, layout, offset=1))
    if residual:
        values = torch.randn(shape, generator=generator).to(dtype)
        case = replace(case, residual=in_layout(values, layout, offset=5))
    case = replace(case, activation=activation, training=training, negative_slope=0.3)
    return case.with_decided_signs()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "layout"), SHAPES_AND_LAYOUTS)
def test_rule_R(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, activation: str, capability: str
) -> None:
    """The core of B: every dtype, layout and flag, all outputs and gradients by rule R."""
    for training, residual in itertools.product([True, False], [False, True]):
        case = core_case(shape, layout, dtype, activation, training, residual)
        case.check(run_native(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_phases_give_what_the_whole_op_gives(
    layout: str, dtype: torch.dtype, capability: str
) -> None:
    """The four phases, called one by one as a synchronised batch norm does, obey rule R too."""
    for training, residual, activation in itertools.product(
        [True, False], [False, True], ACTIVATIONS
    ):
        case = core_case((3, 19, 5, 7), layout, dtype, activation, training, residual)
        case.check(run_phases(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_reference_obeys_the_rule(layout: str, dtype: torch.dtype) -> None:
    """The definition's own phases, which every backend is held to and whose formulas are the
    double backward."""
    from resops.reference import batch_norm as reference

    for training, residual, activation in itertools.product(
        [True, False], [False, True], ACTIVATIONS
    ):
        case = core_case((3, 19, 5, 7), layout, dtype, activation, training, residual)
        case.check(run_ops(case, reference))
        case.check(run_phases(case, reference))


# ---- large means --------------------------------------------------------------------------------


@functools.cache
def large_mean_case(
    ratio: float, shape: tuple[int, ...], layout: str, training: bool
) -> BatchNormCase:
    """Channels of mean/std = ratio, of both signs and scales, with running_mean near them."""
    generator = torch.Generator().manual_seed(2)
    C = shape[1]
    x = torch.randn(shape, generator=generator)
    per_channel = (1, C, *[1] * (len(shape) - 2))
    sign = torch.where(torch.arange(C) % 2 == 0, 1.0, -1.0)
    std = 2.0 ** (torch.arange(C) % 5 - 2)
    mean = ratio * sign * std
    x = x * std.view(per_channel) + mean.view(per_channel)
    case = random_case(in_layout(x, layout), residual=True, activation="relu", training=training)
    case = replace(case, running_mean=mean + 0.3 * std, running_var=std**2)
    return case.with_decided_signs()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((40, 5), "contiguous"),
        ((16, 6, 9), "channels_last"),
        ((8, 19, 11, 13), "contiguous"),
        ((8, 19, 11, 13), "channels_last"),
        ((8, 16, 11, 13), "channels_last"),
        ((3, 5, 7, 6, 5), "channels_last"),
    ],
)
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_mean_of_many_standard_deviations(
    ratio: float, shape: tuple[int, ...], layout: str, training: bool, capability: str
) -> None:
    """B: mean/std in {1e2,1e3,1e4}, fp32, every layout: one-pass variance fails here."""
    case = large_mean_case(ratio, shape, layout, training)
    case.check(run_native(case))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_value_far_from_the_mean(layout: str, capability: str) -> None:
    """B: a shifted pass must not depend on the first value being near the mean: the first one, or
    the first image, is an outlier."""
    x = torch.randn(6, 5, 40, 40) * 0.01 + 3
    x[0, :, 0, 0] = -1000.0
    x[0, 3] -= 500
    case = random_case(in_layout(x, layout))
    case.check(run_native(case))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 100.0, 1e4])
def test_constant_channel(value: float, layout: str, capability: str) -> None:
    """B: a constant channel: |y - bias| <= torch's (the goal is 0), grad_x finite."""
    x = torch.randn(8, 4, 9, 9)
    x[:, 1:3] = value
    case = random_case(in_layout(x, layout))
    out, bias = run_native(case), case.bias
    y, torch_y, grad_x = out["y"], case.torch_outputs()["y"], out["grad_x"]
    assert y is not None and torch_y is not None and grad_x is not None and bias is not None
    for c in (1, 2):
        assert (y[:, c] - bias[c]).abs().max() <= (torch_y[:, c] - bias[c]).abs().max()
    assert grad_x.isfinite().all()
    # A constant is its own mean in every order of shifted summation.
    assert torch.equal(y[:, 1:3], bias[1:3].view(1, 2, 1, 1).expand(8, 2, 9, 9))


# ---- 16-bit data --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_fp16_values_and_counts(layout: str, capability: str) -> None:
    """B: fp16, |x| up to 6e4 and N*H*W >= 1e5: sums and n/(n-1) stay finite."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand(2, 3, 230, 230, generator=generator) * 2 - 1) * 6e4
    case = random_case(in_layout(x.half(), layout), activation="identity")
    assert case.x.numel() // 3 > 65504
    out = run_native(case)
    for name in ("mean", "invstd", "running_mean", "running_var", "y", "grad_x"):
        t = out[name]
        assert t is not None and t.isfinite().all(), name
    case.check(out)


@pytest.mark.parametrize("dtype", HALF)
def test_statistics_of_16_bit_data_are_float32(dtype: torch.dtype, capability: str) -> None:
    """B: bf16/fp16: saved mean and invstd are float32; parameters' gradients are accumulated in it.
    Statistics in the input's dtype are off by 1e-3, where rule R allows some 1e-6."""
    x = (torch.randn(16, 8, 12, 12) + 3).to(dtype)
    case = random_case(x.contiguous(memory_format=torch.channels_last))
    out = run_native(case)
    for name in ("mean", "invstd", "grad_weight", "grad_bias"):
        t = out[name]
        assert t is not None and t.dtype == torch.float32, name
    figures = case.check(out)
    # Held by rule R to float32's precision, for statistics and for gradients of float32 parameters.
    for name in ("mean", "invstd", "running_mean", "running_var"):
        assert figures[name].ours < 1e-6, figures[name]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_16_bit_results_are_rounded_once(
    dtype: torch.dtype, activation: str, layout: str, capability: str
) -> None:
    """B: 16-bit data is computed in float32 and rounded once, to nearest even: the result is the
    one for the same data in float32, rounded by torch. Rule R would let truncation pass."""
    for training, residual in itertools.product([True, False], [False, True]):
        low = core_case((3, 19, 5, 7), layout, dtype, activation, training, residual)
        wide = replace(
            low,
            **{
                name: in_layout(t.float(), layout)
                for name in ("x", "residual", "grad_y")
                if (t := getattr(low, name)) is not None
            },
        )
        a, b = run_ops(low), run_ops(wide)
        for name, t in a.items():
            other = b[name]
            assert (t is None) == (other is None), name
            if t is not None and other is not None:
                assert torch.equal(bits(t), bits(other.to(t.dtype))), name


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("training", [True, False])
def test_16_bit_parameters(dtype: torch.dtype, training: bool, capability: str) -> None:
    """B: x, weight, bias and running statistics all 16-bit: gradients in the parameters' dtype."""
    case = random_case(
        torch.randn(6, 5, 4, 4).to(dtype), parameter_dtype=dtype, training=training, residual=True
    )
    case = replace(case, activation="relu").with_decided_signs()
    out = run_native(case)
    assert out["grad_weight"] is not None and out["grad_weight"].dtype == dtype
    assert out["running_mean"] is not None and out["running_mean"].dtype == dtype
    case.check(out)


@pytest.mark.parametrize("dtype", HALF)
def test_16_bit_weight_with_float32_statistics(dtype: torch.dtype) -> None:
    """B: FSDP2 keeps 16-bit parameters beside float32 buffers (torch refuses the mixture)."""
    x = torch.randn(6, 5, 4, 4).to(dtype)
    mixed = random_case(x, parameter_dtype=dtype)
    assert mixed.weight is not None and mixed.bias is not None
    plain = replace(
        mixed,
        weight=mixed.weight.float(),
        bias=mixed.bias.float(),
        running_mean=torch.full((5,), 0.5),
        running_var=torch.full((5,), 2.0),
    )
    mixed = replace(mixed, running_mean=plain.running_mean, running_var=plain.running_var)
    ours, expected = run_native(mixed), run_native(plain)
    for name in ("y", "grad_x", "running_mean", "running_var"):
        a, b = ours[name], expected[name]
        assert a is not None and b is not None and torch.equal(a, b), name
    for name in ("grad_weight", "grad_bias"):
        a, b = ours[name], expected[name]
        assert a is not None and b is not None
        assert a.dtype == dtype and torch.equal(a, b.to(dtype)), name


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("parameter_dtype", ["float32", "same"])
def test_eps_is_added_in_float32(dtype: torch.dtype, parameter_dtype: str, capability: str) -> None:
    """B: tiny variance: 1e-5 is subnormal in fp16 and the variance below it is lost there."""
    x = (torch.randn(8, 5, 6, 6) * 2e-3).to(dtype)
    parameters = dtype if parameter_dtype == "same" else torch.float32
    case = random_case(x, parameter_dtype=parameters)
    figures = case.check(run_native(case))
    assert figures["invstd"].ours < 1e-6


def test_variance_about_eps(capability: str) -> None:
    """B: var about eps: eps is inside the square root."""
    x = torch.randn(8, 5, 6, 6) * 3e-3
    case = random_case(x)
    case.check(run_native(case))
    case = random_case(x, training=False, running=True, eps=1e-3)
    case = replace(case, running_var=torch.full((5,), 1e-3))
    case.check(run_native(case))


def test_evaluation_with_eps_zero() -> None:
    """torch allows eps = 0 in evaluation."""
    case = random_case(torch.randn(4, 3, 5, 5), training=False, eps=0.0)
    case.check(run_native(case))


# ---- running statistics -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, -1.2])
def test_momentum(momentum: float, dtype: torch.dtype, capability: str) -> None:
    """B: momentum 0, 0.1, 1, -1.2: new = (1-m) old + m batch; running_var of n/(n-1), while
    normalising uses 1/n. Few values per channel, so that n/(n-1) is far from 1."""
    case = random_case(torch.randn(3, 5, 1, 2).to(dtype) + 4, momentum=momentum)
    out = run_native(case)
    case.check(out)
    if momentum == 0:
        for name in ("running_mean", "running_var"):
            a, b = out[name], getattr(case, name)
            assert a is not None and torch.equal(a, b), name


def test_two_values_per_channel() -> None:
    """B: n/(n-1) is 2."""
    case = random_case(torch.randn(2, 5), momentum=1.0)
    out = run_native(case)
    case.check(out)
    variance = case.x.double().var(0, unbiased=True).float()
    assert out["running_var"] is not None
    torch.testing.assert_close(out["running_var"], variance)


# ---- inf and NaN --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inf_in_one_channel(layout: str, capability: str) -> None:
    """B: inf in one channel: y NaN there, running_mean inf, running_var NaN, as torch; every other
    channel as if nothing had happened."""
    x = torch.randn(4, 19, 5, 5)
    clean = random_case(in_layout(x, layout))
    dirty_x = x.clone()
    dirty_x[2, 7, 3, 1] = math.inf
    case = replace(clean, x=in_layout(dirty_x, layout))
    out, torch_out, expected = run_native(case), case.torch_outputs(), run_native(clean)
    others = [c for c in range(19) if c != 7]
    for name in ("y", "grad_x", "running_mean", "running_var", "grad_weight"):
        got, wanted, reference = out[name], expected[name], torch_out[name]
        assert got is not None and wanted is not None and reference is not None
        dim = 0 if got.dim() == 1 else 1
        assert torch.equal(
            got.index_select(dim, torch.tensor(others)),
            wanted.index_select(dim, torch.tensor(others)),
        ), name
        mine, theirs = got.select(dim, 7), reference.select(dim, 7)
        assert torch.equal(mine.isnan(), theirs.isnan()), name
        assert torch.equal(mine.isinf(), theirs.isinf()), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_swallowed(
    activation: str, layout: str, residual: bool, dtype: torch.dtype, capability: str
) -> None:
    """B: NaN before ReLU: NaN out, at every position of a vector and nowhere else."""
    x = torch.randn(2, 19, 5, 3).to(dtype)
    flat = torch.arange(x.numel()).view(x.shape)
    nan_here = flat % 7 == 0
    case = random_case(x, residual=residual, training=False, activation=activation)
    if residual:
        values = case.residual
        assert values is not None
        case = replace(case, x=in_layout(x, layout))
        dirty = values.masked_fill(nan_here, math.nan)
        case = replace(case, residual=in_layout(dirty, layout))
    else:
        case = replace(case, x=in_layout(x.masked_fill(nan_here, math.nan), layout))
    out = run_ops(case)
    y = out["y"]
    assert y is not None and torch.equal(y.isnan(), nan_here)
    # A NaN passes the gradient, as torch's relu does on a CPU.
    if residual and activation in PIECEWISE_LINEAR:
        grad, grad_y = out["grad_residual"], case.grad_y
        assert grad is not None and grad_y is not None
        assert torch.equal(grad[nan_here], grad_y[nan_here])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", PIECEWISE_LINEAR)
def test_relu_backward_at_zero_and_nan(
    activation: str, dtype: torch.dtype, residual: bool, layout: str, capability: str
) -> None:
    """B: ReLU backward at 0, -0.0 and NaN: 0, 0, and the gradient passes; subnormals decide too.

    mean 0, var 1, eps 0 and no weight: z is x (+ residual) exactly. The processor's own rounding to
    bfloat16, which avx512_bf16 uses, makes subnormal results zero, after their sign has decided.
    """
    smallest = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}.get(dtype, 2.0**-149)
    values = torch.tensor(
        [0.0, -0.0, math.nan, 1.0, -1.0, math.inf, -math.inf, smallest, -smallest]
    )
    passes = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1, 0], dtype=torch.bool)
    x = values.to(dtype).repeat(38).reshape(2, 19, 9)
    passes = passes.repeat(38).reshape(2, 19, 9)
    slope = 0.25
    case = BatchNormCase(
        in_layout(x, layout),
        running_mean=torch.zeros(19, dtype=torch.float64 if dtype == torch.float64 else None),
        running_var=torch.ones(19, dtype=torch.float64 if dtype == torch.float64 else None),
        training=False,
        eps=0.0,
        activation=activation,
        negative_slope=slope,
        grad_y=in_layout((torch.randn(2, 19, 9).sign() * 2).to(dtype), layout),
    )
    if residual:  # x and residual change places
        case = replace(case, residual=case.x, x=in_layout(torch.zeros_like(x), layout))
    out = run_ops(case)
    assert case.grad_y is not None
    blocked = slope if activation == "leaky_relu" else 0.0
    expected = torch.where(passes, case.grad_y, case.grad_y * blocked)
    grad_x = out["grad_x"]
    assert grad_x is not None and torch.equal(grad_x, expected)
    if residual:
        assert out["grad_residual"] is not None and torch.equal(out["grad_residual"], expected)
    y = out["y"]
    assert y is not None
    z = x.clone()
    reference = F.relu(z) if activation == "relu" else F.leaky_relu(z, slope)
    if capability == "avx512_bf16" and dtype == torch.bfloat16:
        reference[reference.abs() < torch.finfo(dtype).tiny] = 0
    assert torch.equal(y.nan_to_num(7.0), reference.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", PIECEWISE_LINEAR)
def test_residual_flips_the_sign(
    activation: str, layout: str, dtype: torch.dtype, capability: str
) -> None:
    """B: bn+add+relu where the residual turns the sign of bn: the mask is that of the sum;
    grad_residual = g * mask, and grad_x uses the masked g."""
    x = torch.randn(3, 19, 5, 5).to(dtype)
    case = random_case(in_layout(x, layout), activation=activation)
    normalised = case.exact()["y"].value  # activation of z without residual
    z = replace(case, activation="identity").exact()["y"].value
    assert normalised.shape == z.shape
    residual = (-2 * torch.from_numpy(z.astype("float64"))).to(dtype)  # z + r = -z
    case = replace(case, residual=in_layout(residual, layout)).with_decided_signs()
    out = run_native(case)
    case.check(out)
    # Where bn was well positive the gradient is stopped, and the other way round.
    well = torch.from_numpy(abs(z) > 0.1)
    positive = torch.from_numpy(z > 0)
    grad, grad_y = out["grad_residual"], case.grad_y
    assert grad is not None and grad_y is not None
    blocked = case.negative_slope if activation == "leaky_relu" else 0.0
    expected = torch.where(positive, (grad_y.double() * blocked).to(dtype), grad_y)
    torch.testing.assert_close(grad[well], expected[well])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zero_weight(activation: str, layout: str, capability: str) -> None:
    """B: weight = 0 (zero-init last gamma): y = act(bias + r), grad_weight right, grad_x is 0."""
    case = random_case(in_layout(torch.randn(3, 6, 5, 5), layout), residual=True)
    weight = torch.tensor([0.0, 1.0, 0.0, -1.0, -0.0, 0.0])
    case = replace(case, weight=weight, activation=activation).with_decided_signs()
    out = run_native(case)
    case.check(out)
    grad_x = out["grad_x"]
    assert grad_x is not None and not grad_x[:, [0, 2, 4, 5]].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_negative_weight(activation: str, capability: str) -> None:
    """B: weight < 0: rule R, with a leaky slope that a sign error would show."""
    case = random_case(torch.randn(3, 6, 5, 5), activation=activation, negative_slope=0.5)
    case = replace(case, weight=-torch.rand(6) - 0.5).with_decided_signs()
    case.check(run_native(case))


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, -0.5, 3.0])
@pytest.mark.parametrize("residual", [False, True])
def test_negative_slopes(slope: float, residual: bool, capability: str) -> None:
    """B: leaky_relu with slopes of every kind, also negative and above 1."""
    case = random_case(
        torch.randn(3, 6, 5, 5), residual=residual, activation="leaky_relu", negative_slope=slope
    ).with_decided_signs()
    case.check(run_native(case))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_smooth_activations_far_from_zero(
    activation: str, dtype: torch.dtype, capability: str
) -> None:
    """B: silu and gelu over the whole range: tails that underflow, and no overflow in exp."""
    z = torch.cat([torch.linspace(-110, 110, 441), torch.linspace(-9, 9, 181)])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = BatchNormCase(
        z.to(dtype).view(-1, 2),
        running_mean=torch.zeros(2, dtype=wide),
        running_var=torch.ones(2, dtype=wide),
        training=False,
        eps=0.0,
        activation=activation,
        grad_y=torch.ones(311, 2, dtype=dtype),
    )
    case.check(run_native(case))


# ---- optional parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_missing_parameters(affine: str, running: bool, dtype: torch.dtype) -> None:
    """B: weight only, bias only, affine=False (also with fp32 running stats and fp16 input): what
    is missing is 1 or 0, and only the existing gradients are returned."""
    for training in (True, False):
        if not training and not running:
            continue
        case = random_case(torch.randn(4, 5, 3, 3).to(dtype), running=running, training=training)
        case = replace(
            case,
            weight=case.weight if affine in ("both", "weight") else None,
            bias=case.bias if affine in ("both", "bias") else None,
            activation="relu",
        ).with_decided_signs()
        out = run_native(case)
        case.check(out)
        assert (out.get("grad_weight") is not None) == (case.weight is not None)
        assert (out.get("grad_bias") is not None) == (case.bias is not None)


def test_residual_of_another_dtype_is_promoted() -> None:
    """As + would: bf16 + fp32 is fp32."""
    x, residual = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4)
    mean, var = torch.zeros(3), torch.ones(3)
    y = batch_norm_act(x, mean, var, residual=residual, training=False)
    assert y.dtype == torch.float32
    expected = F.relu(F.batch_norm(x.float(), mean, var) + residual)
    torch.testing.assert_close(y, expected)


# ---- fuzz ---------------------------------------------------------------------------------------


def _random_shape(generator: torch.Generator) -> tuple[int, ...]:
    def pick(*options: int) -> int:
        return options[int(torch.randint(len(options), (), generator=generator))]

    spatial = [pick(1, 2, 3, 5, 7, 8, 16, 17) for _ in range(pick(0, 1, 2, 2, 2, 3))]
    return (pick(2, 3, 4, 9, 33), pick(1, 2, 3, 4, 8, 13, 16, 24, 48, 65), *spatial)


@pytest.mark.parametrize("seed", range(100))
def test_fuzz_with_guard_bands(seed: int, capability: str) -> None:
    """B: 100 random calls, each tensor inside NaN margins of its own layout and alignment, outputs
    in poisoned memory: rule R holds and no input, margin or gap is written to."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: list[str]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    shape = _random_shape(generator)
    dtype = DTYPES[seed % 4]
    inputs = ["contiguous", "channels_last"] * 3 + list(STRANGE_LAYOUTS)
    guards = {
        "x": guarded(
            (torch.randn(shape, generator=generator) + 2).to(dtype), pick(inputs), seed % 17
        ),
        "grad_y": guarded(
            torch.randn(shape, generator=generator).to(dtype),
            pick(inputs + list(LAYOUTS)),
            seed % 5,
        ),
    }
    if seed % 2:
        guards["residual"] = guarded(
            torch.randn(shape, generator=generator).to(dtype), pick(inputs), seed % 7
        )
    case = random_case(
        guards["x"].tensor,
        seed=seed,
        training=seed % 3 != 0,
        activation=ACTIVATIONS[seed % 5],
        affine=seed % 7 != 0,
    )
    case = replace(case, **{name: guard.tensor for name, guard in guards.items()})
    decided = case.with_decided_signs()
    assert case.grad_y is not None and decided.grad_y is not None
    if 0 not in case.grad_y.stride():  # keep the gradient's own memory
        case.grad_y.copy_(decided.grad_y)
        guards["grad_y"].remember()
    elif case.activation in PIECEWISE_LINEAR:
        case = decided
    # Running statistics are written to: they have margins of their own.
    for name in ("running_mean", "running_var"):
        guards[name] = guarded(getattr(case, name), "contiguous", 1)
        case = replace(case, **{name: guards[name].tensor})
    case.check(run_native(case))
    torch.ops.resops.batch_norm_forward(
        case.x,
        case.residual,
        case.weight,
        case.bias,
        case.running_mean,
        case.running_var,
        case.training,
        case.momentum,
        case.eps,
        case.activation,
        case.negative_slope,
    )
    for name, guard in guards.items():
        if name.startswith("running"):
            guard.assert_margins_untouched()
        else:
            guard.assert_untouched()


def test_bad_tail_is_visible(capability: str) -> None:
    """A gradient that is large in the last element only: it must arrive in every sum."""
    x = torch.randn(3, 5, 7, 7)
    grad = torch.zeros_like(x)
    grad[-1, :, -1, -1] = 1000.0
    for layout in ("contiguous", "channels_last"):
        case = random_case(in_layout(x, layout), grad=in_layout(grad, layout))
        out = run_native(case)
        case.check(out)
        grad_bias: Tensor | None = out["grad_bias"]
        assert grad_bias is not None and torch.equal(grad_bias, torch.full((5,), 1000.0))
