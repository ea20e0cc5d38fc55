"""Tests of the tests: rule R passes an honest kernel and fails each of the classical bugs.

The kernels here are toys in plain PyTorch, in float32 (the accumulation type) over the rounded
inputs; a bug is named by a flag.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.accuracy import Exact, assert_rule_R, measure
from tests.ops.batch_norm_oracle import BatchNormCase, Outputs, random_case


def toy(case: BatchNormCase, bug: str = "") -> Outputs:
    """An honest two-pass batch norm with relu or identity, or one with ``bug``."""
    x, low = case.x.float(), case.x.dtype
    dims, shape = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
    count = x.numel() // x.size(1)
    statistics_of = case.x if bug == "statistics in the input's dtype" else x
    mean = statistics_of.mean(dims)
    if bug == "n+1":
        mean = mean * (count / (count + 1))
    if bug == "one-pass variance":
        var = x.square().mean(dims) - mean.square()
    else:
        var = (statistics_of - mean.view(shape)).square().mean(dims)
    mean, var = mean.float(), var.float()
    if bug == "rounded mean":
        mean = mean.bfloat16().float()
    if bug == "eps outside the root":
        invstd = 1 / (var.sqrt() + case.eps)
    else:
        invstd = torch.rsqrt(var + case.eps)
    xhat = (x - mean.view(shape)) * invstd.view(shape)
    assert case.weight is not None and case.bias is not None
    z = xhat * case.weight.float().view(shape) + case.bias.float().view(shape)
    if case.residual is not None:
        z = z + case.residual.float()
    relu = case.activation == "relu"
    y = (z.relu() if relu else z).to(low)
    out: Outputs = {"y": y, "mean": mean, "invstd": invstd}

    m = case.momentum
    assert case.running_mean is not None and case.running_var is not None
    unbiased = var if bug == "biased running_var" else var * (count / (count - 1))
    if bug == "momentum of torch 0.1":
        m = 0.1
    out["running_mean"] = (1 - m) * case.running_mean.float() + m * mean
    out["running_var"] = (1 - m) * case.running_var.float() + m * unbiased

    assert case.grad_y is not None
    g = case.grad_y
    if bug == "gradient assumed contiguous":
        g = torch.as_strided(g, g.shape, torch.empty(g.shape).stride())
    g = g.float()
    if relu:
        kept = z if bug != "mask without the residual" else z - case.residual.float()  # type: ignore[union-attr]
        g = g * (kept > 0)
    out["grad_residual"] = g.to(low)
    sum_g, sum_g_xhat = g.sum(dims), (g * xhat).sum(dims)
    if bug == "1 % dscale":
        sum_g_xhat = sum_g_xhat * 1.01
    if bug == "one element of the sum skipped":
        sum_g = sum_g - g[0, :, -1, -1]
    out["grad_weight"], out["grad_bias"] = sum_g_xhat, sum_g
    grad_x = g - (sum_g / count).view(shape) - xhat * (sum_g_xhat / count).view(shape)
    if bug == "evaluation formula in training":
        grad_x = g
    out["grad_x"] = (grad_x * (invstd * case.weight.float()).view(shape)).to(low)
    if bug == "one wrong element":
        y[-1, -1, -1, -1] += 1e-5 * y.abs().max()
    return out


def make_case(dtype: torch.dtype, ratio: float, seed: int) -> BatchNormCase:
    """mean/std is ``ratio`` in channel 0, and falls to 0 in the others."""
    generator = torch.Generator().manual_seed(seed)
    shape = [(8, 6, 9, 7), (32, 3, 5, 5), (3, 4, 31, 33)][seed % 3]
    x = torch.randn(shape, generator=generator)
    x[:, 0] += ratio
    x[:, 1] += ratio / 10
    if seed % 2:
        x = x.contiguous(memory_format=torch.channels_last)
    case = random_case(
        x.to(dtype), seed=seed, residual=True, activation="relu" if seed % 4 < 2 else "identity"
    )
    if seed % 5 == 0:
        assert case.grad_y is not None
        case.grad_y = case.grad_y.transpose(2, 3).contiguous().transpose(2, 3)
    return case.with_decided_signs()


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.0, 3.0, 100.0, 1e4])
def test_rule_R_passes_an_honest_two_pass(dtype: torch.dtype, ratio: float) -> None:
    """With room to spare: the worst of many random cases stays below the limit."""
    worst = 0.0
    for seed in range(12):
        case = make_case(dtype, ratio, seed)
        figures = case.check(toy(case))
        worst = max(worst, *(f.share for f in figures.values()))
    assert worst < 0.8, worst
    assert worst > 0.01, "the limit is so far away that nothing would be seen"


# Each bug with the data that shows it. A bug that one dtype hides is looked for in another.
BUGS = {
    "one-pass variance": (torch.float32, 100.0),
    "statistics in the input's dtype": (torch.bfloat16, 3.0),
    "biased running_var": (torch.float32, 0.0),
    "rounded mean": (torch.float32, 3.0),
    "gradient assumed contiguous": (torch.float32, 0.0),
    "n+1": (torch.float32, 3.0),
    "eps outside the root": (torch.float32, 0.0),
    "momentum of torch 0.1": (torch.float32, 0.0),
    "1 % dscale": (torch.bfloat16, 0.0),
    "mask without the residual": (torch.bfloat16, 0.0),
    "evaluation formula in training": (torch.bfloat16, 0.0),
    "one element of the sum skipped": (torch.bfloat16, 0.0),
    "one wrong element": (torch.float32, 0.0),
}


@pytest.mark.parametrize("bug", BUGS)
def test_rule_R_fails_a_wrong_kernel(bug: str) -> None:
    dtype, ratio = BUGS[bug]
    case = make_case(dtype, ratio, seed=5)
    case.momentum, case.activation = 0.3, "relu"
    case = case.with_decided_signs()
    assert case.grad_y is not None and not case.grad_y.is_contiguous()
    case.check(toy(case))
    with pytest.raises(AssertionError, match="rule R broken"):
        case.check(toy(case, bug))


def test_a_channel_of_large_kappa_does_not_excuse_another() -> None:
    """kappa is the channel's own: an error that channel 0 may have is refused in channel 2."""
    case = make_case(torch.float32, 1e4, seed=0)
    ours = toy(case)
    allowed = 8 * 2.0**-24 * 1e4
    assert isinstance(ours["y"], Tensor)
    for channel, fails in ((0, False), (2, True)):
        y = ours["y"].clone()
        y[:, channel] += 0.2 * allowed * y[:, channel].abs()
        if fails:
            with pytest.raises(AssertionError, match=f"channel {channel} "):
                case.check(ours | {"y": y})
        else:
            case.check(ours | {"y": y})


