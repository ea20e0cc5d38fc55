"""PyTorch's own tests of F.batch_norm, run on batch_norm_act(activation=None): OpInfo's samples and
their non-contiguous twins, gradcheck and gradgradcheck."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

from resops.functional import batch_norm_act
from tests.dispatch import counted_calls, native_calls
from tests.ops.batch_norm_oracle import ACTIVATIONS, BatchNormCase, run_native

pytestmark = pytest.mark.usefixtures("native")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NUMBER_OF_SAMPLES = 12  # in torch 2.13; a sample that is not there tests nothing


@functools.cache
def opinfo() -> OpInfo:
    (info,) = (o for o in op_db if o.name == "nn.functional.batch_norm" and not o.variant_test_name)
    return info


def samples(dtype: torch.dtype, requires_grad: bool = False) -> list[SampleInput]:
    torch.manual_seed(0)
    return list(opinfo().sample_inputs("cpu", dtype, requires_grad=requires_grad))


def ours(*args: Any, **kwargs: Any) -> Tensor:
    return batch_norm_act(*args, **kwargs, activation=None)


def as_case(sample: SampleInput, grad: bool = True) -> BatchNormCase:
    running_mean, running_var, weight, bias = sample.args
    # The samples draw running_var like everything else, negative values included.
    case = BatchNormCase(
        sample.input,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        training=sample.kwargs.get("training", False),
        momentum=sample.kwargs.get("momentum", 0.1),
        eps=sample.kwargs.get("eps", 1e-5),
    )
    if grad:
        case.grad_y = torch.randn(sample.input.shape).to(sample.input.dtype)
    return case


def test_samples_are_there() -> None:
    assert len(samples(torch.float32)) >= NUMBER_OF_SAMPLES


@pytest.mark.parametrize("index", range(NUMBER_OF_SAMPLES))
@pytest.mark.parametrize("noncontiguous", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype: torch.dtype, noncontiguous: bool, index: int) -> None:
    """Every sample, and its non-contiguous twin, by rule R; the running statistics too."""
    sample = samples(dtype)[index]
    if sample.input.dim() < 2:
        # torch takes an empty 1-D input, the only one that it takes; here it is an error (TESTING
        # A: a clear error before size(1) is touched).
        with pytest.raises(ValueError, match="1-D input"):
            ours(sample.input, *sample.args, **sample.kwargs)
        return
    if noncontiguous:
        sample = sample.noncontiguous()
    case = as_case(sample)
    out = run_native(case)
    running_var = case.running_var
    if not case.training and running_var is not None and (running_var.double() < 0).any():
        # The root of a negative variance: NaN, in the same channels as torch.
        expected = case.torch_outputs()
        for name in ("y", "grad_x"):
            a, b = out[name], expected[name]
            assert a is not None and b is not None and torch.equal(a.isnan(), b.isnan()), name
        positive = running_var.double() + case.eps > 0
        case = copy.copy(case)
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(case, name) is not None:
                setattr(case, name, getattr(case, name)[positive])
        case.x = case.x[:, positive]
        assert case.grad_y is not None
        case.grad_y = case.grad_y[:, positive]
        case._memory = {}
        if not positive.any():
            return
        out = run_native(case)
    case.check(out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_samples_of_the_composition(dtype: torch.dtype) -> None:
    """The reference backend is torch's own op: equal bits."""
    import resops

    for sample in samples(dtype):
        if sample.input.dim() < 2:
            continue
        a = [None if t is None else t.clone() for t in sample.args]
        b = [None if t is None else t.clone() for t in sample.args]
        with resops.backend("reference"), counted_calls() as calls:
            y = ours(sample.input, *a, **sample.kwargs)
        assert native_calls(calls) == {}
        expected = F.batch_norm(sample.input, *b, **sample.kwargs)
        assert torch.equal(y.nan_to_num(9.0), expected.nan_to_num(9.0))
        for s, t in zip(a[:2], b[:2], strict=True):
            assert s is None or torch.equal(s, t)


# ---- gradcheck and gradgradcheck ----------------------------------------------------------------


