"""The formulas of docs/math/batch_norm.md: definition, graph, closed form, second derivative."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .formulas import (
    ACTIVATIONS,
    EPS,
    SLOPE,
    act,
    assert_close,
    checks,
    curvature,
    derivative,
    grads,
    mean,
    random,
    total,
)


class Channels:
    """A batch in which every channel has its own mean, spread and parameters.

    Tensors are (C, M): a row is a channel, and the docs' sums and means are over dim 1.
    """

    def __init__(self, C: int = 4, M: int = 15) -> None:
        self.C, self.M = C, M
        spread = torch.tensor([0.03, 1.0, 4.0, 0.5], dtype=torch.float64).view(C, 1)
        offset = torch.tensor([2.0, -7.0, 0.3, 40.0], dtype=torch.float64).view(C, 1)
        self.x = offset + spread * random(C, M, seed=1)
        self.r = random(C, M, seed=2)
        self.w = random(C, 1, seed=3)
        self.b = random(C, 1, seed=4)
        self.grad_y = 0.5 + random(C, M, seed=5)
        for t in (self.x, self.r, self.w, self.b, self.grad_y):
            t.requires_grad_()

    def statistics(self) -> tuple[Tensor, Tensor]:
        return mean(self.x), self.x.var(1, unbiased=False, keepdim=True)

    def forward(self, activation: str, frozen: bool = False) -> Tensor:
        mu, var = self.statistics()
        if frozen:
            mu, var = 0.9 * mu.detach() + 0.2, 1.3 * var.detach()
        z = self.w * (self.x - mu) / torch.sqrt(var + EPS) + self.b + self.r
        return act(z, activation)

    def values(self, activation: str, frozen: bool = False) -> dict[str, Tensor]:
        """Detached x, r, w, b, grad_y and the docs' s, xhat, z, g."""
        with torch.no_grad():
            mu, var = self.statistics()
            if frozen:
                mu, var = 0.9 * mu + 0.2, 1.3 * var
            s = (var + EPS) ** -0.5
            xhat = (self.x - mu) * s
            z = self.w * xhat + self.b + self.r
            g = self.grad_y * derivative(z, activation)
        return {"mu": mu, "var": var, "s": s, "xhat": xhat, "z": z, "g": g} | {
            "x": self.x.detach(),
            "r": self.r.detach(),
            "w": self.w.detach(),
            "b": self.b.detach(),
            "grad_y": self.grad_y.detach(),
        }


@checks("B1", "B2", "B3", "B4", "B5")
@pytest.mark.parametrize("spatial", [(), (7,), (3, 5), (2, 3, 2)])
def test_definition_is_torchs(spatial: tuple[int, ...]) -> None:
    x = 3 + 2 * random(6, 4, *spatial, seed=0)
    w, b, residual = (
        random(4, seed=1),
        random(4, seed=2),
        random(6, 4, *spatial, seed=3),
    )
    M = x.numel() // 4
    dims = [0, *range(2, x.dim())]

    def row(t: Tensor) -> Tensor:
        return t.view(1, -1, *[1] * len(spatial))

    mu = x.sum(dims) / M  # B1
    var = ((x - row(mu)) ** 2).sum(dims) / M  # B2
    s = (var + EPS) ** -0.5  # B3
    xhat = (x - row(mu)) * row(s)  # B4
    z = row(w) * xhat + row(b) + residual  # B5
    expected = F.batch_norm(x, None, None, w, b, training=True, eps=EPS) + residual
    assert_close(z, expected)


@checks("B6", "B7")
def test_moments_of_xhat() -> None:
    v = Channels().values("identity")
    xhat, s, var = v["xhat"], v["s"], v["var"]
    assert_close(mean(xhat), torch.zeros_like(s), scale=40)
    assert_close(mean(xhat**2), var * s**2)
    assert_close(mean(xhat**2), 1 - EPS * s**2)
    assert (mean(xhat**2) < 1).all()


