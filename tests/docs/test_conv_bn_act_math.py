"""The formulas of docs/math/conv_bn_act.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .formulas import (
    ACTIVATIONS,
    EPS,
    act,
    assert_close,
    checks,
    derivative,
    grads,
    random,
    running,
)


class Convolution:
    """A convolution with groups, stride, dilation and padding, and a batch norm with statistics."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
        self.x = random(3, 4, 9, 8, seed=100)
        self.W = random(6, 2, 3, 2, seed=101)
        self.k = random(6, seed=102)
        self.w = random(6, seed=103)
        self.b = random(6, seed=104)
        self.mu = 2 * random(6, seed=105)
        self.var = 0.5 + random(6, seed=106) ** 2
        self.s = (self.var + EPS) ** -0.5

    def conv(self, x: Tensor, W: Tensor, k: Tensor | None = None) -> Tensor:
        return F.conv2d(x, W, k, **self.settings)

    def norm(self, c: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.batch_norm(c, self.mu, self.var, w, b, False, 0.0, EPS)


def column(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)


@checks("F1", "F2", "F3")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fold(activation: str) -> None:
    o = Convolution()
    c = o.conv(o.x, o.W, o.k)
    r = random(*c.shape, seed=107)
    expected = act(o.norm(c, o.w, o.b) + r, activation)

    def row(t: Tensor) -> Tensor:
        return t.view(1, -1, 1, 1)

    assert_close(act(row(o.w) * (c - row(o.mu)) * row(o.s) + row(o.b) + r, activation), expected)
    a = o.w * o.s
    folded_W, folded_k = column(a) * o.W, o.b + (o.k - o.mu) * a
    assert_close(act(o.conv(o.x, folded_W) + row(folded_k) + r, activation), expected)


def test_fold_of_a_transposed_convolution() -> None:
    o = Convolution()
    x, W = random(2, 4, 5, 5, seed=108), random(4, 3, 3, 3, seed=109)
    settings: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2}
    expected = o.norm(F.conv_transpose2d(x, W, o.k, **settings), o.w, o.b)
    a = o.w * o.s
    # W is (C_in, C / groups, *kernel): output channel 3 j + i belongs to group j of the inputs.
    scale = a.view(2, 1, 3).expand(2, 2, 3).reshape(4, 3, 1, 1)
    folded_k = o.b + (o.k - o.mu) * a
    assert_close(F.conv_transpose2d(x, W * scale, folded_k, **settings), expected)


@checks("F4")
def test_gradients_through_the_fold() -> None:
    o = Convolution()
    leaves = [t.requires_grad_() for t in (o.W, o.k, o.b, o.w)]
    y = F.silu(o.norm(o.conv(o.x, o.W, o.k), o.w, o.b))
    grad_y = random(*y.shape, seed=110)
    auto = grads(y, leaves, grad_y)
    with torch.no_grad():
        a = o.w * o.s
        folded_W, folded_k = column(a) * o.W, o.b + (o.k - o.mu) * a
    folded_W.requires_grad_()
    folded_k.requires_grad_()
    z = o.conv(o.x, folded_W, folded_k)
    grad_W, grad_k = grads(F.silu(z), (folded_W, folded_k), grad_y)
    with torch.no_grad():
        assert_close(column(a) * grad_W, auto[0])
        assert_close(a * grad_k, auto[1])
        assert_close(grad_k, auto[2])
        inner = (grad_W * o.W).sum((1, 2, 3))
        assert_close(o.s * (inner + (o.k - o.mu) * grad_k), auto[3])


@checks("F5")
def test_norm_before_the_convolution() -> None:
    x, W, k = (
        random(2, 3, 6, 6, seed=111),
        random(5, 3, 3, 3, seed=112),
        random(5, seed=113),
    )
    a, t = random(3, seed=114), random(3, seed=115)
    folded_W = W * a.view(1, 3, 1, 1)
    folded_k = k + (W * t.view(1, 3, 1, 1)).sum((1, 2, 3))
    normed = a.view(1, 3, 1, 1) * x + t.view(1, 3, 1, 1)
    assert_close(F.conv2d(x, folded_W, folded_k), F.conv2d(normed, W, k))
    wrong = F.conv2d(x, folded_W, folded_k, padding=1) - F.conv2d(normed, W, k, padding=1)
    assert wrong.abs().max() > 1e-2  # zero padding: not foldable at the border
    padded = (-t / a).view(1, 3, 1, 1).expand(2, 3, 8, 8).clone()
    padded[:, :, 1:-1, 1:-1] = x
    assert_close(F.conv2d(padded, folded_W, folded_k), F.conv2d(normed, W, k, padding=1))


