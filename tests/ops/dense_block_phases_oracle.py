"""What every backend's phases of dense_block are held to: the definition, and rule R."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resops.reference import dense_block as reference
from tests.accuracy import Exact, assert_rule_R

NHWC = torch.channels_last
EPS = 1e-5


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


def guarded(t: Tensor) -> tuple[Tensor, Tensor]:
    """A copy between sentinels, and all of its memory."""
    stored = t.permute(0, 2, 3, 1).contiguous()
    memory = torch.full((stored.numel() + 128,), 7.0, dtype=t.dtype)
    inside = memory[64:-64].view(stored.shape).copy_(stored)
    return inside.permute(0, 3, 1, 2), memory


def assert_guards(memory: Tensor) -> None:
    assert (memory[:64] == 7).all() and (memory[-64:] == 7).all()


def assert_definition(ops: Any, dtype: torch.dtype, channels: int) -> None:
    """The phases of ``ops`` are those of the definition: one rounding apart at most, and not a byte
    written beside."""
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


def assert_gradient_of_many_consumers(
    ops: Any, dtype: torch.dtype, consumers: int, bias: float
) -> None:
    """Gradients of a channel that many norms read: rule R against autograd of PyTorch's ops, which
    add up one gradient after the other in the input's dtype."""
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


def assert_running_statistics(ops: Any, dtype: torch.dtype) -> None:
    """Those of several consumers, some strided, some of 16 bits; nothing is written beside them."""
    mean, var = torch.randn(40), torch.rand(40) + 0.5
    widths, momenta = (40, 8, 0, 17), [0.1, 1.0, 0.5, 0.25]
    wide = torch.float32 if dtype == torch.float32 else dtype
    memory = {
        name: [
            torch.full((2 * n,), math.nan, dtype=wide if i else torch.float32)
            for i, n in enumerate(widths)
        ]
        for name in ("means", "vars")
    }
    running = {name: [t[::2] for t in tensors] for name, tensors in memory.items()}
    for t in (*running["means"], *running["vars"]):
        t.copy_(torch.rand(t.numel()) + 0.5)
    exact = []
    for batch, tensors in ((mean, running["means"]), (var * 64 / 63, running["vars"])):
        for t, momentum in zip(tensors, momenta, strict=True):
            terms = [(1 - momentum) * t.double(), momentum * batch[: t.numel()].double()]
            total, absolute = terms[0] + terms[1], terms[0].abs() + terms[1].abs()
            exact.append(Exact(total.numpy(), absolute.numpy(), None))
    ops.dense_block_update_running(mean, var, 64, running["means"], running["vars"], momenta)
    for t, truth in zip((*running["means"], *running["vars"]), exact, strict=True):
        if t.numel() > 0:
            assert_rule_R("running", t, None, truth, t.dtype)
    for t in (*memory["means"], *memory["vars"]):
        assert t[1::2].isnan().all()


def assert_narrow(ops: Any, channels: int, outputs: int, size: tuple[int, int, int]) -> None:
    """The 1x1 convolution between the passes: rule R for all that comes out, against the phases one
    by one in PyTorch, and not a byte written beside."""
    norm = case(torch.float32, channels, channels + 9, size)
    buffer = norm["buffer"]
    conv_weight = torch.randn(outputs, channels, 1, 1) / math.sqrt(channels)
    grad_c = like(buffer, outputs) + 0.25
    grad_c = grad_c.contiguous(memory_format=NHWC)
    conditions = kappa(buffer[:, :channels].double(), norm["invstd"].double())
    x, w, b, m, s = (
        t.double() if t.dim() == 4 else t.double().view(1, -1, 1, 1)
        for t in (buffer[:, :channels], *(norm[k] for k in ("weight", "bias", "mean", "invstd")))
    )
    wide_weight, wide_grad = conv_weight.double(), grad_c.double()
    xhat = (x - m) * s
    # Where the argument of the ReLU is 0 but for rounding, either side is right.
    z = w * xhat + b
    assert (z.abs() > 1e-6).all()
    relu = z.clamp(min=0)

    c = ops.dense_block_narrow_forward(**norm, conv_weight=conv_weight)
    its = reference.dense_block_narrow_forward(**norm, conv_weight=conv_weight)
    bound = x.abs().add(m.abs()).mul(w.abs() * s).add(b.abs()).mul(z > 0)
    exact = Exact(F.conv2d(relu, wide_weight).numpy(), F.conv2d(bound, wide_weight.abs()).numpy())
    assert_rule_R("c", c, its, exact, torch.float32)

    for training, first, of_weight in (
        (True, True, True),
        (True, False, False),
        (False, False, True),
    ):
        start = like(buffer, channels + 3)
        (total, memory), its_total = (
            guarded(start),
            start.clone(memory_format=torch.preserve_format),
        )
        args = {"grad_c": grad_c, "conv_weight": conv_weight, **norm}
        flags = {"training": training, "first": first, "of_weight": of_weight}
        ours = ops.dense_block_narrow_backward(**args, grad_sum=total, **flags)
        theirs = reference.dense_block_narrow_backward(**args, grad_sum=its_total, **flags)
        assert_guards(memory)
        assert torch.equal(total[:, channels:], start[:, channels:])

        def through(grad: Tensor, weight: Tensor) -> Tensor:
            return torch.einsum("nohw,oc->nchw", grad, weight.flatten(1)) * (z > 0)

        g, terms = through(wide_grad, wide_weight), through(wide_grad.abs(), wide_weight.abs())
        factor = w if training else w * s
        before = torch.zeros_like(g) if first else start[:, :channels].double()
        exact = Exact((before + factor * g).numpy(), (before.abs() + factor.abs() * terms).numpy())
        mine, its = (t[:, :channels] for t in (total, its_total))
        assert_rule_R("grad_sum", mine, its, exact, torch.float32)
        for name, t, of_torch, product, absolute in (
            ("sum", ours[0], theirs[0], g, terms),
            ("sum_xhat", ours[1], theirs[1], g * xhat, terms * xhat.abs()),
        ):
            exact = Exact(product.sum((0, 2, 3)).numpy(), absolute.sum((0, 2, 3)).numpy(), 0)
            assert_rule_R(name, t, of_torch, exact, torch.float32, conditions)
        if not of_weight:
            assert ours[2].numel() == 0
            continue
        weights = [
            torch.einsum("nohw,nchw->oc", a, t).view_as(conv_weight).numpy()
            for a, t in ((wide_grad, relu), (wide_grad.abs(), bound))
        ]
        assert_rule_R("grad_weight", ours[2], theirs[2], Exact(*weights), torch.float32)