@checks("B8", "B9", "B10", "B11", "B12", "B13", "B14", "B15", "B16", "B17", "B18")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_staged_backward(activation: str) -> None:
    channels = Channels()
    x, r, w, b, grad_y = channels.x, channels.r, channels.w, channels.b, channels.grad_y
    M = channels.M
    # Two names for each value that is used twice, so that autograd reports both gradients.
    x1, x2 = x * 1, x * 1
    mu = total(x2) / M  # f1
    d = x1 - mu  # f2
    d1, d2 = d * 1, d * 1
    e = d2**2  # f3
    var = total(e) / M  # f4
    tau = torch.sqrt(var + EPS)  # f5
    s = 1 / tau  # f6
    xhat = d1 * s  # f7
    h = w * xhat  # f8
    v = h + b  # f9
    z = v + r  # f10
    y = act(z, activation)  # f11
    nodes = {"z": z, "r": r, "v": v, "b": b, "h": h, "w": w, "xhat": xhat, "s": s, "d1": d1}
    nodes |= {
        "tau": tau,
        "var": var,
        "e": e,
        "d2": d2,
        "d": d,
        "x1": x1,
        "mu": mu,
        "x2": x2,
        "x": x,
    }
    auto = dict(zip(nodes, grads(y, nodes.values(), grad_y.detach()), strict=True))
    with torch.no_grad():
        g = grad_y * derivative(z, activation)
        assert_close(g, auto["z"])  # B8
        assert_close(g, auto["r"])  # B9
        assert_close(g, auto["v"])
        assert_close(total(g), auto["b"])  # B10
        assert_close(g, auto["h"])
        assert_close(total(g * xhat), auto["w"])  # B11
        grad_xhat = w * g
        assert_close(grad_xhat, auto["xhat"])
        grad_s = total(grad_xhat * d)  # B12
        grad_d1 = grad_xhat * s
        assert_close(grad_s, auto["s"])
        assert_close(grad_d1, auto["d1"])
        grad_tau = -grad_s / tau**2  # B13
        assert_close(grad_tau, auto["tau"])
        grad_var = grad_tau / (2 * tau)  # B14
        assert_close(grad_var, auto["var"])
        grad_e = (grad_var / M).expand_as(e)  # B15
        assert_close(grad_e, auto["e"])
        grad_d2 = 2 * d * grad_e  # B16
        assert_close(grad_d2, auto["d2"])
        grad_d = grad_d1 + grad_d2  # B17
        grad_mu = -total(grad_d)
        assert_close(grad_d, auto["d"])
        assert_close(grad_d, auto["x1"])
        assert_close(grad_mu, auto["mu"])
        grad_x2 = (grad_mu / M).expand_as(x)  # B18
        assert_close(grad_x2, auto["x2"])
        assert_close(grad_d + grad_x2, auto["x"])


def closed_form(w: Tensor, s: Tensor, g: Tensor, xhat: Tensor) -> Tensor:
    """(B21)"""
    return w * s * (g - mean(g) - xhat * mean(g * xhat))


@checks("B19", "B20")
def test_simplification() -> None:
    channels = Channels()
    x, M = channels.x, channels.M
    d = (x - mean(x)).detach().requires_grad_()
    d1, d2 = d * 1, d * 1
    var = mean(d2**2)
    s = (var + EPS) ** -0.5
    z = channels.w * d1 * s + channels.b + channels.r
    auto = grads(F.silu(z), (s, var, d2, d), channels.grad_y.detach())
    with torch.no_grad():
        w, xhat = channels.w, d * s
        g = channels.grad_y * derivative(z, "silu")
        grad_s = w / s * M * mean(g * xhat)
        assert_close(w / s * total(g * xhat), auto[0])
        assert_close(grad_s, auto[0])
        grad_var = -0.5 * s**3 * grad_s
        assert_close(grad_var, auto[1])
        assert_close(-0.5 * w * s**2 * M * mean(g * xhat), auto[1])
        assert_close(2 / M * xhat / s * grad_var, auto[2])
        assert_close(-w * s * xhat * mean(g * xhat), auto[2])
        assert_close(w * s * (g - xhat * mean(g * xhat)), auto[3])


@checks("B21", "B22", "B23")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_closed_form(activation: str) -> None:
    channels = Channels()
    (auto,) = grads(channels.forward(activation), [channels.x], channels.grad_y.detach())
    v = channels.values(activation)
    w, s, g, xhat, M = v["w"], v["s"], v["g"], v["xhat"], channels.M
    assert_close(closed_form(w, s, g, xhat), auto)
    assert_close(total(auto), torch.zeros_like(w), scale=float(auto.abs().sum(1).max()))  # B22
    expected = w * s * M * mean(g * xhat) * EPS * s**2  # B23
    assert_close(total(auto * xhat), expected, scale=float((auto * xhat).abs().sum(1).max()))


