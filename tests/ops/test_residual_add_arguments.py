"""residual_add: wrong arguments, backends. A wrong argument is an exception, never a signal."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import resops
from resops.functional import residual_add
from tests.dispatch import counted_calls, native_calls

pytestmark = pytest.mark.usefixtures("native")

X = torch.ones(3, 4, 5)
INTS = torch.ones(3, 4, 5, dtype=torch.int64)

# What the public function is called with, beside x: the exception and what its message says.
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any, str]] = {
    "no dimensions": (
        (torch.tensor(1.0), torch.tensor(1.0)),
        {},
        ValueError,
        r"residual_add expects an input of size .* got 0-D input",
    ),
    "integers": ((INTS, INTS), {}, NotImplementedError, '"residual_add" not implemented for'),
    "complex": (
        (X.to(torch.complex64), X.to(torch.complex64)),
        {},
        NotImplementedError,
        '"residual_add" not implemented for',
    ),
    "sparse": (
        (X.to_sparse(), X.to_sparse()),
        {},
        NotImplementedError,
        '(residual_add" not implemented for layout|resops::residual_add_forward)',
    ),
    "another size": (
        (X, torch.ones(3, 4, 1)),
        {},
        RuntimeError,
        r"residual should have the size \[3, 4, 5\] of the input, but got \[3, 4, 1\]",
    ),
    "sparse residual": ((X, X.to_sparse()), {}, (RuntimeError, NotImplementedError), "."),
    "another device": (
        (X, torch.ones(3, 4, 5, device="meta")),
        {},
        RuntimeError,
        "Expected all tensors to be on the same device, but input is on cpu and residual is on",
    ),
    "alpha of C": (
        (X, X, torch.ones(4)),
        {},
        RuntimeError,
        r"alpha should have 1 element, the size \[3\] or \[3, 1, 1\] for one value per sample, "
        r"or the size \[3, 4, 5\] of the input, but got size \[4\]",
    ),
    "beta that broadcasts": (
        (X, X, 1.0, torch.ones(1, 4, 1)),
        {},
        RuntimeError,
        r"beta should have 1 element, .* but got size \[1, 4, 1\]",
    ),
    "alpha of (N, 1)": ((X, X, torch.ones(3, 1)), {}, RuntimeError, r"got size \[3, 1\]"),
    "empty alpha": ((X, X, torch.ones(0)), {}, RuntimeError, r"got size \[0\]"),
    "fp64 scalar": (
        (X, X, torch.ones(1, dtype=torch.float64)),
        {},
        RuntimeError,
        "mixed dtype: expect alpha to have dtype",
    ),
    "fp64 weights of bf16": (
        (X.bfloat16(), X.bfloat16(), 1.0, torch.ones(3, dtype=torch.float64)),
        {},
        RuntimeError,
        r"mixed dtype: expect beta to have dtype .* or (torch.float32|Float)",
    ),
    "fp16 scalar of bf16": (
        (X.bfloat16(), X.bfloat16(), torch.ones(1, dtype=torch.float16)),
        {},
        RuntimeError,
        "mixed dtype: expect alpha",
    ),
    "integer scalar": ((X, X, torch.ones(1, dtype=torch.int64)), {}, RuntimeError, "mixed dtype"),
    "integer gate": ((X, X, INTS), {}, RuntimeError, "alpha should have the dtype"),
    "activation": (
        (X, X),
        {"activation": "sigmoid"},
        ValueError,
        "activation must be one of identity, relu, leaky_relu, silu, gelu, but got 'sigmoid'",
    ),
    "string alpha": (
        (X, X, "complement"),
        {},
        ValueError,
        "alpha must be a number or a tensor, but got 'complement'",
    ),
    "misspelt": (
        (X, X, 1.0, "complemnt"),
        {},
        ValueError,
        "beta must be a number or a tensor or 'complement', but got 'complemnt'",
    ),
    "list": ((X, X, [1.0]), {}, TypeError, r"alpha must be a number or a tensor, but got \[1.0\]"),
    "complex number": ((X, X, 1j), {}, TypeError, "alpha must be a number or a tensor"),
    "alpha_backward of C": (
        (X, X),
        {"alpha_backward": torch.ones(4)},
        RuntimeError,
        "alpha_backward should have 1 element",
    ),
    "beta_backward": (
        (X, X),
        {"beta_backward": "same"},
        ValueError,
        "beta_backward must be a number",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case: str, backend: str) -> None:
    """The same exception from both backends, with the argument's name."""
    args, kwargs, error, message = WRONG[case]
    with resops.backend(backend), pytest.raises(error, match=message):
        residual_add(*args, **kwargs)


