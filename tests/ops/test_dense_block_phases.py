"""The phases of dense_block: rule R consumer by consumer, instruction sets, layouts, bad calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resops.reference import dense_block as reference
from tests.ops.dense_block_phases_oracle import (
    assert_definition,
    assert_gradient_of_many_consumers,
    assert_narrow,
    assert_running_statistics,
    case,
    like,
)

pytestmark = pytest.mark.usefixtures("native", "one_thread")

F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FLAGS = {"training": True, "first": False, "of_weight": True}  # of narrow_backward
ops: Any = torch.ops.resops


# ---- against the definition ---------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 12, 32, 37, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_phases_are_the_definition(capability: str, dtype: torch.dtype, channels: int) -> None:
    assert_definition(ops, dtype, channels)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_running_statistics_of_all_consumers(dtype: torch.dtype) -> None:
    assert_running_statistics(ops, dtype)


@pytest.mark.parametrize(
    ("channels", "outputs", "size"),
    [(1, 16, (1, 1, 1)), (37, 48, (3, 5, 4)), (300, 32, (2, 15, 17)), (24, 128, (1, 45, 45))],
    ids=str,
)
def test_one_kernel_with_the_convolution(
    capability: str, channels: int, outputs: int, size: tuple[int, int, int]
) -> None:
    assert_narrow(ops, channels, outputs, size)


def test_slice_in_the_middle() -> None:
    norm = case(torch.float32, 20, 40)
    outside, total = like(norm["buffer"], 40), like(norm["buffer"], 30)
    vectors = [
        v[:7].contiguous() for v in (norm["mean"], norm["invstd"], norm["bias"], norm["weight"])
    ]
    for args in (
        (outside, norm["buffer"], total, *vectors, 13, 20),
        (outside, norm["buffer"], None, None, None, None, None, 30, 40),
        (None, norm["buffer"], None, None, None, None, None, 30, 40),
    ):
        mine, its = ops.dense_block_gradient(*args), reference.dense_block_gradient(*args)
        torch.testing.assert_close(mine, its)


def test_other_layouts_are_written_too() -> None:
    norm = case(torch.float32, 12, 16)
    contiguous = {**norm, "buffer": norm["buffer"].contiguous()}
    y, its = like(norm["buffer"], 12).contiguous(), like(norm["buffer"], 12)
    ops.dense_block_apply(**contiguous, y=y)
    ops.dense_block_apply(**norm, y=its)
    assert torch.equal(y, its)
    grad = like(norm["buffer"], 12)
    sums = like(norm["buffer"], 16)
    plain = sums.contiguous()
    mine = ops.dense_block_accumulate(
        grad.contiguous(), **contiguous, grad_sum=plain, training=True, first=False
    )
    its = ops.dense_block_accumulate(grad, **norm, grad_sum=sums, training=True, first=False)
    assert torch.equal(plain, sums) and all(map(torch.equal, mine, its))


def test_nan_and_zero_at_the_relu() -> None:
    """NaN comes out of the ReLU and lets gradients pass; 0 does not."""
    norm = case(torch.float32, 3, 3, (1, 1, 4))
    norm["buffer"].zero_()
    norm |= {"mean": torch.zeros(3), "bias": torch.tensor([torch.nan, 0.0, -0.0])}
    y = like(norm["buffer"], 3)
    ops.dense_block_apply(**norm, y=y)
    assert y[:, 0].isnan().all() and (y[:, 1:] == 0).all()
    grad, total = torch.ones_like(y), torch.empty_like(y)
    sum_grad, _ = ops.dense_block_accumulate(
        grad, **norm, grad_sum=total, training=True, first=True
    )
    assert sum_grad.tolist() == [4, 0, 0]


@pytest.mark.parametrize("channels", [24, 37])
def test_same_bits_for_any_number_of_threads(channels: int) -> None:
    norm = case(torch.float32, channels, 64, (4, 40, 40))
    grad = like(norm["buffer"], channels)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        total, y = like(norm["buffer"], 64).zero_(), torch.empty_like(grad)
        ops.dense_block_apply(**norm, y=y)
        sums = ops.dense_block_accumulate(grad, **norm, grad_sum=total, training=True, first=False)
        conv_weight = torch.linspace(-1, 1, 32 * channels).view(32, channels, 1, 1)
        c = ops.dense_block_narrow_forward(**norm, conv_weight=conv_weight)
        narrow = ops.dense_block_narrow_backward(c, conv_weight, **norm, grad_sum=total, **FLAGS)
        found.append((y, total, *sums, c, *narrow))
    assert all(map(torch.equal, *found))


def test_empty_batch_with_the_convolution() -> None:
    norm = case(torch.float32, 5, 8)
    norm["buffer"] = norm["buffer"][:0]
    weight, total = torch.ones(16, 5, 1, 1), norm["buffer"].clone()
    c = ops.dense_block_narrow_forward(**norm, conv_weight=weight)
    assert c.shape == (0, 16, 5, 4)
    found = ops.dense_block_narrow_backward(c, weight, **norm, grad_sum=total, **FLAGS)
    assert [t.shape for t in found] == [(5,), (5,), (16, 5, 1, 1)]
    assert not any(t.any() for t in found)


# ---- rule R over many consumers -----------------------------------------------------------------


@pytest.mark.parametrize("consumers", [25, 49])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("bias", [0.0, 1.0], ids=["zero-mean", "biased"])
def test_gradient_of_many_consumers(dtype: torch.dtype, consumers: int, bias: float) -> None:
    assert_gradient_of_many_consumers(ops, dtype, consumers, bias)


# ---- registered as they should be ---------------------------------------------------------------


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        norm = case(dtype, 12, 16)
        tensors = tuple(norm.values())
        grad, total = like(norm["buffer"], 12), like(norm["buffer"], 16)
        torch.library.opcheck(ops.dense_block_apply.default, (*tensors, like(norm["buffer"], 12)))
        for wide in (total, total.float()):
            call = (grad, *tensors, wide, True, False)
            torch.library.opcheck(ops.dense_block_accumulate.default, call)
        vectors = [norm[name][:4].clone() for name in ("mean", "invstd", "mean", "mean")]
        for given in (vectors, [None] * 4):
            call = (like(norm["buffer"], 16), norm["buffer"], total, *given, 0, 4)
            torch.library.opcheck(ops.dense_block_gradient.default, call)
        if dtype == torch.float32:
            weight, grad_c = torch.randn(16, 12, 1, 1), like(norm["buffer"], 16)
            torch.library.opcheck(ops.dense_block_narrow_forward.default, (*tensors, weight))
            for of_weight in (True, False):
                call = (grad_c, weight, *tensors, total, True, False, of_weight)
                torch.library.opcheck(ops.dense_block_narrow_backward.default, call)
        running = [[torch.rand(n) for n in (12, 5)] for _ in range(2)]
        call = (norm["mean"], norm["invstd"], 60, *running, [0.1, 0.2])
        torch.library.opcheck(ops.dense_block_update_running.default, call)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_calls_raise(device: str) -> None:
    """From C++ and from the fake kernels, before a pointer is read."""
    norm = {name: t.to(device) for name, t in case(torch.float32, 12, 16).items()}
    buffer = norm["buffer"]
    y, total = (torch.zeros(3, c, 5, 4, device=device) for c in (12, 16))
    good = {"grad_y": y, **norm, "grad_sum": total, "training": True, "first": True}
    for change, message in (
        ({"buffer": buffer[0]}, r"\(N, C, H, W\)"),
        ({"mean": torch.zeros(17, device=device)}, "at most the 16 channels"),
        ({"invstd": norm["invstd"][:5]}, "invstd should contain 12 elements not 5"),
        ({"mean": norm["mean"].double()}, "mean should have dtype"),
        ({"weight": norm["weight"][:5]}, "weight should contain 12 elements not 5"),
        ({"grad_y": y[:2]}, "grad_y should have the batch and image size"),
        ({"grad_y": y[:, :5]}, "grad_y should have 12 channels"),
        ({"grad_y": y.double()}, "grad_y should have the dtype"),
        ({"grad_sum": total[:, :5]}, "grad_sum should have"),
        ({"grad_sum": total.double()}, "grad_sum should have the dtype"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.dense_block_accumulate(**{**good, **change})
    with pytest.raises(RuntimeError, match="y should have 12 channels"):
        ops.dense_block_apply(**norm, y=total)
    weight = torch.zeros(16, 12, 1, 1, device=device)
    narrow = {**good, "grad_c": torch.zeros(3, 16, 5, 4, device=device), "conv_weight": weight}
    del narrow["grad_y"]
    for change, message in (
        ({"conv_weight": weight[:8]}, "conv_weight should be of size"),
        ({"conv_weight": weight[:, :5]}, "conv_weight should be of size"),
        ({"conv_weight": weight.expand(16, 12, 3, 3)}, "conv_weight should be of size"),
        ({"conv_weight": weight.half()}, "expects float32"),
        ({"grad_c": y}, "grad_c should have 16 channels"),
        ({"grad_sum": total[:, :5]}, "grad_sum should have"),
        ({"invstd": norm["invstd"][:5]}, "invstd should contain 12 elements not 5"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.dense_block_narrow_backward(**{**narrow, **change}, of_weight=True)
    with pytest.raises(RuntimeError, match="conv_weight should be of size"):
        ops.dense_block_narrow_forward(**norm, conv_weight=weight[:8])
    vectors = (norm["mean"],) * 4
    for args, message in (
        ((None, buffer, total, *vectors, 8, 17), "should lie in the buffer"),
        ((None, buffer, total, *vectors, 8, 4), "should lie in the buffer"),
        ((y, buffer, total, *vectors, 0, 12), "grad_y should have 16 channels"),
        ((None, buffer, y, *vectors, 3, 15), "grad_sum should have"),
        ((None, buffer, None, *vectors, 0, 12), "given together"),
        ((None, buffer, total, vectors[0], None, None, None, 0, 12), "given together"),
        ((None, buffer, total, *vectors, 0, 5), "should contain 5 elements not 12"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.dense_block_gradient(*args)
    running = [torch.zeros(n, device=device) for n in (12, 5)]
    update: dict[str, Any] = {
        "mean": norm["mean"],
        "var": norm["invstd"],
        "count": 60,
        "running_means": running,
        "running_vars": running,
        "momenta": [0.1, 0.1],
    }
    halves = [running[0].half(), running[1].bfloat16()]
    for wrong, message in (
        ({"var": norm["invstd"][:5]}, "var should contain 12 elements not 5"),
        ({"mean": norm["mean"].half()}, "mean should have dtype"),
        ({"momenta": [0.1]}, "as many, but got 2, 2 and 1"),
        ({"running_vars": running[:1]}, "as many, but got 2, 1 and 2"),
        (
            {"running_means": [torch.zeros(13, device=device), running[1]]},
            "at most the 12 elements",
        ),
        ({"running_vars": [running[0], running[0]]}, "running_vars should contain 5 elements"),
        ({"running_means": halves}, "mixed dtype: expect running_means"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.dense_block_update_running(**{**update, **wrong})
    assert device == "meta" or not any(t.any() for t in running)