@checks("B29")
def test_three_coefficients() -> None:
    channels = Channels()
    inputs = [channels.x, channels.w]
    auto = grads(channels.forward("gelu"), inputs, channels.grad_y.detach())
    v = channels.values("gelu")
    w, s, g, d = v["w"], v["s"], v["g"], v["x"] - v["mu"]
    sum_g_xhat = s * total(g * d)
    assert_close(sum_g_xhat, auto[1])
    mean_g_xhat = sum_g_xhat / channels.M
    assert_close((w * s) * g - (w * s**2 * mean_g_xhat) * d - w * s * mean(g), auto[0])


def test_closed_form_is_a_symmetric_matrix() -> None:
    v = Channels(M=6).values("identity")
    xhat, M = v["xhat"], 6
    for c in range(4):
        row = xhat[c]
        P = torch.eye(M).double() - (torch.ones(M, M) + torch.outer(row, row)) / M
        ones = torch.ones(1, 1, dtype=torch.float64)
        g = v["g"][c : c + 1]
        assert_close((P @ g[0])[None], closed_form(ones, ones, g, row[None]))
        assert torch.equal(P, P.T)


@checks("B24")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_frozen(activation: str) -> None:
    channels = Channels()
    inputs = (channels.x, channels.w, channels.b, channels.r)
    auto = grads(channels.forward(activation, frozen=True), inputs, channels.grad_y.detach())
    v = channels.values(activation, frozen=True)
    g, xhat = v["g"], v["xhat"]
    for actual, expected in zip(
        (v["w"] * v["s"] * g, total(g * xhat), total(g), g), auto, strict=True
    ):
        assert_close(actual, expected)