def test_explicit_backend_that_has_no_kernel_raises() -> None:
    x = torch.ones(2, 3, device="meta")
    with resops.backend("native"), pytest.raises(resops.BackendError, match="meta"):
        residual_add(x, x)


def test_backend_that_ran() -> None:
    """auto is native on a CPU; the reference calls no op of ours."""
    for backend, expected in (("auto", {"residual_add_forward": 1}), ("reference", {})):
        with resops.backend(backend), counted_calls() as calls:
            residual_add(X, X, activation="relu")
        assert native_calls(calls) == expected


def test_backend_of_forward_is_that_of_backward() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = residual_add(x, x, 2.0, activation="relu")
    with resops.backend("reference"), counted_calls() as calls:
        y.sum().backward()
    assert native_calls(calls) == {"residual_add_backward": 1}


# Calls of the registered ops: each must raise the exception that is named. `f` and `b` change
# arguments of a call that is right.
DIRECT = {
    "right": ("f()", None),
    "right backward": ("b()", None),
    "x of no dimensions": ("f(x=one.sum(), residual=one.sum())", "ValueError"),
    "x of integers": ("f(x=x.long(), residual=x.long())", "NotImplementedError"),
    "residual short": ("f(residual=x[:2])", "RuntimeError"),
    "residual of another dtype": ("f(residual=x.double())", "RuntimeError"),
    "residual meta": ("f(residual=x.to('meta'))", "Error"),
    "alpha empty": ("f(alpha=one[:0])", "RuntimeError"),
    "alpha short": ("f(alpha=torch.ones(2))", "RuntimeError"),
    "alpha of 10 dimensions": ("f(alpha=torch.ones([2] * 10))", "RuntimeError"),
    "alpha of integers": ("f(alpha=one.long())", "RuntimeError"),
    "alpha fp64": ("f(alpha=torch.ones(3, dtype=torch.float64))", "RuntimeError"),
    "gate of another dtype": ("f(alpha=x.half())", "RuntimeError"),
    "gate transposed": ("f(alpha=torch.ones(5, 4, 3))", "RuntimeError"),
    "alpha meta": ("f(alpha=one.to('meta'))", "Error"),
    "alpha sparse": ("f(alpha=torch.ones(3).to_sparse())", "Error"),
    "beta short": ("f(beta=torch.ones(3, 4, 1))", "RuntimeError"),
    "beta and complement": ("f(beta=one, complement=True)", "ValueError"),
    "activation": ("f(activation='prelu')", "ValueError"),
    "activation empty": ("f(activation='')", "ValueError"),
    "grad_y of integers": ("b(grad_y=x.long())", "NotImplementedError"),
    "grad_y short": ("b(grad_y=x[:2])", "RuntimeError"),
    "grad_y of another dtype": ("b(grad_y=x.double())", "RuntimeError"),
    "x short in backward": ("b(x=x[:, :3])", "RuntimeError"),
    "x missing": ("b(x=None)", "RuntimeError"),
    "x missing for silu": (
        "b(x=None, activation='silu', mask=None, output_mask=[True, False, False, False])",
        "RuntimeError",
    ),
    "residual missing": ("b(residual=None)", "RuntimeError"),
    "residual missing for the complement": (
        "b(residual=None, beta=None, complement=True, output_mask=[False, False, True, False])",
        "RuntimeError",
    ),
    "alpha missing": ("b(alpha=None)", "ValueError"),
    "beta missing": ("b(beta=None)", "ValueError"),
    "alpha short in backward": ("b(alpha=torch.ones(2))", "RuntimeError"),
    "beta of another dtype": ("b(beta=x.half())", "RuntimeError"),
    "mask missing": ("b(mask=None)", "RuntimeError"),
    "mask empty": ("b(mask=mask[:0])", "RuntimeError"),
    "mask short": ("b(mask=mask[:, :2])", "RuntimeError"),
    "mask flat": ("b(mask=mask.flatten())", "RuntimeError"),
    "mask of bool": ("b(mask=mask.bool())", "RuntimeError"),
    "mask meta": ("b(mask=mask.to('meta'))", "Error"),
    "mask without relu": ("b(activation='gelu')", "RuntimeError"),
    "short list": ("b(output_mask=[True])", "RuntimeError"),
}
SCRIPT = """
import json, sys
import torch
import resops

x, one = torch.ones(3, 4, 5), torch.ones(1)
ops = torch.ops.resops
right = dict(x=x, residual=x, alpha=one, beta=torch.ones(3), alpha_value=1.0, beta_value=1.0,
             complement=False, activation="relu", negative_slope=0.0)
mask = ops.residual_add_forward(**right)[1]

def f(**changes):
    return ops.residual_add_forward(**(right | changes))

def b(**changes):
    rest = dict(grad_y=x, mask=mask, output_mask=[True] * 4)
    return ops.residual_add_backward(**(right | rest | changes))

for name, call in json.loads(sys.argv[1]).items():
    print(json.dumps([name, "calling"]), flush=True)
    try:
        eval(call)
        print(json.dumps([name, None]), flush=True)
    except Exception as error:
        print(json.dumps([name, type(error).__name__, str(error)]), flush=True)
"""