@checks("F6")
@pytest.mark.parametrize(
    ("dtype", "u"),
    [(torch.float32, 2.0**-24), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)],
)
def test_rounding_of_the_fold(dtype: torch.dtype, u: float) -> None:
    o = Convolution()
    a = o.w * o.s
    W, k = column(a) * o.W, o.b + (o.k - o.mu) * a
    rounded = o.conv(o.x, W.to(dtype).double(), k.to(dtype).double())
    error = (rounded - o.conv(o.x, W, k)).abs()
    bound = u * o.conv(o.x.abs(), W.abs(), k.abs()) * (1 + 1e-9)  # float64 sums round as well
    assert (error <= bound).all()
    assert (error > 1e-3 * bound).any()


@checks("F7", "F8")
@pytest.mark.parametrize("training", [True, False])
def test_training_is_the_composition(training: bool) -> None:
    o = Convolution()
    o.x.requires_grad_()
    o.W.requires_grad_()
    o.k.requires_grad_()
    c = o.conv(o.x, o.W, o.k)
    mu = c.mean((0, 2, 3)) if training else o.mu
    var = c.var((0, 2, 3), unbiased=False) if training else o.var
    s = (var + EPS) ** -0.5

    def row(t: Tensor) -> Tensor:
        return t.detach().view(1, -1, 1, 1)

    grad_y = random(*c.shape, seed=116)
    given = (None, None) if training else (o.mu, o.var)
    z = F.batch_norm(c, given[0], given[1], o.w, o.b, training, 0.0, EPS)
    grad_x, grad_W, grad_k = grads(F.silu(z), (o.x, o.W, o.k), grad_y)
    with torch.no_grad():
        g = grad_y * derivative(z, "silu")
        xhat = (c - row(mu)) * row(s)
        grad_c = row(o.w) * row(s) * g
        if training:
            mean_g = g.mean((0, 2, 3))
            mean_gx = (g * xhat).mean((0, 2, 3))
            grad_c = row(o.w) * row(s) * (g - row(mean_g) - xhat * row(mean_gx))
        # The two transposes by their definition (F8): every dx, dW; here some that are dense and
        # some that are 0 but for one element.
        for seed in range(10):
            dx, dW = random(*o.x.shape, seed=200 + seed), random(*o.W.shape, seed=300 + seed)
            if seed > 2:
                dx, dW = (torch.where(t.abs() == t.abs().max(), t, 0.0) for t in (dx, dW))
            for transposed, direct in (
                ((grad_x * dx).sum(), grad_c * o.conv(dx, o.W)),
                ((grad_W * dW).sum(), grad_c * o.conv(o.x, dW)),
            ):
                assert_close(transposed, direct.sum(), scale=float(direct.abs().sum()))
        sums = grad_c.sum((0, 2, 3))
        assert_close(sums, grad_k, scale=float(grad_c.abs().sum()))
        if not training:
            assert_close(o.w * o.s * g.sum((0, 2, 3)), grad_k)


@checks("F9")
def test_convolution_bias_before_a_batch_norm() -> None:
    o = Convolution()
    o.k.requires_grad_()
    modules = [torch.nn.BatchNorm2d(6, eps=EPS, momentum=1.0).double() for _ in range(2)]
    y = modules[0](o.conv(o.x, o.W, o.k))
    y0 = modules[1](o.conv(o.x, o.W))
    grad_y = random(*y.shape, seed=117)
    (grad_k,) = grads(y, [o.k], grad_y)
    assert_close(grad_k, torch.zeros_like(grad_k), scale=float(grad_y.abs().sum()))
    assert_close(y, y0)
    (mu, var), (mu0, var0) = running(modules[0]), running(modules[1])
    assert_close(mu0 + o.k.detach(), mu)
    assert_close(var0, var)


@checks("F10")
def test_bound_on_every_partial_sum() -> None:
    o = Convolution()
    scale = o.w * o.s
    W, k = o.W * column(scale), o.b + (o.k - o.mu) * scale
    r = random(*o.conv(o.x, W).shape, seed=118)
    bound = o.x.abs().max() * W.abs().sum((1, 2, 3)) + k.abs() + r.abs().max()
    largest = (o.conv(o.x.abs(), W.abs(), k.abs()) + r.abs()).amax((0, 2, 3))
    assert (largest <= bound).all()
    # It is reached: an input of one size, everywhere with the sign of the weight it meets.
    x = o.x.abs().max() * W[:1].sign()
    alone = F.conv2d(x, W[:1]).squeeze() + k[0].abs() + r.abs().max()
    assert_close(alone, bound[0])


# What the page prints, for m = 4.
B_T = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
G = torch.tensor(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
)
G = G / 24
A_T = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    dtype=torch.float64,
)


@checks("F11", "F12", "F13")
def test_winograd() -> None:
    d, f, grad_y = random(6, 6, seed=130), random(3, 3, seed=131), random(4, 4, seed=132)
    y = A_T @ ((G @ f @ G.T) * (B_T @ d @ B_T.T)) @ A_T.T
    assert_close(y, F.conv2d(d[None, None], f[None, None])[0, 0])
    grad_f = G.T @ ((A_T.T @ grad_y @ A_T) * (B_T @ d @ B_T.T)) @ G
    assert_close(grad_f, F.conv2d(d[None, None], grad_y[None, None])[0, 0])