@checks("B25", "B26", "B27", "B28")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    z = torch.linspace(-6, 6, 240, dtype=torch.float64, requires_grad=True)
    y = act(z, activation)
    (first,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    assert_close(derivative(z, activation), first)
    if activation in ("silu", "gelu"):
        (second,) = torch.autograd.grad(first.sum(), z)
        assert_close(curvature(z, activation), second)


def test_kink_and_nan_as_printed() -> None:
    z = torch.tensor([0.0, -0.0, math.nan], dtype=torch.float64)
    for activation, at_zero in (("relu", 0.0), ("leaky_relu", SLOPE)):
        at = derivative(z, activation)
        assert at.tolist() == [at_zero, at_zero, 1.0]
        leaf = z.clone().requires_grad_()
        y = act(leaf, activation)
        (auto,) = torch.autograd.grad(y.sum(), leaf)
        assert auto[:2].tolist() == [at_zero, at_zero]
        assert y[2].isnan()


def double_backward(
    channels: Channels, activation: str, frozen: bool
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Autograd's second derivative, and the cotangents p, q, v_w, v_b that went in."""
    inputs = (channels.x, channels.r, channels.w, channels.b)
    first = torch.autograd.grad(
        channels.forward(activation, frozen), inputs, channels.grad_y, create_graph=True
    )
    C, M = channels.C, channels.M
    arriving = {
        "p": 0.4 + random(C, M, seed=11),
        "q": random(C, M, seed=12),
        "v_w": random(C, 1, seed=13),
        "v_b": random(C, 1, seed=14),
    }
    scalar = sum((a * f).sum() for a, f in zip(arriving.values(), first, strict=True))
    assert isinstance(scalar, Tensor)
    second = torch.autograd.grad(scalar, (channels.grad_y, *inputs), allow_unused=True)
    everything = (channels.grad_y, *inputs)
    filled = [
        torch.zeros_like(t) if s is None else s for s, t in zip(second, everything, strict=True)
    ]
    return tuple(filled), arriving


@checks("B30", "B31", "B32", "B33", "B34", "B35", "B36", "B37", "B38")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivative(activation: str) -> None:
    channels = Channels()
    auto, a = double_backward(channels, activation, frozen=False)
    v = channels.values(activation)
    w, s, g, xhat, z, M = v["w"], v["s"], v["g"], v["xhat"], v["z"], channels.M
    p, q, v_w, v_b = a["p"], a["q"], a["v_w"], a["v_b"]
    G = w * s * (p - mean(p) - xhat * mean(p * xhat)) + v_w * xhat + v_b + q
    Q = mean(p * g) - mean(p) * mean(g) - mean(p * xhat) * mean(g * xhat)
    k = G * v["grad_y"] * curvature(z, activation)
    h = -w * s * (p * mean(g * xhat) + g * mean(p * xhat)) + v_w * g + w * k
    assert_close(derivative(z, activation) * G, auto[0])  # B34
    to_x = s * (h - mean(h) - xhat * mean(h * xhat)) - w * s**2 * Q * xhat  # B35
    assert_close(to_x, auto[1])
    assert_close(k, auto[2])  # B38
    assert_close(s * M * Q + total(k * xhat), auto[3])  # B36
    assert_close(total(k), auto[4])  # B37


@checks("B39", "B40")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivative_frozen(activation: str) -> None:
    channels = Channels()
    auto, a = double_backward(channels, activation, frozen=True)
    v = channels.values(activation, frozen=True)
    w, s, g, xhat, z = v["w"], v["s"], v["g"], v["xhat"], v["z"]
    G = w * s * a["p"] + a["v_w"] * xhat + a["v_b"] + a["q"]
    k = G * v["grad_y"] * curvature(z, activation)
    h = a["v_w"] * g + w * k
    assert_close(derivative(z, activation) * G, auto[0])
    assert_close(s * h, auto[1])
    assert_close(k, auto[2])
    assert_close(s * total(a["p"] * g) + total(k * xhat), auto[3])
    assert_close(total(k), auto[4])


# Wrong versions of the closed form, as one finds them in code; each must be told from the right
# one. Arguments: the values of Channels, M.
Wrong = Callable[[dict[str, Tensor], int], Tensor]


def _frozen_in_training(v: dict[str, Tensor], M: int) -> Tensor:
    return v["w"] * v["s"] * v["g"]


def _mean_forgotten(v: dict[str, Tensor], M: int) -> Tensor:
    return v["w"] * v["s"] * (v["g"] - v["xhat"] * mean(v["g"] * v["xhat"]))


def _projection_forgotten(v: dict[str, Tensor], M: int) -> Tensor:
    return v["w"] * v["s"] * (v["g"] - mean(v["g"]))


def _divided_by_M_minus_1(v: dict[str, Tensor], M: int) -> Tensor:
    removed = total(v["g"]) + v["xhat"] * total(v["g"] * v["xhat"])
    return v["w"] * v["s"] * (v["g"] - removed / (M - 1))


def _eps_forgotten(v: dict[str, Tensor], M: int) -> Tensor:
    s = v["var"] ** -0.5
    return closed_form(v["w"], s, v["g"], (v["x"] - v["mu"]) * s)


def _eps_outside_the_root(v: dict[str, Tensor], M: int) -> Tensor:
    s = 1 / (v["var"] ** 0.5 + EPS)
    return closed_form(v["w"], s, v["g"], (v["x"] - v["mu"]) * s)


def _xhat_of_variance_1(v: dict[str, Tensor], M: int) -> Tensor:
    g, xhat = v["g"], v["xhat"]
    projected = xhat * mean(g * xhat) / mean(xhat**2)
    return v["w"] * v["s"] * (g - mean(g) - projected)


def _weight_forgotten(v: dict[str, Tensor], M: int) -> Tensor:
    return closed_form(torch.ones_like(v["w"]), v["s"], v["g"], v["xhat"])


def _sign_of_the_weight_lost(v: dict[str, Tensor], M: int) -> Tensor:
    return closed_form(v["w"].abs(), v["s"], v["g"], v["xhat"])


def _mask_without_the_residual(v: dict[str, Tensor], M: int) -> Tensor:
    g = v["grad_y"] * derivative(v["z"] - v["r"], "relu")
    return closed_form(v["w"], v["s"], g, v["xhat"])


@pytest.mark.parametrize(
    "wrong",
    [
        _frozen_in_training,
        _mean_forgotten,
        _projection_forgotten,
        _divided_by_M_minus_1,
        _eps_forgotten,
        _eps_outside_the_root,
        _xhat_of_variance_1,
        _weight_forgotten,
        _sign_of_the_weight_lost,
        _mask_without_the_residual,
    ],
)
def test_a_wrong_formula_is_noticed(wrong: Wrong) -> None:
    channels = Channels()
    (auto,) = grads(channels.forward("relu"), [channels.x], channels.grad_y.detach())
    v = channels.values("relu")
    assert_close(closed_form(v["w"], v["s"], v["g"], v["xhat"]), auto)
    with pytest.raises(AssertionError, match="error"):
        assert_close(wrong(v, channels.M), auto)