def test_direct_calls_with_wrong_arguments() -> None:
    """In a process of their own, which must outlive them all."""
    calls = {name: call for name, (call, _) in DIRECT.items()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)], capture_output=True, text=True
    )
    results = {line[0]: line[1:] for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, f"{done.returncode} in {list(results)[-1:]}: {done.stderr}"
    for name, (call, expected) in DIRECT.items():
        error = results[name][0]
        right = error is None if expected is None else error is not None and expected in error
        assert right, f"{name}: {call} gave {results[name]}, expected {expected}"
        if expected in ("RuntimeError", "ValueError"):
            named = [n for n in ("x", "residual", "alpha", "beta", "mask", "grad_y") if n in name]
            text = results[name][1]
            assert not named or any(n in text for n in (*named, "input")), f"{name}: {text}"


@pytest.mark.parametrize("name", [n for n in DIRECT if n not in ("alpha sparse", "short list")])
def test_fake_kernels_raise_the_same(name: str) -> None:
    """What is traced raises as it would when run."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    call, expected = DIRECT[name]
    with FakeTensorMode():
        scope: dict[str, Any] = {}
        exec(SCRIPT.partition("for name")[0], scope)
        if expected is None:
            eval(call, scope)
        else:
            with pytest.raises(Exception) as caught:
                eval(call, scope)
            assert expected in type(caught.value).__name__


def test_arguments_are_kept() -> None:
    """What was passed is what is computed with: numbers of other types, weights of any strides."""
    import fractions

    import numpy as np

    expected = 0.5 * X + 2 * X
    numbers: list[Any] = [0.5, np.float32(0.5), np.float64(0.5), fractions.Fraction(1, 2)]
    for alpha in numbers:
        assert torch.equal(residual_add(X, X, alpha, 2), expected)
    strided: list[Tensor] = [
        torch.tensor([[0.5, 9.0], [0.25, 9.0], [0.125, 9.0]])[:, 0],
        torch.tensor([0.5]).expand(3),
        torch.tensor([[0.5, 9.0]] * 3)[:, :1].unsqueeze(-1),
    ]
    for weight in strided:
        y = residual_add(X, X, weight)
        assert torch.equal(y, (weight.reshape(3, 1, 1) + 1) * X)
