"""Battery I: invalid arguments, each called in a subprocess: an exception, never a signal.

The calls are in batch_norm_bad_calls.py: the public function with the native and with the reference
backend, every registered op directly, and the fake kernel.
"""

from __future__ import annotations

import re

import pytest
import torch

from resops.functional import batch_norm_act
from tests.ops.batch_norm_bad_calls import BAD, C, H, N, W, mask_bytes
from tests.ops.batch_norm_oracle import GRADS, random_case, run_ops
from tests.subprocess_calls import Outcome, run_calls

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """Of the calls whose tests are going to run."""
    names = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_wrong_call_raises"
    ]
    return run_calls("tests.ops.batch_norm_bad_calls", names)


@pytest.mark.parametrize("name", BAD)
def test_wrong_call_raises(name: str, outcomes: dict[str, Outcome]) -> None:
    """I: the class of torch's own error, and a message that names the argument, what came and what
    was expected."""
    bad, outcome = BAD[name], outcomes[name]
    assert outcome.error != "signal", f"the process died: {outcome.message}"
    assert outcome.error is not None, "the call returned"
    assert outcome.error in bad.error.split("|"), outcome
    assert re.search(bad.message, outcome.message), outcome.message


def test_a_crash_would_be_seen() -> None:
    """The check itself: a call that kills its process is reported, and the next one still runs."""
    calls = run_calls("tests.ops.crashing_calls", ["fine", "crash", "raises", "exit"])
    assert calls["fine"].error is None
    assert calls["crash"].error == "signal" and calls["exit"].error == "signal"
    assert calls["raises"] == Outcome("ValueError", "as it should")


def test_good_calls_of_the_table_are_good() -> None:
    """The unchanged arguments of the table are right, so each call fails for its own reason."""
    from tests.ops import batch_norm_bad_calls as calls

    calls.functional("auto")
    calls.functional("reference")
    calls.op_forward()
    calls.fake_forward()
    calls.op_apply()
    calls.op_backward_reduce()
    calls.op_backward_reduce(mask=mask_bytes())
    calls.op_backward_apply()
    calls.op_backward_apply(mean_grad=None, mean_grad_xhat=None)
    calls.op_backward()
    calls.op_backward(mask=mask_bytes())
    assert mask_bytes().numel() == N * C * ((H * W + 7) // 8)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_backward_of_a_residual_without_its_mask(activation: str) -> None:
    """I: relu after a residual needs the mask. Without one, but with the residual itself, the
    backward op either computes it from the residual, as the definition does, or refuses: it must
    not forget the residual."""
    case = random_case(
        torch.randn(4, 6, 3, 5), residual=True, activation=activation
    ).with_decided_signs()
    right = run_ops(case)
    _, mean, invstd, _ = torch.ops.resops.batch_norm_forward(
        case.x, case.residual, case.weight, case.bias, None, None, True, 0.1, 1e-5, activation, 0.01
    )
    refused: str | None = None
    try:
        grads = torch.ops.resops.batch_norm_backward(
            case.grad_y,
            case.x,
            case.residual,
            None,
            case.weight,
            case.bias,
            mean,
            invstd,
            True,
            activation,
            0.01,
            [True, True, True, True],
        )
    except (RuntimeError, ValueError) as error:
        refused = str(error)
    if refused is not None:
        assert "mask" in refused
        return
    for name, grad in zip(GRADS, grads, strict=True):
        expected = right[name]
        assert expected is not None and torch.equal(grad, expected), name


def test_nothing_changes_when_a_call_raises() -> None:
    """I: running statistics are as they were after every refused call."""
    mean, var = torch.full((C,), 0.25), torch.full((C,), 4.0)
    x = torch.randn(N, C, H, W)
    for kwargs in (
        {"weight": torch.ones(C - 1)},
        {"bias": torch.ones(C + 1)},
        {"residual": torch.ones(N, C, H, 1)},
        {"activation": "tanh"},
        {"eps": 0.0},
    ):
        with pytest.raises((RuntimeError, ValueError)):
            batch_norm_act(x, mean, var, training=True, **kwargs)
    assert (mean == 0.25).all() and (var == 4.0).all()


def test_lazy_negation_and_zero_tensors_are_resolved() -> None:
    """I: tensors that only say what they hold (negative bit, zero tensors) are read right."""
    x, grad = torch.randn(N, C, H, W), torch.randn(N, C, H, W)
    negated = torch._neg_view(x)
    assert negated.is_neg()
    plain = random_case(-x, residual=True, grad=-grad, activation="relu")
    lazy = random_case(negated, residual=True, grad=torch._neg_view(grad), activation="relu")
    lazy.residual = plain.residual
    a, b = run_ops(plain), run_ops(lazy)
    for name, t in a.items():
        other = b[name]
        assert t is None or (other is not None and torch.equal(t, other)), name
    zero = torch._efficientzerotensor((N, C, H, W))
    case = random_case(x, grad=torch.zeros(N, C, H, W))
    expected = run_ops(case)
    case.grad_y = zero
    for name, t in run_ops(case).items():
        other = expected[name]
        assert t is None or (other is not None and torch.equal(t, other)), name
