"""Properties of batch_norm over generated shapes, dtypes, layouts and flags (hypothesis)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
from tests.tensors import DENSE_LAYOUTS, LAYOUTS, STRANGE_LAYOUTS, in_layout

pytestmark = pytest.mark.usefixtures("native")

# The same examples in every run: a failure is a finding about the code, not about the day. The
# fixtures (poisoned memory) need no renewal between examples.
few = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
layouts = st.sampled_from([*DENSE_LAYOUTS, *STRANGE_LAYOUTS])


@st.composite
def shapes(draw: Any) -> tuple[int, ...]:
    spatial = draw(st.lists(st.integers(1, 12), min_size=0, max_size=3))
    N, C = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    while N * C * torch.Size(spatial).numel() > 30_000:
        C = max(C // 2, 1)
        spatial = [max(s // 2, 1) for s in spatial]
    if N * torch.Size(spatial).numel() == 1:
        N = 2
    return (N, C, *spatial)


@st.composite
def cases(draw: Any, **fixed: Any) -> BatchNormCase:
    shape = draw(shapes())
    dtype = draw(dtypes)
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    # Means of up to 30 standard deviations, where 16-bit data still has a variance.
    ratio = draw(st.sampled_from([0.0, 1.0, 30.0]))

    def values() -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = in_layout((values() + ratio).to(dtype), draw(layouts), draw(st.integers(0, 16)))
    residual = in_layout(values().to(dtype), draw(layouts)) if draw(st.booleans()) else False
    case = random_case(
        x,
        seed=seed,
        residual=residual,
        affine=draw(st.booleans()),
        running=True,
        grad=in_layout(values().to(dtype), draw(layouts), draw(st.integers(0, 16))),
        training=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        negative_slope=draw(st.sampled_from([0.0, 0.01, 0.3])),
        momentum=draw(st.sampled_from([0.0, 0.1, 1.0])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 1.0])),
    )
    return replace(case, **fixed).with_decided_signs()


@few
@given(case=cases())
def test_rule_R(case: BatchNormCase) -> None:
    case.check(run_native(case))


@few
@given(case=cases())
def test_phases_obey_the_rule(case: BatchNormCase) -> None:
    case.check(run_phases(case))


@few
@given(case=cases(training=False), data=st.data())
def test_evaluation_is_elementwise(case: BatchNormCase, data: Any) -> None:
    """In evaluation the batch does not matter: a part gives the same bits alone."""
    n = data.draw(st.integers(0, case.x.size(0) - 1))
    whole = run_ops(case)
    part = replace(
        case,
        x=case.x[n : n + 1],
        grad_y=None,
        residual=None if case.residual is None else case.residual[n : n + 1],
    )
    a, b = whole["y"], run_ops(part)["y"]
    assert a is not None and b is not None and torch.equal(bits(a[n : n + 1]), bits(b))


@few
@given(case=cases(training=True), data=st.data())
def test_permuting_the_batch(case: BatchNormCase, data: Any) -> None:
    """Statistics do not depend on the order of the samples, but for rounding."""
    order = torch.tensor(data.draw(st.permutations(range(case.x.size(0)))))
    permuted = replace(
        case,
        x=case.x[order],
        residual=None if case.residual is None else case.residual[order],
        grad_y=None if case.grad_y is None else case.grad_y[order],
    )
    out = run_ops(permuted)
    inverse = order.argsort()
    for name in ("y", "grad_x", "grad_residual"):
        t = out.get(name)
        if t is not None:
            out[name] = t[inverse]
    case.check(out)


@few
@given(case=cases(training=True, activation="identity", residual=None), power=st.integers(-3, 3))
def test_power_of_two_scale(case: BatchNormCase, power: int) -> None:
    """x -> 2^k x with eps -> 4^k eps is exact: y has the same bits, grad_x is divided by 2^k.

    Not for float16, whose small values underflow.
    """
    assert case.grad_y is not None
    if case.x.dtype == torch.float16:
        case = replace(case, x=case.x.float(), grad_y=case.grad_y.float())
    factor = 2.0**power
    scaled = replace(case, x=case.x * factor, eps=case.eps * factor**2)
    a, b = run_ops(case), run_ops(scaled)
    for name, back in {"y": 1.0, "grad_x": factor, "grad_weight": 1.0, "grad_bias": 1.0}.items():
        one, two = a[name], b[name]
        assert (one is None) == (two is None), name
        if one is not None and two is not None:
            assert torch.equal(one, two * back), name


@few
@given(case=cases(training=True))
def test_gradient_is_orthogonal(case: BatchNormCase) -> None:
    """In training y does not change under x -> a x + b (eps aside): so grad_x has no component
    along 1, and sums to 0 within rounding of its terms."""
    out = run_ops(case)
    grad_x = out["grad_x"]
    assert grad_x is not None
    dims = [0, *range(2, case.x.dim())]
    terms = torch.from_numpy(case.exact()["grad_x"].terms.astype("float64"))
    total, scale = grad_x.double().sum(dims).abs(), terms.sum(dims)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(case.x.dtype, 2.0**-24)
    # The rounding of every element, and of the two means by rule R's floor.
    kappa = torch.from_numpy(case.kappa().astype("float64"))
    assert (total <= scale * (unit + 16 * 2.0**-24 * (1 + kappa)) + 1e-30).all()


@few
@given(
    shape=shapes(),
    layout=st.sampled_from(list(LAYOUTS)),
    activation=st.sampled_from(PIECEWISE_LINEAR),
)
def test_one_constant_value(shape: tuple[int, ...], layout: str, activation: str) -> None:
    """A constant input normalises to its bias, in every layout and for every shape."""
    x = in_layout(torch.full(shape, 3.7), layout)
    bias = torch.linspace(-1, 1, shape[1]) if shape[1] > 1 else torch.tensor([0.5])
    y = batch_norm_act(x, None, None, torch.full_like(bias, 2.0), bias, True, activation=activation)
    expected = torch.nn.functional.leaky_relu(bias, 0.01 if activation == "leaky_relu" else 0.0)
    column = expected.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    assert torch.equal(y, column)
