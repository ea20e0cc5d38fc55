"""Rule R: how near to the truth the output of an op must be.

Two outputs of a floating-point op differ for good reasons, so none is compared with another.
Each is compared with the float64 value of the definition at the *rounded* inputs, in units that
rounding itself sets, and the yardstick is PyTorch's own op at the same device, dtype and layout:

    E(z) = ||z - z64|| / ||A||     A = sum of the absolute values of the terms of the output
    E(ours) <= K * E(torch) + F    K = 2, and 3 for 16-bit data
    max|ours - z64| / max A  <=  4 * (the same for torch) + 2 * F
    F = 2 * u(dtype of the output) + 8 * u(accumulation) * (1 + kappa)

- A, and not the output: sums such as grad_bias cancel, and rounding knows their terms only.
- u is the unit roundoff, half an epsilon; sums are accumulated in float32, in float64 for float64.
- kappa = mean|x| * invstd, the condition number of the centring x - mean. An honest two-pass at
  mean/std = 100 has three times the error of PyTorch's; the term pays for that and for no more:
  one-pass variance, with kappa squared, fails.
- The second line sees the one wrong element in a million that a norm hides.

Both lines are required of every channel with that channel's own kappa, which implies them for the
whole tensor with the largest: a channel that is hard to compute does not hide an error in another.
The error of torch in one channel can be small by luck, most of all in an output with one number
per channel; there the yardstick is its root mean square over the channels, in units of F.

Nothing here knows an op: an oracle (tests/ops/<op>_oracle.py) supplies value, terms and kappa.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.floating]

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# What a 16-bit result may lose by underflow, which no relative error covers: half a subnormal.
UNDERFLOW = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 2.0**-150}


@dataclass(frozen=True)
class Exact:
    """The exact value of an output, and the sum of the absolute values of its terms.

    Both have the output's shape; float64, or longdouble where the case itself is float64.
    ``channel_dim`` is the dimension along which kappa varies, None where kappa is one number.
    """

    value: Array
    terms: Array
    channel_dim: int | None = 1

    def __post_init__(self) -> None:
        assert self.value.shape == self.terms.shape
        assert not (self.terms < 0).any()


@dataclass(frozen=True)
class Figures:
    """What was measured, for the channel nearest to its limit. All errors are relative to A."""

    name: str
    ours: float
    torch: float
    limit: float
    max_ours: float
    max_torch: float
    max_limit: float
    channel: int

    @property
    def share(self) -> float:
        """How much of the allowed error was used: above 1 the rule is broken."""
        return max(_share(self.ours, self.limit), _share(self.max_ours, self.max_limit))

    def __str__(self) -> str:
        return (
            f"{self.name}: channel {self.channel} is at {self.share:.3g} of the limit; "
            f"L2 error {self.ours:.3g}, torch {self.torch:.3g}, limit {self.limit:.3g}; "
            f"max error {self.max_ours:.3g}, torch {self.max_torch:.3g}, "
            f"limit {self.max_limit:.3g}"
        )


def _share(error: float, limit: float) -> float:
    return error / limit if limit > 0 else (0.0 if error == 0 else np.inf)


def accumulation_unit(io_dtype: torch.dtype) -> float:
    return UNIT_ROUNDOFF[torch.float64 if io_dtype == torch.float64 else torch.float32]


def exact_dtype(io_dtype: torch.dtype) -> type[np.floating]:
    """The type to compute the truth in: wide enough to judge outputs of ``io_dtype``."""
    return np.longdouble if io_dtype == torch.float64 else np.float64


def to_numpy(t: Tensor, io_dtype: torch.dtype) -> Array:
    return t.detach().cpu().double().numpy().astype(exact_dtype(io_dtype))


def _by_channel(a: Array, channel_dim: int | None) -> Array:
    """(C, elements of a channel)."""
    if channel_dim is None:
        return a.reshape(1, -1)
    return np.moveaxis(a, channel_dim, 0).reshape(a.shape[channel_dim], -1)


def _errors(difference: Array, terms: Array) -> tuple[Array, Array]:
    """Relative L2 and maximum error of every row; with no terms at all, nothing may differ."""
    pairs = (
        (np.sqrt((difference**2).sum(1)), np.sqrt((terms**2).sum(1))),
        (difference.max(1), terms.max(1)),
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        l2, largest = (
            np.where(scale > 0, error / scale, np.where(error > 0, np.inf, 0.0))
            for error, scale in pairs
        )
    return l2, largest


def measure(
    name: str,
    ours: Tensor,
    yardstick: Tensor | None,
    exact: Exact,
    io_dtype: torch.dtype,
    kappa: float | Array = 0.0,
) -> Figures:
    """The figures of rule R for one output, for its worst channel.

    Args:
        yardstick: the same output of PyTorch's own op; None holds ours to F alone.
        io_dtype: the dtype of the op's data, which sets K and the accumulation.
        kappa: (C,) along ``exact.channel_dim``, or one number.
    """
    assert tuple(ours.shape) == exact.value.shape, f"{name}: {ours.shape} {exact.value.shape}"
    nothing = Figures(name, 0.0, 0.0, np.inf, 0.0, 0.0, np.inf, 0)
    if ours.numel() == 0:
        return nothing
    terms = _by_channel(exact.terms, exact.channel_dim)
    value = _by_channel(exact.value, exact.channel_dim)
    assert np.isfinite(value).all() and np.isfinite(terms).all(), f"{name}: no exact value"

    floor = 2 * UNIT_ROUNDOFF[ours.dtype] + 8 * accumulation_unit(io_dtype) * (
        1 + np.broadcast_to(np.asarray(kappa, dtype=value.dtype), (len(value),))
    )
    tiny = UNDERFLOW.get(ours.dtype, 0.0)

    def errors(t: Tensor) -> tuple[Array, Array]:
        got = _by_channel(to_numpy(t, io_dtype), exact.channel_dim)
        return _errors(np.maximum(np.abs(got - value) - tiny, 0.0), terms)

    ours_l2, ours_max = errors(ours)
    torch_l2 = torch_max = np.zeros_like(floor)
    if yardstick is not None:
        assert yardstick.shape == ours.shape, f"{name}: {ours.shape}, torch {yardstick.shape}"
        # A channel in which torch itself fails is no excuse.
        torch_l2, torch_max = (np.where(np.isfinite(e), e, 0.0) for e in errors(yardstick))

    def typical(error: Array) -> Array:
        return np.maximum(error, np.sqrt(((error / floor) ** 2).mean()) * floor)

    factor = 3.0 if io_dtype in (torch.float16, torch.bfloat16) else 2.0
    limit = factor * typical(torch_l2) + floor
    max_limit = 4 * typical(torch_max) + 2 * floor
    # A NaN of ours is as wrong as can be.
    used = np.nan_to_num(np.maximum(ours_l2 / limit, ours_max / max_limit), nan=np.inf)
    c = int(used.argmax())

    def number(a: Array) -> float:
        return float(np.nan_to_num(a[c], nan=np.inf))

    return Figures(
        name,
        number(ours_l2),
        number(torch_l2),
        number(limit),
        number(ours_max),
        number(torch_max),
        number(max_limit),
        c,
    )


def assert_rule_R(
    name: str,
    ours: Tensor,
    yardstick: Tensor | None,
    exact: Exact,
    io_dtype: torch.dtype,
    kappa: float | Array = 0.0,
) -> Figures:
    """:func:`measure`, and AssertionError where the output is further from the truth than allowed.

    Returns:
        the figures, so that a test can require more, or print them.
    """
    figures = measure(name, ours, yardstick, exact, io_dtype, kappa)
    assert figures.share <= 1, f"rule R broken: {figures}"
    return figures


def assert_rule_R_all(
    ours: Mapping[str, Tensor | None],
    yardstick: Mapping[str, Tensor | None],
    exact: Mapping[str, Exact],
    io_dtype: torch.dtype,
    kappa: float | Array = 0.0,
    context: str = "",
) -> dict[str, Figures]:
    """Rule R for every output that ``ours`` has; each of them must have an exact value.

    All broken outputs are reported together.
    """
    measured = {
        name: measure(name, t, yardstick.get(name), exact[name], io_dtype, kappa)
        for name, t in ours.items()
        if t is not None
    }
    broken = [str(f) for f in measured.values() if not f.share <= 1]
    assert not broken, f"rule R broken {context}\n" + "\n".join(broken)
    return measured