def test_nan_is_as_wrong_as_can_be() -> None:
    exact = Exact(torch.ones(4, 2).double().numpy(), torch.ones(4, 2).double().numpy())
    ours = torch.ones(4, 2)
    assert_rule_R("y", ours, ours, exact, torch.float32)
    ours[3, 1] = math.nan
    # A yardstick that is NaN as well is no excuse.
    with pytest.raises(AssertionError, match="channel 1"):
        assert_rule_R("y", ours, ours, exact, torch.float32)


def test_output_without_terms_must_be_exact() -> None:
    """weight = 0: grad_x has no terms, and anything but 0 is wrong."""
    zeros = torch.zeros(3, 2).double().numpy()
    assert measure("grad_x", torch.zeros(3, 2), None, Exact(zeros, zeros), torch.float32).share == 0
    with pytest.raises(AssertionError):
        assert_rule_R("grad_x", torch.full((3, 2), 1e-30), None, Exact(zeros, zeros), torch.float32)


def test_float64_is_judged_in_wider_arithmetic() -> None:
    """A float64 result that went through float32 is refused; an honest one passes."""
    case = random_case(torch.randn(4, 3, 5, 5, dtype=torch.float64) + 10)
    case.check({"y": case.torch_outputs()["y"]})
    y = case.torch_outputs()["y"]
    assert y is not None
    with pytest.raises(AssertionError):
        case.check({"y": y.float().double()})
