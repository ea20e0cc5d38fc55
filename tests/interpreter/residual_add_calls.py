"""Calls of the Triton residual_add under Triton's interpreter, on CPU tensors.

Run by test_residual_add.py in a process of its own, since TRITON_INTERPRET counts when Triton is
imported. Shapes are tiny: the interpreter is slow.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resops.reference import residual_add as reference
from tests.interpreter.kernels import guarded_memory, import_kernels, one_program_only
from tests.interpreter.test_residual_add import ACTIVATIONS, NAMES, WEIGHTINGS_IN_RULE_R
from tests.ops.residual_add_oracle import (
    WEIGHTINGS,
    ResidualAddCase,
    op_arguments,
    random_case,
    run_ops,
)
from tests.tensors import in_layout, lazy_zeros

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


kernels = import_kernels("residual_add")


def check(case: ResidualAddCase) -> None:
    """Rule R, the mask of the definition bit for bit, and its sizes, dtypes and strides."""
    with guarded_memory():
        ours = run_ops(case, kernels)
    defined = run_ops(case, reference)
    assert ours.keys() == defined.keys()
    for name, t in ours.items():
        other = defined[name]
        assert (t.shape, t.dtype, t.stride()) == (other.shape, other.dtype, other.stride()), name
    mask = ours.pop("mask")
    assert torch.equal(mask, defined["mask"])
    case.check(ours)


def rule_R(weighting: str, activation: str) -> None:
    """Every dtype, shape and layout; every pair of them in three activations."""
    shapes = ((2, 3, 5, 2), (3, 8, 4), (2, 1030))
    layouts = ("contiguous", "channels_last", "every_second")
    turn = ACTIVATIONS.index(activation)
    for i, dtype in enumerate(DTYPES):
        x = torch.randn(shapes[(i + turn) % 3]).to(dtype)
        x = in_layout(x, layouts[(i + 2 * turn) % 3])
        check(random_case(x, weighting, activation=activation))


def exact_sums() -> None:
    """Integers: every element once, at every length around the bytes and blocks."""
    for length in (1, 7, 8, 9, 1023, 1024, 1025, 2049):
        x, residual, grad_y = torch.randint(-4, 5, (3, 2, length)).float()
        for weighting in ("scalar_complement", "per_samples"):
            case = random_case(x, weighting, residual=residual, grad_y=grad_y, activation="relu")
            for name in ("alpha", "beta"):
                weight = getattr(case, name)
                if isinstance(weight, Tensor):
                    setattr(case, name, torch.randint(-4, 5, weight.shape).float())
            ours, defined = run_ops(case, kernels), run_ops(case, reference)
            for name, t in ours.items():
                assert torch.equal(t, defined[name]), (name, length, weighting)


def offsets_beyond_2_31() -> None:
    """The end of a tensor of more elements: gigabytes of addresses, a few pages."""
    x = lazy_zeros(2**31 + 4096, torch.float16).view(2, -1)
    x[-1, -8:] = torch.randn(8)
    with one_program_only():
        constants = (None, None, 1.0, -2.0, False)
        y, mask = kernels.residual_add_forward(x, x, *constants, "relu", 0.0)
        needed = [True, False, False, False]
        grads = kernels.residual_add_backward(x, None, None, *constants, mask, "relu", 0.0, needed)
    assert torch.equal(y[-1, -8:], (-x[-1, -8:]).relu())
    assert torch.equal(grads[0][-1, -8:], torch.where(x[-1, -8:] < 0, x[-1, -8:], 0))


def same_bits_every_time() -> None:
    case = random_case(torch.randn(2, 3000), "scalars", activation="relu")
    first = run_ops(case, kernels)
    for name, t in run_ops(case, kernels).items():
        assert torch.equal(t, first[name]), name


def nan_and_zero() -> None:
    """NaN goes through relu and lets the gradient pass; 0 and -0 block it."""
    x = torch.tensor([[math.nan, 0.0, -0.0, 1.0, -1.0, math.inf, -math.inf]])
    residual = torch.full_like(x, -0.0)
    grad_y = torch.tensor([[2.0, 2.0, 2.0, 2.0, math.nan, 2.0, math.inf]])
    case = ResidualAddCase(x, residual, activation="relu", grad_y=grad_y)
    out = run_ops(case, kernels)
    assert out["y"][0, 0].isnan() and torch.equal(out["y"][:, 1:], x[:, 1:].relu())
    assert torch.equal(out["grad_x"], torch.tensor([[2.0, 0.0, 0.0, 2.0, 0.0, 2.0, 0.0]]))


def empty_and_one() -> None:
    shapes = ((0, 3), (4, 0), (0,), (1,), (1, 1, 1, 1), (3, 1))
    for i, (weighting, activation) in enumerate(itertools.product(WEIGHTINGS, ACTIVATIONS)):
        for shape in (shapes[i % 6], shapes[(i + 3) % 6]):  # every pair of these three
            case = random_case(torch.randn(shape), weighting, activation=activation)
            ours, defined = run_ops(case, kernels), run_ops(case, reference)
            for name, t in ours.items():
                torch.testing.assert_close(t, defined[name])


def only_what_is_asked_for() -> None:
    case = random_case(torch.randn(2, 9), "scalar_complement", activation="relu")
    arguments = list(op_arguments(case).values())
    _, mask = kernels.residual_add_forward(*arguments)
    everything = run_ops(case, kernels)
    names = ("grad_x", "grad_residual", "grad_alpha")
    for wanted in itertools.product([False, True], repeat=3):
        given = (case.x, case.residual) if wanted[2] else (None, None)
        grads = kernels.residual_add_backward(
            case.grad_y, *given, *arguments[2:7], mask, "relu", 0.0, [*wanted, False]
        )
        for name, grad, want in zip(names, grads, wanted, strict=False):
            assert torch.equal(grad, everything[name]) if want else grad.shape == (0,)


def refused() -> None:
    x = torch.ones(2, 3)

    def raises(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
        with pytest.raises(error, match=text):
            call()

    def forward(x: Tensor = x, r: Tensor = x, a: Any = None, b: Any = None, **rest: Any) -> Any:
        flags = {"complement": False, "activation": "relu", "negative_slope": 0.0} | rest
        return kernels.residual_add_forward(x, r, a, b, 1.0, 1.0, **flags)

    raises(NotImplementedError, "torch.float64", lambda: forward(x.double(), x.double()))
    raises(NotImplementedError, "mish", lambda: forward(activation="mish"))
    raises(ValueError, "residual should be", lambda: forward(r=torch.ones(2)))
    raises(ValueError, "residual should be", lambda: forward(r=x.half()))
    raises(ValueError, "alpha should have 1 element", lambda: forward(a=torch.ones(3)))
    raises(ValueError, "beta should be None", lambda: forward(b=x, complement=True))
    raises(ValueError, "0-D", lambda: forward(torch.tensor(1.0), torch.tensor(1.0)))
    none = [None] * 4
    backward = functools.partial(kernels.residual_add_backward, x, *none, 1.0, 1.0, False)
    ones = [True, True, False, False]
    raises(ValueError, "mask should be given", lambda: backward(None, "relu", 0.0, ones))
    raises(ValueError, "mask should have", lambda: backward(x.byte(), "relu", 0.0, ones))
    raises(
        ValueError,
        "x should be given",
        lambda: backward(None, "identity", 0.0, [False, False, True, False]),
    )


CALLS: dict[str, Callable[[], None]] = {
    f"rule_R-{weighting}-{activation}": functools.partial(rule_R, weighting, activation)
    for weighting in WEIGHTINGS_IN_RULE_R
    for activation in ACTIVATIONS
}
CALLS |= {
    call.__name__: call
    for call in (
        exact_sums,
        offsets_beyond_2_31,
        same_bits_every_time,
        nan_and_zero,
        empty_and_one,
        only_what_is_asked_for,
        refused,
    )
}
CALLS["rule_R-gate_complement-relu"] = functools.partial(rule_R, "gate_complement", "relu")
assert set(CALLS) == set(NAMES)
