"""Calls of the Triton dense_block under Triton's interpreter, on CPU tensors.

Run by test_dense_block.py in a process of its own, since TRITON_INTERPRET counts when Triton is
imported. Shapes are tiny: the interpreter is slow.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import resops.ops.dense_block  # noqa: F401  (registers the ops)
from resops.reference import dense_block as reference
from tests.interpreter.kernels import guarded_memory, import_kernels
from tests.interpreter.test_dense_block import CHANNELS, DTYPES, NAMES, ROUNDED
from tests.ops.dense_block_phases_oracle import (
    assert_definition,
    assert_gradient_of_many_consumers,
    assert_running_statistics,
    case,
    like,
)

kernels = import_kernels("dense_block")


def definition(dtype: torch.dtype, channels: int) -> None:
    with guarded_memory():
        assert_definition(kernels, dtype, channels)


def many_consumers(dtype: torch.dtype) -> None:
    """As many as DenseNet-121 has, with gradients of a common sign."""
    assert_gradient_of_many_consumers(kernels, dtype, 25, 1.0)


def any_number_of_programs() -> None:
    """The rows of a block of channels are cut into parts, of which the last is short."""
    norm = case(torch.float32, 150, 160, (2, 13, 11))
    grad, total = like(norm["buffer"], 150), like(norm["buffer"], 160)
    arguments = {"training": True, "first": False}
    its = total.clone(memory_format=torch.preserve_format)
    wanted = reference.dense_block_accumulate(grad, **norm, grad_sum=its, **arguments)
    for count in (1, 5, 64):
        mine = total.clone(memory_format=torch.preserve_format)
        with pytest.MonkeyPatch.context() as patch, guarded_memory():
            patch.setattr(kernels, "resident_programs", lambda device, count=count: count)
            sums = kernels.dense_block_accumulate(grad, **norm, grad_sum=mine, **arguments)
        torch.testing.assert_close(mine, its)
        for a, b in zip(sums, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def other_layouts() -> None:
    norm = case(torch.float32, 12, 16)
    contiguous = {**norm, "buffer": norm["buffer"].contiguous()}
    y, its = like(norm["buffer"], 12).contiguous(), like(norm["buffer"], 12)
    kernels.dense_block_apply(**contiguous, y=y)
    kernels.dense_block_apply(**norm, y=its)
    assert torch.equal(y, its)
    grad, total = like(norm["buffer"], 12), like(norm["buffer"], 16)
    plain = total.contiguous()
    flags = {"training": True, "first": False}
    mine = kernels.dense_block_accumulate(grad.contiguous(), **contiguous, grad_sum=plain, **flags)
    its = kernels.dense_block_accumulate(grad, **norm, grad_sum=total, **flags)
    assert torch.equal(plain, total) and all(map(torch.equal, mine, its))


def nan_and_zero() -> None:
    """NaN comes out of the ReLU and lets gradients pass; 0 does not."""
    norm = case(torch.float32, 3, 3, (1, 1, 4))
    norm["buffer"].zero_()
    norm |= {"mean": torch.zeros(3), "bias": torch.tensor([torch.nan, 0.0, -0.0])}
    y = like(norm["buffer"], 3)
    kernels.dense_block_apply(**norm, y=y)
    assert y[:, 0].isnan().all() and (y[:, 1:] == 0).all()
    total = torch.empty_like(y)
    flags = {"training": True, "first": True}
    sums = kernels.dense_block_accumulate(torch.ones_like(y), **norm, grad_sum=total, **flags)
    assert sums[0].tolist() == [4, 0, 0] and total.sum((0, 2, 3))[1:].tolist() == [0, 0]


def empty() -> None:
    buffer, vector = torch.empty(0, 6, 3, 3), torch.ones(4)
    y = torch.empty(0, 4, 3, 3)
    kernels.dense_block_apply(buffer, vector, vector, vector, vector, y)
    vectors = (vector,) * 4
    sums = kernels.dense_block_accumulate(y, buffer, *vectors, buffer, True, True)
    assert all(torch.equal(t, torch.zeros(4)) for t in sums)
    assert kernels.dense_block_gradient(None, buffer, buffer, *vectors, 1, 5).shape == y.shape
    kernels.dense_block_update_running(vector, vector, 1, [], [], [])


def operators() -> None:
    """opcheck: schema, autograd registration, fake kernel, AOT dispatch."""
    ops: Any = torch.ops.resops_triton
    norm = case(torch.float32, 12, 16)
    tensors, buffer = tuple(norm.values()), norm["buffer"]
    vectors = [norm["mean"][:4].clone()] * 4
    running = [[torch.rand(n) for n in (12, 5)] for _ in range(2)]
    for phase, arguments in {
        "apply": (*tensors, like(buffer, 12)),
        "accumulate": (like(buffer, 12), *tensors, like(buffer, 16), True, False),
        "gradient": (like(buffer, 16), buffer, like(buffer, 16), *vectors, 2, 6),
        "update_running": (norm["mean"], norm["invstd"], 60, *running, [0.1, 0.2]),
    }.items():
        result = torch.library.opcheck(getattr(ops, f"dense_block_{phase}").default, arguments)
        assert len(result) == 4 and all(v == "SUCCESS" for v in result.values()), result


def refused() -> None:
    norm = case(torch.float32, 12, 16)
    buffer = norm["buffer"]
    y, total = like(buffer, 12), like(buffer, 16)
    good = {"grad_y": y, **norm, "grad_sum": total, "training": True, "first": True}
    for change, message in (
        ({"buffer": buffer[0]}, r"\(N, C, H, W\)"),
        ({"buffer": buffer.double()}, "not implemented for torch.float64"),
        ({"mean": torch.zeros(17)}, "at most the 16 channels"),
        ({"invstd": norm["invstd"][:5]}, r"invstd should be torch.float32 of size \[12\]"),
        ({"weight": norm["weight"].half()}, "weight should be torch.float32"),
        ({"grad_y": y[:2]}, "grad_y should be"),
        ({"grad_sum": total[:, :5]}, "grad_sum should be"),
        ({"grad_sum": total.double()}, "grad_sum should be"),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=message):
            kernels.dense_block_accumulate(**{**good, **change})
    with pytest.raises(ValueError, match="y should be"):
        kernels.dense_block_apply(**norm, y=total)
    vectors = (norm["mean"],) * 4
    for args, message in (
        ((None, buffer, total, *vectors, 8, 17), "should lie in the buffer"),
        ((y, buffer, total, *vectors, 0, 12), "grad_y should be"),
        ((None, buffer, None, *vectors, 0, 12), "given together"),
        ((None, buffer, total, *vectors, 0, 5), r"of size \[5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.dense_block_gradient(*args)
    update = (norm["mean"], norm["invstd"], 60)
    for lists, message in (
        (([torch.ones(3)], [torch.ones(3)], [0.1, 0.1]), "as many, but got 1, 1 and 2"),
        (([torch.ones(13)], [torch.ones(13)], [0.1]), "running_means should be"),
        (([torch.ones(3)], [torch.ones(4)], [0.1]), "running_vars should be"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.dense_block_update_running(*update, *lists)


CALLS: dict[str, Callable[[], None]] = {
    call.__name__: call
    for call in (any_number_of_programs, other_layouts, nan_and_zero, empty, operators, refused)
}
for name in DTYPES:
    dtype = getattr(torch, name)
    if name in ROUNDED:
        CALLS[f"many_consumers-{name}"] = functools.partial(many_consumers, dtype)
    CALLS[f"running_statistics-{name}"] = functools.partial(
        assert_running_statistics, kernels, dtype
    )
    for channels in CHANNELS:
        CALLS[f"definition-{name}-{channels}"] = functools.partial(definition, dtype, channels)
assert set(CALLS) == set(NAMES)
