"""The phases of dense_block: rule R consumer by consumer, instruction sets, layouts, bad calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resops.reference import dense_block as reference
from tests.accuracy import Exact, assert_rule_R

pytestmark = pytest.mark.usefixtures("native", "one_thread")

F64 = torch.float64
NHWC = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPS = 1e-5
ops: Any = torch.ops.resops


def statistics_of(buffer: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(buffer.dtype, torch.float32)
    var, mean = torch.var_mean(buffer.double(), (0, 2, 3), correction=0)
    return mean.to(wide), torch.rsqrt(var + EPS).to(wide)


def case(
    dtype: torch.dtype, channels: int, total: int, size: tuple[int, int, int] = (3, 5, 4)
) -> dict[str, Tensor]:
    """A buffer whose channels have means, and a consumer of the first of them."""
    n, height, width = size
    offset = torch.linspace(-2, 3, total).view(1, -1, 1, 1)
    buffer = (torch.randn(n, total, height, width) + offset).to(dtype)
    buffer = buffer.contiguous(memory_format=NHWC)
    mean, invstd = statistics_of(buffer)
    return {
        "buffer": buffer,
        "weight": (torch.rand(channels) + 0.5).to(mean.dtype),
        "bias": torch.randn(channels).to(mean.dtype),
        "mean": mean[:channels].clone(),
        "invstd": invstd[:channels].clone(),
    }


def like(buffer: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Random, of the buffer's image size."""
    t = torch.randn(buffer.size(0), channels, *buffer.shape[2:]).to(dtype or buffer.dtype)
    return t.contiguous(memory_format=NHWC)


# ---- against the definition ---------------------------------------------------------------------


def guarded(t: Tensor) -> tuple[Tensor, Tensor]:
    """A copy between sentinels, and all of its memory."""
    stored = t.permute(0, 2, 3, 1).contiguous()
    memory = torch.full((stored.numel() + 128,), 7.0, dtype=t.dtype)
    inside = memory[64:-64].view(stored.shape).copy_(stored)
    return inside.permute(0, 3, 1, 2), memory


def assert_guards(memory: Tensor) -> None:
    assert (memory[:64] == 7).all() and (memory[-64:] == 7).all()


@pytest.mark.parametrize("channels", [1, 12, 32, 37, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_phases_are_the_definition(capability: str, dtype: torch.dtype, channels: int) -> None:
    """One rounding apart at most, and not a byte written beside."""
    norm = case(dtype, channels, 70)
    buffer = norm["buffer"]
    unit = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 32 * torch.finfo(norm["mean"].dtype).eps}
    (y, memory), its = guarded(like(buffer, channels)), like(buffer, channels)
    ops.dense_block_apply(**norm, y=y)
    reference.dense_block_apply(**norm, y=its)
    torch.testing.assert_close(y, its, **unit)
    assert_guards(memory)

    grad_y = like(buffer, channels)
    for training, first, wide in ((True, True, False), (True, False, True), (False, False, False)):
        total = like(buffer, 65, norm["mean"].dtype if wide else dtype)
        (mine, memory), its = guarded(total), total.clone(memory_format=torch.preserve_format)
        sums = ops.dense_block_accumulate(
            grad_y, **norm, grad_sum=mine, training=training, first=first
        )
        wanted = reference.dense_block_accumulate(
            grad_y, **norm, grad_sum=its, training=training, first=first
        )
        torch.testing.assert_close(mine, its, **unit)
        assert torch.equal(mine[:, channels:], total[:, channels:])
        assert_guards(memory)
        for a, b in zip(sums, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)

        vectors = [torch.randn_like(norm["mean"]) for _ in range(2)]
        known = (norm["mean"], norm["invstd"], *vectors)
        for outside in (like(buffer, 70), None):
            for given in (known, (None,) * 4):
                args = (outside, buffer, mine, *given, 0, channels)
                torch.testing.assert_close(
                    ops.dense_block_gradient(*args), reference.dense_block_gradient(*args), **unit
                )


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
        found.append((y, total, *sums))
    assert all(map(torch.equal, *found))


# ---- rule R over many consumers -----------------------------------------------------------------


@pytest.mark.parametrize("consumers", [25, 49])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("bias", [0.0, 1.0], ids=["zero-mean", "biased"])
def test_gradient_of_many_consumers(dtype: torch.dtype, consumers: int, bias: float) -> None:
    """Gradients of a channel that 25 or 49 norms read: rule R against autograd of PyTorch's ops,
    which add up one gradient after the other in the input's dtype."""
    channels, (n, height, width) = 5, (4, 4, 4)
    x = (torch.randn(n, channels, height, width) + 1).to(dtype).contiguous(memory_format=NHWC)
    weights = [torch.rand(channels) + 0.5 for _ in range(consumers)]
    biases = [torch.randn(channels) for _ in range(consumers)]
    grads = [(like(x, channels, torch.float32) + bias).to(dtype) for _ in range(consumers)]
    norms = list(zip(weights, biases, grads, strict=True))
    mean, invstd = statistics_of(x)

    total = torch.empty_like(x)
    means = torch.zeros(2, channels)
    ours = []
    for i, (weight, shift, grad) in enumerate(norms):
        sums = ops.dense_block_accumulate(grad, x, weight, shift, mean, invstd, total, True, i == 0)
        means += weight * torch.stack(sums) / (n * height * width)
        ours.append(sums)
    grad_x = ops.dense_block_gradient(None, x, total, mean, invstd, *means, 0, channels)

    leaf = x.clone().requires_grad_()
    pairs = [
        (w.clone().requires_grad_(), b.clone().requires_grad_())
        for w, b in zip(weights, biases, strict=True)
    ]
    ys = [F.batch_norm(leaf, None, None, *pair, True, 0.1, EPS).relu() for pair in pairs]
    torch.autograd.backward(ys, grads)
    assert leaf.grad is not None

    # The truth, and the sums of the absolute values of its terms.
    wide = x.double()
    centred = wide - wide.mean((0, 2, 3), keepdim=True)
    inverse = torch.rsqrt(centred.square().mean((0, 2, 3), keepdim=True) + EPS)
    xhat = centred * inverse
    value = torch.zeros_like(wide)
    terms = torch.zeros_like(wide)
    for i, (weight, shift, grad) in enumerate(norms):
        w, b = (t.double().view(1, -1, 1, 1) for t in (weight, shift))
        g = grad.double() * (w * xhat + b > 0)

        def average(t: Tensor) -> Tensor:
            return t.mean((0, 2, 3), keepdim=True)

        value += w * inverse * (g - average(g) - xhat * average(g * xhat))
        spread = g.abs() + average(g.abs()) + xhat.abs() * average((g * xhat).abs())
        terms += w.abs() * inverse * spread
        for mine, its, product in (
            (ours[i][0], pairs[i][1], g),
            (ours[i][1], pairs[i][0], g * xhat),
        ):
            exact = Exact(product.sum((0, 2, 3)).numpy(), product.abs().sum((0, 2, 3)).numpy(), 0)
            assert_rule_R("sum", mine, its.grad, exact, dtype, kappa(wide, inverse))
    exact = Exact(value.numpy(), terms.numpy())
    assert_rule_R("grad_x", grad_x, leaf.grad, exact, dtype, kappa(wide, inverse))


def kappa(x: Tensor, invstd: Tensor) -> Any:
    return np.asarray((x.abs().mean((0, 2, 3)) * invstd.flatten()).numpy())


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
