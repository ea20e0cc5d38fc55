"""Calls of the Triton batch_norm under Triton's interpreter, on CPU tensors.

Run by test_batch_norm.py in a process of its own, since TRITON_INTERPRET counts when Triton is
imported. Shapes are tiny: the interpreter is slow.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from resops.reference import batch_norm as reference
from tests.accuracy import assert_rule_R_all
from tests.interpreter.kernels import guarded_memory, import_kernels, one_program_only
from tests.interpreter.test_batch_norm import ACTIVATIONS, NAMES
from tests.ops.batch_norm_oracle import (
    ARGUMENTS,
    SMOOTH,
    BatchNormCase,
    Outputs,
    random_case,
    run_ops,
    run_phases,
)
from tests.tensors import LAYOUTS, exact_batch, guarded, in_layout, lazy_zeros, ulps_apart

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# C = 1, 3, 17, 65 and multiples of 16; an odd M; a plane of one byte, and of one and a bit.
SHAPES = [
    (3, 17, 5, 3),
    (2, 64, 3, 3),
    (5, 65),
    (2, 3, 9),
    (3, 1, 7, 3),
    (2, 3, 2, 2, 2),
    (7, 48),
    (4, 130, 1, 1),
    (1, 16, 21),
]

kernels = import_kernels("batch_norm")


def run(case: BatchNormCase, runner: Callable[..., Outputs] = run_ops) -> Outputs:
    """Our outputs; a write outside of an output or into an input is an error."""
    tensors = {name: t for name in ARGUMENTS if (t := getattr(case, name)) is not None}
    before = {name: t.clone() for name, t in tensors.items()}
    with guarded_memory():
        ours = runner(case, kernels)
    for name, t in before.items():
        torch.testing.assert_close(tensors[name], t, rtol=0, atol=0, equal_nan=True, msg=name)
    return ours


def check(case: BatchNormCase, runner: Callable[..., Outputs] = run_ops) -> Outputs:
    """Rule R; sizes, dtypes and strides of the definition."""
    case = case.with_decided_signs()
    ours, defined = run(case, runner), runner(case, reference)
    assert ours.keys() == defined.keys()
    for name, t in ours.items():
        other = defined[name]
        assert (t is None) == (other is None), name
        if t is not None and other is not None:
            assert (t.shape, t.dtype, t.stride()) == (other.shape, other.dtype, other.stride()), (
                f"{name}: {t.shape} {t.dtype} {t.stride()}, not {other.shape} {other.dtype} "
                f"{other.stride()}; {case.describe()}"
            )
    case.check(ours)
    return ours


@contextmanager
def programs(count: int) -> Iterator[None]:
    """As on a device that holds so many programs at a time."""
    before = kernels.resident_programs
    kernels.resident_programs = lambda device: count
    try:
        yield
    finally:
        kernels.resident_programs = before


def rule_R(activation: str, layout: str) -> None:
    """Every pair of dtype, training and residual; every shape in several of these tests."""
    turn = 2 * ACTIVATIONS.index(activation) + (layout == "channels_last")
    for i, (dtype, training) in enumerate(itertools.product(DTYPES, [True, False])):
        residual = training == bool((i // 2 + turn) % 2)
        shape = SHAPES[(6 * turn + i) % len(SHAPES)]
        x = in_layout((1.5 * torch.randn(shape) + 1).to(dtype), layout)
        flags: dict[str, Any] = {"training": training, "activation": activation}
        case = random_case(x, residual=residual, negative_slope=0.3, **flags)
        check(case)


def phases() -> None:
    layouts = ("contiguous", "channels_last")
    for i, (activation, training) in enumerate(itertools.product(ACTIVATIONS, (True, False))):
        x = in_layout(torch.randn(3, 17, 5, 3), layouts[(i + i // 2) % 2])
        flags: dict[str, Any] = {"training": training, "activation": activation}
        check(random_case(x, residual=training, **flags), run_phases)


def every_layout() -> None:
    """Any strides, and other ones for each operand; no NaN of the gaps comes in."""
    names = list(LAYOUTS)
    shape = (2, 5, 3, 4)
    for i in range(len(names)):
        x, residual, grad_y = (
            guarded(torch.randn(shape), names[(i + j) % len(names)]) for j in (0, 1, 2)
        )
        case = random_case(
            x.tensor,
            residual=residual.tensor,
            grad=grad_y.tensor,
            activation=("relu", "silu")[i % 2],
        )
        check(case)
        for t in (x, residual, grad_y):
            t.assert_untouched()


def offsets_beyond_2_31() -> None:
    """The end of a tensor of more elements: gigabytes of addresses, a few pages. (Not in the
    reductions, whose loop over tiles counts in Python's integers here, and in 64 bits on a GPU.)"""
    C, rows = 16, 2**27 + 512
    x, grad_y = (lazy_zeros(rows * C, torch.float16).view(rows, C) for _ in range(2))
    x[-8:], grad_y[-8:] = torch.randn(8, C), torch.randn(8, C)
    one, zero = torch.ones(C), torch.zeros(C)
    with one_program_only(first=True):  # which walks backwards from the end
        y, _ = kernels.batch_norm_apply(x, None, None, None, zero, one, "relu", 0.0)
        saved = (grad_y, x, None, None, None, None, zero, one)
        wanted = (True, False)
        grad_x, _ = kernels.batch_norm_backward_apply(*saved, None, None, "relu", 0.0, *wanted)
    assert torch.equal(y[-8:], x[-8:].relu())
    assert torch.equal(grad_x[-8:], grad_y[-8:] * (x[-8:] > 0))


def parameters() -> None:
    """Every subset of the parameters, some in fp32 and in x's own dtype; strided vectors too."""
    x = torch.randn(4, 17, 3).bfloat16()
    both = (torch.float32, torch.bfloat16)
    for names in itertools.product([False, True], repeat=3):
        for dtype in both if sum(names) in (1, 2) else both[:1]:
            case = random_case(x, parameter_dtype=dtype, activation="relu")
            for name, keep in zip(("weight", "bias", "running"), names, strict=True):
                if not keep and name == "running":
                    case = replace(case, running_mean=None, running_var=None)
                elif not keep:
                    case = replace(case, **{name: None})
            check(case)
    ours = []
    for step in (1, 2):
        mean, var, weight = (torch.full((17 * step,), v)[::step] for v in (3.0, 2.0, 0.5))
        out = kernels.batch_norm_forward(
            x, None, weight, None, mean, var, True, 0.3, 1e-5, "relu", 0.0
        )
        ours.append((*out, mean, var))
        assert (mean != 3).all() and (var != 2).all()
    for a, b in zip(*ours, strict=True):
        assert torch.equal(a, b)


def exact_data() -> None:
    """Every element is counted once, however many programs and tiles there are."""
    for shape, layout, count in itertools.product(
        [(3, 17, 11, 13), (2, 64, 5, 5), (5, 3, 40), (1, 1, 2500)],
        ["contiguous", "channels_last"],
        [1, 5, 64],
    ):
        x, mean, var = exact_batch(shape)
        with programs(count):
            ours = kernels.batch_norm_statistics(in_layout(x, layout))
        for got, expected in zip(ours, (mean, var), strict=True):
            # A few roundings; one element of the 2500 more or less changes 1000 times as much.
            assert (ulps_apart(got, expected.float()) <= 8).all(), (shape, layout, count)
        ones = torch.ones_like(x)
        with programs(count):
            sums = kernels.batch_norm_backward_reduce(
                in_layout(ones, layout),
                in_layout(x, layout),
                None,
                None,
                None,
                None,
                mean.float(),
                torch.ones_like(mean).float(),
                "identity",
                0.0,
            )
        assert torch.equal(sums[0], torch.full_like(sums[0], x.numel() // shape[1]))
        assert torch.equal(sums[1], torch.zeros_like(sums[1]))  # the offsets cancel exactly


def constant_channels() -> None:
    """The mean of equal values is that value, and their variance 0, in any number of parts."""
    values = torch.tensor([0.1, -3.3, 1e30, 7e-30, 0.0]).view(1, 5, 1)
    for count, size, layout in itertools.product(
        (1, 3, 1000), (7, 300), ("contiguous", "channels_last")
    ):
        x = in_layout(values.expand(3, 5, size).contiguous(), layout)
        with programs(count):
            mean, var = kernels.batch_norm_statistics(x)
        assert torch.equal(mean, values.flatten()) and torch.equal(var, torch.zeros(5))


def any_number_of_programs() -> None:
    for count, layout in itertools.product((1, 2, 7, 1000), ("contiguous", "channels_last")):
        with programs(count):
            x = in_layout(torch.randn(6, 3, 5, 41), layout)
            check(random_case(x, residual=True, activation="relu"))


def large_means() -> None:
    """mean/std up to 1e4, where a one-pass variance fails; and a first value far from the rest."""
    for ratio, layout in itertools.product((1e2, 1e3, 1e4), ("contiguous", "channels_last")):
        x = torch.randn(4, 5, 6, 7) + ratio * torch.tensor([1, -1, 1, -1, 1.0]).view(1, 5, 1, 1)
        check(random_case(in_layout(x, layout), activation="relu"))
    x = 0.01 * torch.randn(4, 5, 6, 7) + 3
    x[0, :, 0, 0] = -1000.0
    check(random_case(x))


def gelu_far_below_zero() -> None:
    """Channels of evaluation all of whose z lie in gelu's tail, where 1 + erf(z) is rounding alone.
    PyTorch's own gradients are just that, and so no yardstick: rule R without one."""
    z = torch.linspace(-8, -3, 64).expand(4, 64)
    x = z + 0.1 * torch.randn(4, 64)
    zeros, ones = torch.zeros(64), torch.ones(64)
    vectors = {"weight": ones, "bias": zeros, "running_mean": zeros, "running_var": ones}
    case = replace(random_case(x, training=False, activation="gelu"), **vectors)
    ours = run(case)
    found = {name: ours[name] for name in ("y", "grad_x", "grad_weight", "grad_bias")}
    assert_rule_R_all(found, {}, case.exact(), x.dtype, case.kappa())


def nan_and_infinity() -> None:
    """They stay in their channel, and in their row of it in evaluation."""
    for i, (value, layout) in enumerate(
        itertools.product((math.nan, math.inf, -math.inf), ("contiguous", "channels_last"))
    ):
        training = (i + i // 2) % 2 == 0
        clean = random_case(torch.randn(3, 17, 2, 3), residual=True, training=training)
        x = clean.x.clone()
        x[1, 4] = value
        case = replace(clean, x=in_layout(x, layout))
        ours, defined = run(case), run_ops(case, reference)
        expected = run(replace(clean, x=in_layout(clean.x, layout)))
        for name, t in ours.items():
            other, unspoiled = defined[name], expected[name]
            assert t is not None and other is not None and unspoiled is not None
            assert torch.equal(t.isfinite(), other.isfinite()), (name, value, layout, training)
            where = t.isfinite() & (torch.arange(17) != 4).view(-1, *[1] * max(t.dim() - 2, 0))
            assert torch.equal(t[where], unspoiled[where]), name


def zero_and_nan_at_relu() -> None:
    """NaN goes through relu and lets the gradient pass; 0 and -0 block it."""
    z = torch.tensor([math.nan, 0.0, -0.0, 1.0, -1.0, math.inf, -math.inf]).view(-1, 1)
    grad_y = torch.tensor([2.0, 2.0, 2.0, 2.0, math.nan, 2.0, math.inf]).view(-1, 1)
    zero, one = torch.zeros(1), torch.ones(1)
    for residual in (None, torch.full_like(z, -0.0)):
        y, mask = kernels.batch_norm_apply(z, residual, None, None, zero, one, "relu", 0.0)
        assert y[0].isnan() and torch.equal(y[1:], z[1:].relu())
        saved = (grad_y, z, None, mask, None, None, zero, one)
        _, grad = kernels.batch_norm_backward_apply(*saved, None, None, "relu", 0.0, False, True)
        assert torch.equal(grad.flatten(), torch.tensor([2.0, 0.0, 0.0, 2.0, 0.0, 2.0, 0.0]))


def mask_of_the_definition() -> None:
    """Bit for bit, its padding included."""
    activations = itertools.cycle(("relu", "leaky_relu", "gelu"))
    for i, (shape, layout) in enumerate(itertools.product(SHAPES, ("contiguous", "channels_last"))):
        dtype = (torch.float32, torch.bfloat16)[i // 2 % 2]
        x, residual = (in_layout(torch.randn(shape).to(dtype), layout) for _ in range(2))
        C = shape[1]
        vectors = (torch.randn(C), torch.randn(C), torch.randn(C), torch.rand(C))
        arguments = (x, residual, *vectors, next(activations), 0.1)
        with guarded_memory():
            _, mask = kernels.batch_norm_apply(*arguments)
        assert torch.equal(mask, reference.batch_norm_apply(*arguments)[1]), (shape, layout)
        _, mask = kernels.batch_norm_apply(x, None, *vectors, "relu", 0.0)
        assert mask.shape == (0,)


def same_bits_every_time() -> None:
    x = in_layout(torch.randn(6, 24, 9, 9), "channels_last")
    case = random_case(x, residual=True, activation="relu")
    first = run(case)
    for name, t in run(case).items():
        other = first[name]
        assert t is not None and other is not None and torch.equal(t, other), name


def empty_and_one() -> None:
    for shape in ((0, 3), (0, 3, 2), (4, 0, 2), (4, 3, 0), (1, 3), (1, 1, 1, 1), (1, 17)):
        for activation, training in itertools.product(("relu", "gelu"), (True, False)):
            x = torch.randn(shape)
            flags: dict[str, Any] = {"training": training, "activation": activation}
            case = random_case(x, residual=True, **flags)
            ours, defined = run(case), run_ops(case, reference)
            for name, t in ours.items():
                torch.testing.assert_close(t, defined[name], msg=f"{name} {shape}")
    for t in kernels.batch_norm_statistics(torch.full((1, 3), 2.0)):
        assert t[0] in (0.0, 2.0)


def only_what_is_asked_for() -> None:
    for activation, training in (("relu", True), ("silu", False)):
        flags: dict[str, Any] = {"training": training, "activation": activation}
        case = random_case(torch.randn(3, 5, 4), residual=True, **flags)
        forward = (case.x, case.residual, case.weight, case.bias, *case.running)
        out = kernels.batch_norm_forward(*forward, training, 0.0, 1e-5, activation, 0.0)
        kept = case.residual if activation in SMOOTH else None
        saved = (case.grad_y, case.x, kept, out[3], case.weight, case.bias, out[1], out[2])
        call = functools.partial(kernels.batch_norm_backward, *saved, training, activation, 0.0)
        everything = call([True] * 4)
        for wanted in itertools.product([False, True], repeat=4):
            for grad, full, want in zip(call(list(wanted)), everything, wanted, strict=True):
                assert torch.equal(grad, full) if want else grad.shape == (0,)


def ragged_batches() -> None:
    """A: batches around powers of two, and rows around vectors: exact data, exact statistics."""
    around = itertools.product((1023, 1024, 1025, 2047, 2048, 2049, 4096), ((3, 3), (7, 7)))
    tails = itertools.product((1, 3, 16), ((1, 1), (1, 3), (5, 1), (5, 7), (7, 7)))
    sizes = [*around, *((max(N, 2), spatial) for N, spatial in tails)]
    for i, (N, spatial) in enumerate(sizes):
        x, mean, var = exact_batch((N, 2, *spatial))
        ours = kernels.batch_norm_statistics(in_layout(x, ("contiguous", "channels_last")[i % 2]))
        for got, expected in zip(ours, (mean, var), strict=True):
            assert (ulps_apart(got, expected.float()) <= 8).all(), (N, spatial)


def large_batch() -> None:
    """A: more samples than a launch once could have."""
    for N in (65535, 65537, 131073):
        x, mean, var = exact_batch((N, 1))
        y, got, invstd, _ = kernels.batch_norm_forward(
            x, None, None, None, None, None, True, 0.1, 1e-5, "identity", 0.0
        )
        assert (ulps_apart(got, mean.float()) <= 8).all()
        torch.testing.assert_close(y, (x - got) * invstd)
        torch.testing.assert_close(invstd.double(), torch.rsqrt(var + 1e-5), rtol=1e-6, atol=0)


def offsets_beyond_int32() -> None:
    """A: few elements, but stride * index > 2^31."""
    step = 2**30 + 12345
    memory = lazy_zeros(2 * step + 1000, torch.bfloat16)
    far = memory.as_strided((3, 2, 5, 4), (step, 3, 40, 7))
    case = random_case(torch.randn(3, 2, 5, 4).bfloat16(), residual=True, activation="relu")
    for name in ("x", "residual", "grad_y"):
        far.copy_(getattr(case, name))
        check(replace(case, **{name: far}))


def large_fp16_values_and_counts() -> None:
    """B: |x| up to 6e4 and more values than the largest float16: finite statistics."""
    x = ((2 * torch.rand(2, 2, 230, 230) - 1) * 6e4).half()
    for name, t in check(random_case(in_layout(x, "channels_last"))).items():
        assert t is None or t.isfinite().all(), name


def small_variances() -> None:
    """B: eps is inside the root, and added in float32: 1e-5 is subnormal in float16."""
    for dtype in DTYPES:
        x = (torch.randn(8, 5, 6) * 3e-3).to(dtype)
        for parameters in {torch.float32, dtype}:
            check(random_case(x, parameter_dtype=parameters))
    case = random_case(torch.randn(8, 5, 6), training=False, eps=1e-3)
    check(replace(case, running_var=torch.full((5,), 1e-3)))


def momenta() -> None:
    """B: few values per channel, so that n / (n - 1) is far from 1."""
    for momentum in (0.0, 0.1, 1.0, -1.2):
        check(random_case(torch.randn(3, 5, 1, 2) + 4, momentum=momentum))


def weights_and_signs() -> None:
    """B: weights of 0 and below; a residual that turns the sign of what was normalised."""
    for activation in ACTIVATIONS:
        case = random_case(torch.randn(3, 6, 5), negative_slope=0.5)
        case = replace(case, weight=torch.tensor([0.0, 1.0, -0.0, -1.0, -0.5, 0.7]))
        z = torch.from_numpy(case.exact()["y"].value)
        check(replace(case, residual=-2 * z.float(), activation=activation))


def evaluation_in_both_layouts() -> None:
    """C: the same data, the same bits."""
    for dtype in DTYPES:
        case = random_case(torch.randn(3, 17, 5, 3).to(dtype), training=False, activation="relu")
        other = replace(case, x=in_layout(case.x, "channels_last"))
        for name in ("y", "grad_x"):
            a, b = run(case)[name], run(other)[name]
            assert a is not None and b is not None and torch.equal(a, b), (name, dtype)


def singletons() -> None:
    """C: NC11, N1HW and 11HW, cut out of larger tensors, whose strides mean nothing."""
    for i, shape in enumerate([(6, 5, 1, 1), (6, 1, 4, 3), (1, 1, 4, 3), (1, 5, 1, 4)]):
        N, C, H, W = shape
        for format in (torch.contiguous_format, torch.channels_last):
            larger = torch.full((N + 1, C + 2, H + 2, W + 3), math.nan)
            larger = larger.contiguous(memory_format=format)
            x = larger[1:, 1 : C + 1, 1 : H + 1, 2 : W + 2].copy_(torch.randn(shape))
            check(random_case(x, residual=bool(i % 2), activation="relu"))


def refused() -> None:
    x, c = torch.ones(2, 3, 4), torch.ones(3)

    def raises(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
        with pytest.raises(error, match=text):
            call()

    def forward(
        x: Tensor = x,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
        mean: Tensor | None = c,
        var: Tensor | None = c,
        training: bool = True,
        activation: str = "relu",
    ) -> Any:
        return kernels.batch_norm_forward(
            x, residual, weight, None, mean, var, training, 0.1, 1e-5, activation, 0.0
        )

    raises(NotImplementedError, "torch.float64", lambda: forward(x.double()))
    raises(NotImplementedError, "mish", lambda: forward(activation="mish"))
    raises(ValueError, "1-D", lambda: forward(c))
    raises(ValueError, "residual should be", lambda: forward(residual=c))
    raises(ValueError, "residual should be", lambda: forward(residual=x.half()))
    raises(ValueError, "weight should have size", lambda: forward(weight=torch.ones(4)))
    raises(ValueError, "running_var should have size", lambda: forward(var=torch.ones(2)))
    raises(ValueError, "neither be None", lambda: forward(var=None))
    raises(ValueError, "evaluation", lambda: forward(mean=None, var=None, training=False))

    def backward(
        grad_y: Tensor = x, residual: Any = None, mask: Any = None, a: str = "relu"
    ) -> Any:
        return kernels.batch_norm_backward(
            grad_y, x, residual, mask, None, None, c, c, True, a, 0.0, [True] * 4
        )

    raises(ValueError, "grad_y should be", lambda: backward(x[:1]))
    raises(ValueError, "mask should be given", lambda: backward(residual=x))
    raises(ValueError, "mask should have 6 bytes", lambda: backward(mask=torch.ones(7).byte()))
    raises(ValueError, "mask should have 6 bytes", lambda: backward(mask=torch.ones(6)))
    raises(ValueError, "mask should have 0", lambda: backward(mask=torch.ones(6).byte(), a="silu"))


CALLS: dict[str, Callable[[], None]] = {
    f"rule_R-{activation}-{layout}": functools.partial(rule_R, activation, layout)
    for activation in ACTIVATIONS
    for layout in ("contiguous", "channels_last")
}
CALLS |= {
    call.__name__: call
    for call in (
        phases,
        every_layout,
        offsets_beyond_2_31,
        parameters,
        exact_data,
        constant_channels,
        any_number_of_programs,
        large_means,
        gelu_far_below_zero,
        nan_and_infinity,
        zero_and_nan_at_relu,
        mask_of_the_definition,
        same_bits_every_time,
        empty_and_one,
        only_what_is_asked_for,
        ragged_batches,
        large_batch,
        offsets_beyond_int32,
        large_fp16_values_and_counts,
        small_variances,
        momenta,
        weights_and_signs,
        evaluation_in_both_layouts,
        singletons,
        refused,
    )
}
assert set(CALLS) == set(NAMES)