def differentiable(
    shape: tuple[int, ...],
    training: bool,
    affine: bool,
    residual: bool,
    activation: str,
    backend: str = "native",
) -> tuple[Any, tuple[Tensor, ...]]:
    """The op as a function of the tensors that it is differentiated by."""
    import resops

    generator = torch.Generator().manual_seed(sum(shape))
    C = shape[1]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = draw(*shape)
    inputs = [x]
    if residual:
        inputs.append(draw(*shape))
    if affine:
        inputs += [draw(C) + 1.5, draw(C)]
    mean = draw(C)
    var = draw(C).abs() + 0.5

    def f(*tensors: Tensor) -> Tensor:
        rest = list(tensors[1:])
        r = rest.pop(0) if residual else None
        weight, bias = rest if affine else (None, None)
        with resops.backend(backend):
            return batch_norm_act(
                tensors[0],
                mean.clone(),
                var.clone(),
                weight,
                bias,
                training,
                residual=r,
                activation=activation,
                negative_slope=0.2,
            )

    # Away from the corner of relu, where a finite difference means nothing.
    with torch.no_grad():
        for _ in range(50):
            with resops.backend("reference"):
                slope_like = batch_norm_act(
                    inputs[0],
                    mean.clone(),
                    var.clone(),
                    inputs[-2] if affine else None,
                    inputs[-1] if affine else None,
                    training,
                    residual=inputs[1] if residual else None,
                    activation=None,
                )
            near = slope_like.abs() < 1e-3
            if not near.any():
                break
            inputs[1 if residual else 0][near] += 0.01
        else:
            raise AssertionError("no data away from the corner")
    return f, tuple(t.requires_grad_() for t in inputs)


SHAPES = [(4, 3), (3, 2, 3), (3, 2, 2, 2), (2, 2, 2, 1, 3)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(
    shape: tuple[int, ...], training: bool, affine: bool, residual: bool, activation: str
) -> None:
    """D: gradcheck and gradgradcheck, float64, training and evaluation, affine or not."""
    f, inputs = differentiable(shape, training, affine, residual, activation)
    with counted_calls() as calls:
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert calls["batch_norm_forward"] > 0 and calls["batch_norm_backward"] > 0
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu"])
def test_gradcheck_in_full(activation: str, training: bool) -> None:
    """D: the same with every element of the Jacobian (fast mode takes random directions), for
    channels-last memory as well."""
    f, inputs = differentiable((3, 2, 2, 2), training, True, True, activation)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)
    last = tuple(
        t.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        if t.dim() == 4
        else t
        for t in inputs
    )
    assert torch.autograd.gradcheck(f, last)
    assert torch.autograd.gradgradcheck(f, last)


@pytest.mark.parametrize("training", [False, True])
def test_gradcheck_of_opinfo_samples(training: bool) -> None:
    """The samples that require grad, as torch's TestGradients runs them: with clones of the running
    statistics, and a positive running_var."""
    checked = 0
    for sample in samples(torch.float64, requires_grad=True):
        if sample.input.dim() < 2 or sample.kwargs.get("training", False) != training:
            continue
        mean, var, weight, bias = sample.args
        leaves = [t for t in (sample.input, weight, bias) if t is not None and t.requires_grad]

        def f(*_: Tensor, sample: Any = sample, mean: Any = mean, var: Any = var) -> Tensor:
            statistics = (
                (None, None)
                if mean is None
                else (mean.detach().clone(), var.detach().abs().clone() + 0.5)
            )
            return ours(sample.input, *statistics, *sample.args[2:], **sample.kwargs)

        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_double_backward_in_low_precision(dtype: torch.dtype, training: bool) -> None:
    """D: double backward of 16-bit data gives a finite result close to float64's
    (chainer had NaN there)."""
    f64, inputs = differentiable((6, 3, 4, 4), training, True, True, "silu")

    def penalty(f: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(f(*tensors).double().sum(), tensors[:1], create_graph=True)
        return torch.autograd.grad(grads[0].double().square().sum(), tensors[:1])

    (expected,) = penalty(f64, inputs)

    def low(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        C = x.size(1)
        return batch_norm_act(
            x,
            torch.zeros(C),
            torch.ones(C),
            w,
            b,
            training,
            residual=r,
            activation="silu",
        )

    low_inputs = tuple(
        t.detach().to(dtype if t.dim() > 1 else torch.float32).requires_grad_() for t in inputs
    )
    (got,) = penalty(low, low_inputs)
    assert got.isfinite().all()
    if training:  # the running statistics of the two differ
        scale = expected.abs().max()
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4  # three nested roundings of x's dtype
        assert (got.double() - expected).abs().max() <= tolerance * scale
