"""The oracle of conv_bn_act's phases: a case, its exact outputs with their terms, for any backend.

    z = scale * x + shift     p = act(z)     c = conv(p, weight) + bias [+ residual]     y = act(c)
    g = (conv_transposed(grad_y, weight) [+ addend]) * act'(z)       sum(g)      sum(g * xhat)
    grad_weight = corr(p, grad_y)

The sums of the absolute values of the terms, A_q (rule R, accuracy.py):

    A_p = |scale x| + |shift|          A_y = conv(A_p, |weight|) + |bias| + |residual|
    A_g = (conv_transposed(|grad_y|, |weight|) + |addend|) * D
    A_grad_weight = corr(A_p, |grad_y|)

where D is |act'(z)|, and for silu and gelu, whose derivative carries the rounding error of z,
|act'(z)| + A_p. Statistics and sums are those of the values that were returned, and are held to
those: A_mean = mean|y|, A_var = var, A_sum = sum|g|, A_sum_xhat = sum|g xhat|.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resops.reference import conv_bn_act as reference
from resops.reference.activation import activation_derivative
from resops.reference.batch_norm import batch_norm_statistics
from tests.accuracy import Array, Exact, assert_rule_R_all

SMOOTH = ("silu", "gelu")


@dataclass
class ConvCase:
    """The arguments of the three phases of one convolution; x is the concatenated ``inputs``."""

    inputs: list[Tensor]
    conv_weight: Tensor
    grad_y: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    prologue: str = "identity"
    conv_bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "identity"
    statistics: bool = False
    addend: Tensor | None = None
    mean: Tensor | None = None
    invstd: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    slope: float = 0.3

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype

    @property
    def x(self) -> Tensor:
        return self.inputs[0] if len(self.inputs) == 1 else torch.cat(self.inputs, 1)

    def geometry(self) -> tuple[list[int], ...]:
        return list(self.stride), list(self.padding), list(self.dilation)

    def before(self) -> tuple[Any, ...]:
        return self.scale, self.shift, self.prologue, self.slope

    def forward(self, phases: Any) -> dict[str, Tensor]:
        y, mean, var = phases.conv_bn_act_forward(
            self.inputs,
            *self.before(),
            self.conv_weight,
            self.conv_bias,
            self.residual,
            self.activation,
            self.slope,
            *self.geometry(),
            self.statistics,
        )
        return {"y": y, "mean": mean, "var": var}

    def backward_data(self, phases: Any) -> dict[str, Tensor]:
        x = self.x if self.scale is not None else None
        g, sum_g, sum_g_xhat = phases.conv_bn_act_backward_data(
            self.grad_y,
            self.conv_weight,
            list(self.x.shape),
            x,
            *self.before(),
            self.mean,
            self.invstd,
            self.addend,
            *self.geometry(),
        )
        return {"g": g, "sum_g": sum_g, "sum_g_xhat": sum_g_xhat}

    def backward_weight(self, phases: Any) -> dict[str, Tensor]:
        grad = phases.conv_bn_act_backward_weight(
            self.grad_y,
            self.inputs,
            *self.before(),
            list(self.conv_weight.shape),
            *self.geometry(),
        )
        return {"grad_weight": grad}

    def run(self, phases: Any) -> dict[str, Tensor]:
        """All outputs of all phases."""
        return self.forward(phases) | self.backward_data(phases) | self.backward_weight(phases)

    def wide(self) -> ConvCase:
        """The same case in float64."""
        changed: dict[str, Any] = {
            name: value.double() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, inputs=[t.double() for t in self.inputs], **changed)

    def _terms(self) -> dict[str, Tensor]:
        """A_y, A_g and A_grad_weight."""
        case = self.wide()
        prologue_terms, derivative = case.x.abs(), None
        if case.scale is not None and case.shift is not None:
            scale, shift = (t[:, None, None] for t in (case.scale, case.shift))
            z = scale * case.x + shift
            prologue_terms = (scale * case.x).abs() + shift.abs()
            derivative = activation_derivative(z, None, case.prologue, case.slope)
        plain: dict[str, Any] = {
            name: None if t is None else t.abs()
            for name, t in (
                ("conv_weight", case.conv_weight),
                ("grad_y", case.grad_y),
                ("conv_bias", case.conv_bias),
                ("residual", case.residual),
                ("addend", case.addend),
            )
        }
        plain |= {"activation": "identity", "prologue": "identity", "statistics": False}
        plain |= dict.fromkeys(("scale", "shift", "mean", "invstd"))
        terms = replace(case, inputs=[prologue_terms], **plain).run(reference)
        if derivative is not None:
            extra = prologue_terms if case.prologue in SMOOTH else 0.0
            terms["g"] = terms["g"] * (derivative.abs() + extra)
        return terms

    def check(self, ours: dict[str, Tensor]) -> None:
        """Rule R for all that ``ours`` has; sizes and dtypes of the definition."""
        defined = self.run(reference)
        value, terms = self.wide().run(reference), self._terms()
        for name, t in ours.items():
            assert (t.shape, t.dtype) == (defined[name].shape, defined[name].dtype), name
        exact = {
            name: Exact(_array(value[name]), _array(terms[name]), dim)
            for name, dim in (("y", 1), ("g", 1), ("grad_weight", 0))
            if name in ours
        }
        found = {name: ours[name] for name in exact}
        assert_rule_R_all(found, defined, exact, self.dtype, context=self.describe())
        if self.statistics and "y" in ours:
            self._check_statistics(ours)
        if self.mean is not None and "g" in ours:
            self._check_sums(ours)

    def _check_statistics(self, ours: dict[str, Tensor]) -> None:
        y = ours["y"].double()
        wide = dict(zip(("mean", "var"), batch_norm_statistics(y), strict=True))
        narrow = dict(zip(("mean", "var"), batch_norm_statistics(ours["y"]), strict=True))
        magnitude = y.abs().mean((0, 2, 3))
        exact = {
            "mean": Exact(_array(wide["mean"]), _array(magnitude), 0),
            "var": Exact(_array(wide["var"]), _array(wide["var"]), 0),
        }
        kappa = _array(magnitude * torch.rsqrt(wide["var"] + 1e-30))
        found = {name: ours[name] for name in exact}
        assert_rule_R_all(found, narrow, exact, torch.float32, kappa, self.describe())

    def _check_sums(self, ours: dict[str, Tensor]) -> None:
        assert self.mean is not None and self.invstd is not None
        g, x = ours["g"].double(), self.x.double()
        mean, invstd = (t.double()[:, None, None] for t in (self.mean, self.invstd))
        products = {"sum_g": g, "sum_g_xhat": g * (x - mean) * invstd}
        exact = {
            name: Exact(_array(t.sum((0, 2, 3))), _array(t.abs().sum((0, 2, 3))), 0)
            for name, t in products.items()
        }
        found = {name: ours[name] for name in exact}
        kappa = _array((x.abs().mean((0, 2, 3)) + self.mean.double().abs()) * self.invstd.double())
        assert_rule_R_all(found, {}, exact, torch.float32, kappa, self.describe())

    def describe(self) -> str:
        return (
            f"{[list(t.shape) for t in self.inputs]} {self.dtype} weight "
            f"{list(self.conv_weight.shape)} stride {self.stride} padding {self.padding} dilation "
            f"{self.dilation} prologue {self.prologue} activation {self.activation}"
        )


def _array(t: Tensor) -> Array:
    return np.asarray(t.detach().double().numpy())


def random_case(
    size: tuple[int, int, int, int],
    filters: int,
    kernel: tuple[int, int] = (1, 1),
    dtype: torch.dtype = torch.float32,
    *,
    slices: tuple[int, ...] = (),
    prologue: str | None = None,
    bias: bool = False,
    residual: bool = False,
    addend: bool = False,
    **flags: Any,
) -> ConvCase:
    """Random data; with ``prologue`` (its activation) the sums of its batch norm are asked for.

    Args:
        size: of x, (N, C_in, H, W).
        slices: channels of every slice, C_in together; one slice if empty.
        flags: the other fields of :class:`ConvCase`.
    """
    C = size[1]
    x = (1.5 * torch.randn(size) + 0.5).to(dtype)
    weight = (torch.randn(filters, C, *kernel) / (C * kernel[0] * kernel[1]) ** 0.5).to(dtype)
    case = ConvCase(
        [t.contiguous() for t in x.split(slices or (C,), 1)], weight, x.new_empty(0), **flags
    )
    out = torch.nn.functional.conv2d(
        torch.empty(size, device="meta"),
        torch.empty(weight.shape, device="meta"),
        None,
        *(case.stride, case.padding, case.dilation),
    )
    case.grad_y = (torch.randn(out.shape) + 0.2).to(dtype)
    if prologue is not None:
        case.prologue = prologue
        case.scale, case.shift = torch.randn(C), torch.randn(C)
        case.mean, case.invstd = torch.randn(C), torch.rand(C) + 0.5
    if bias:
        case.conv_bias = torch.randn(filters)
    if residual:
        case.residual = torch.randn(out.shape).to(dtype)
    if addend:
        case.addend = torch.randn(size).to(dtype)
    return case
