"""The oracle of residual_add: a case, its exact outputs with their terms, and torch's own outputs.

    z = alpha * x + beta * residual      y = act(z)      g = grad_y * act'(z)
    grad_x = alpha * g      grad_residual = beta * g
    grad_alpha = R(g * x)   grad_beta = R(g * residual)     R: the sum over what the weight spans
    beta = 1 - alpha:       grad_alpha = R(g * (x - residual))

The sums of the absolute values of the terms (rule R): A_y = |alpha * x| + |beta * residual|;
A_g = |grad_y| (|act'(z)| + A_y |act''(z)|), since z carries a rounding error proportional to A_y;
those of the gradients are the same formulas in A_g and absolute values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resops.functional import residual_add
from tests.accuracy import (
    UNIT_ROUNDOFF,
    Array,
    Exact,
    Figures,
    accumulation_unit,
    assert_rule_R_all,
    exact_dtype,
    to_numpy,
)
from tests.dispatch import counted_calls, native_calls
from tests.ops.batch_norm_oracle import (
    PIECEWISE_LINEAR,
    SMOOTH,
    _activate,
    bits,
    dense,
    expected_strides,
    torch_activation,
)

Weight = float | Tensor
Outputs = dict[str, Tensor]

# Named pairs of weights: (alpha, beta). A name stands for a tensor of that kind.
WEIGHTINGS: dict[str, tuple[float | str, float | str]] = {
    "plain": (1.0, 1.0),
    "constants": (0.5**0.5, -0.3),
    "constant_complement": (0.3, "complement"),
    "scalar": ("scalar", 1.0),
    "scalars": ("scalar", "scalar"),
    "scalar_complement": ("scalar", "complement"),
    "per_sample": ("per_sample", 1.0),
    "per_samples": ("per_sample", "per_sample"),
    "per_sample_complement": ("per_sample", "complement"),
    "scalar_per_sample": ("scalar", "per_sample"),
    "gate": ("elementwise", 1.0),
    "carry": ("scalar", "elementwise"),
    "gates": ("elementwise", "elementwise"),
    "gate_per_sample": ("elementwise", "per_sample"),
    "gate_complement": ("elementwise", "complement"),
}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def kind_of(weight: Weight | str, x: Tensor) -> str:
    if not isinstance(weight, Tensor):
        return "constant"
    if weight.numel() == 1:
        return "scalar"
    if weight.numel() == x.size(0) and weight.shape[1:].numel() == 1:
        return "per_sample"
    assert weight.shape == x.shape
    return "elementwise"


@dataclass
class ResidualAddCase:
    """The arguments of one call and of its backward pass. x is (N, *)."""

    x: Tensor
    residual: Tensor
    alpha: Weight = 1.0
    beta: Weight | str = 1.0
    activation: str = "identity"
    negative_slope: float = 0.01
    grad_y: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        names = ("x", "residual", "alpha", "beta", "grad_y")
        return {n: t for n in names if isinstance(t := getattr(self, n), Tensor)}

    @property
    def complement(self) -> bool:
        return isinstance(self.beta, str)

    def _array(self, t: Tensor) -> Array:
        return to_numpy(t, self.x.dtype)

    def _weight(self, weight: Weight) -> Array:
        """``weight`` ready to be broadcast against x."""
        if not isinstance(weight, Tensor):
            return np.asarray(weight, dtype=exact_dtype(self.x.dtype))
        values = self._array(weight)
        if kind_of(weight, self.x) == "elementwise":
            return values
        return values.reshape(-1, *[1] * (self.x.dim() - 1))

    def _sum(self, weight: Weight | str, t: Array) -> Array:
        kind = kind_of(weight, self.x)
        assert isinstance(weight, Tensor)
        if kind == "elementwise":
            return t
        total = t.reshape(len(t), -1).sum(1) if kind == "per_sample" else t.sum()
        return total.reshape(weight.shape)

    def exact(self) -> dict[str, Exact]:
        x, r = self._array(self.x), self._array(self.residual)
        alpha = self._weight(self.alpha)
        beta = 1 - alpha if isinstance(self.beta, str) else self._weight(self.beta)
        z = alpha * x + beta * r
        z_terms = np.abs(alpha * x) + np.abs(beta * r)
        y, slope, curvature = _activate(z, self.activation, self.negative_slope)
        out = {"y": Exact(y, z_terms, None)}
        if self.grad_y is None:
            return out
        grad_y = self._array(self.grad_y)
        g = grad_y * slope
        g_terms = np.abs(grad_y) * (np.abs(slope) + np.abs(curvature) * z_terms)
        out["grad_x"] = Exact(alpha * g, np.abs(alpha) * g_terms, None)
        out["grad_residual"] = Exact(beta * g, np.abs(beta) * g_terms, None)
        factors = {"alpha": (x - r, np.abs(x) + np.abs(r)) if self.complement else (x, np.abs(x))}
        factors["beta"] = (r, np.abs(r))
        for name, (factor, terms) in factors.items():
            weight = getattr(self, name)
            if isinstance(weight, Tensor):
                out[f"grad_{name}"] = Exact(
                    self._sum(weight, g * factor),
                    self._sum(weight, g_terms * terms),
                    0 if kind_of(weight, self.x) == "per_sample" else None,
                )
        return out

    def torch_outputs(self) -> Outputs:
        """What PyTorch's own ops give, on dense copies of all data."""
        leaves = {
            name: dense(t).requires_grad_()
            for name, t in self.tensors().items()
            if name != "grad_y"
        }

        def weight(name: str) -> Any:
            value = leaves.get(name, getattr(self, name))
            if kind_of(value, self.x) in ("scalar", "per_sample"):
                return value.reshape(-1, *[1] * (self.x.dim() - 1))
            return value

        alpha = weight("alpha")
        beta = 1 - alpha if self.complement else weight("beta")
        z = alpha * leaves["x"] + beta * leaves["residual"]
        y = torch_activation(self.activation, self.negative_slope)(z).to(self.x.dtype)
        out = {"y": y.detach()}
        if self.grad_y is not None:
            y.backward(dense(self.grad_y))
            for name, leaf in leaves.items():
                assert leaf.grad is not None
                out[f"grad_{name}"] = leaf.grad
        return out

    def with_decided_signs(self) -> ResidualAddCase:
        """The same case with grad_y zero where the sign of z is within rounding of zero: the
        derivative of relu has a step there, and either side is right."""
        if self.grad_y is None or self.activation not in PIECEWISE_LINEAR:
            return self
        x, r = self._array(self.x), self._array(self.residual)
        alpha = self._weight(self.alpha)
        beta = 1 - alpha if isinstance(self.beta, str) else self._weight(self.beta)
        unit = 4 * UNIT_ROUNDOFF[self.x.dtype] + 16 * accumulation_unit(self.x.dtype)
        limit = unit * (np.abs(alpha * x) + np.abs(beta * r))
        undecided = torch.from_numpy(np.abs(alpha * x + beta * r) <= limit)
        grad_y = self.grad_y.masked_fill(undecided, 0)
        if 0 not in self.grad_y.stride():  # no element stands for several: keep the strides
            strided = torch.empty_strided(grad_y.shape, self.grad_y.stride(), dtype=grad_y.dtype)
            grad_y = strided.fill_(math.nan).copy_(grad_y)
        return replace(self, grad_y=grad_y)

    def check(self, ours: Outputs) -> dict[str, Figures]:
        """Rule R for every output in ``ours``."""
        return assert_rule_R_all(
            ours, self.torch_outputs(), self.exact(), self.x.dtype, context=self.describe()
        )

    def describe(self) -> str:
        return (
            f"[{tuple(self.x.shape)} strides {self.x.stride()} {self.x.dtype}, {self.activation}, "
            f"alpha {kind_of(self.alpha, self.x)}, "
            f"beta {self.beta if self.complement else kind_of(self.beta, self.x)}]"
        )


def random_case(
    x: Tensor,
    weighting: str = "plain",
    *,
    seed: int = 0,
    weight_dtype: torch.dtype | None = None,
    **fields: Any,
) -> ResidualAddCase:
    """A case with random residual, gradient and weights of both signs, in x's layout.

    Args:
        weight_dtype: of scalar and per-sample weights; float32 (float64 for float64).
        fields: further fields of :class:`ResidualAddCase`.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = weight_dtype or wide(x.dtype)

    def like_x() -> Tensor:
        return torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator).to(x.dtype))

    def weight(spec: float | str) -> Any:
        if spec == "scalar":
            return torch.randn(1, generator=generator).to(dtype)
        if spec == "per_sample":
            size = [x.size(0), *[1] * ((x.dim() - 1) * (seed % 2))]
            return torch.randn(size, generator=generator).to(dtype)
        return like_x() if spec == "elementwise" else spec

    alpha, beta = WEIGHTINGS[weighting]
    case = ResidualAddCase(x, like_x(), weight(alpha), weight(beta), grad_y=like_x())
    return replace(case, **fields).with_decided_signs()


def run_functional(case: ResidualAddCase, requires_grad: str = "x residual alpha beta") -> Outputs:
    """The public function, and autograd for the arguments that are named."""
    leaves = {
        name: t.detach().requires_grad_(name in requires_grad.split())
        for name, t in case.tensors().items()
    }
    y = residual_add(
        leaves["x"],
        leaves["residual"],
        leaves.get("alpha", case.alpha),
        leaves.get("beta", case.beta),
        activation=None if case.activation == "identity" else case.activation,
        negative_slope=case.negative_slope,
    )
    out = {"y": y.detach()}
    if case.grad_y is not None and y.requires_grad:
        y.backward(case.grad_y)
        out |= {f"grad_{k}": t.grad for k, t in leaves.items() if t.grad is not None}
    return out


def op_arguments(case: ResidualAddCase) -> dict[str, Any]:
    """The arguments of residual_add_forward, by name and in order."""
    alpha, beta = (w if isinstance(w, Tensor) else None for w in (case.alpha, case.beta))
    constant_complement = case.complement and alpha is None
    beta_value = case.beta if isinstance(case.beta, float) else 1.0
    return {
        "x": case.x,
        "residual": case.residual,
        "alpha": alpha,
        "beta": beta,
        "alpha_value": case.alpha if isinstance(case.alpha, float) else 1.0,
        "beta_value": 1 - case.alpha if constant_complement else beta_value,
        "complement": case.complement and not constant_complement,
        "activation": case.activation,
        "negative_slope": case.negative_slope,
    }


def run_ops(case: ResidualAddCase, ops: Any = None) -> Outputs:
    """The two registered ops of ``ops`` (default torch.ops.resops), with no more than they need.

    The definition, resops.reference.residual_add, has functions of the same names and signatures.
    """
    ops = torch.ops.resops if ops is None else ops
    arguments = op_arguments(case)
    y, mask = ops.residual_add_forward(*arguments.values())
    out = {"y": y, "mask": mask}
    if case.grad_y is None:
        return out
    wanted = [True, True, *(arguments[name] is not None for name in ("alpha", "beta"))]
    smooth = case.activation in SMOOTH
    need_residual = smooth or wanted[3] or (wanted[2] and case.complement)
    grads = ops.residual_add_backward(
        torch.empty_like(y).copy_(case.grad_y),
        case.x if smooth or wanted[2] else None,
        case.residual if need_residual else None,
        *list(arguments.values())[2:7],
        mask,
        case.activation,
        case.negative_slope,
        wanted,
    )
    names = ("grad_x", "grad_residual", "grad_alpha", "grad_beta")
    for name, grad, want in zip(names, grads, wanted, strict=True):
        if want:
            out[name] = grad
        else:
            assert grad.shape == (0,), name
    return out


def run_native(case: ResidualAddCase) -> Outputs:
    """All outputs of the public function, after checks that hold for every call:

    the native ops ran; the ops called directly give the same bits; no argument was written to;
    outputs have the sizes, dtypes and strides that they should have.
    """
    before = {name: bits(t) for name, t in case.tensors().items()}
    with counted_calls() as calls:
        out = run_functional(case)
    expected = {"residual_add_forward": 1}
    weightless = case.activation == "identity" and not (
        {"alpha", "beta"} & case.tensors().keys() or (case.alpha, case.beta) != (1.0, 1.0)
    )
    if case.grad_y is not None and not weightless:
        expected["residual_add_backward"] = 1
    assert native_calls(calls) == dict(sorted(expected.items())), calls
    direct = run_ops(case)
    for name, t in out.items():
        assert torch.equal(bits(t), bits(direct[name])), name
    for name, value in before.items():
        assert torch.equal(bits(getattr(case, name)), value), f"{name} was written to"
    assert_metadata(case, direct)
    return out


def assert_metadata(case: ResidualAddCase, out: Outputs) -> None:
    """Sizes, dtypes and strides of y, of the mask and of the gradients."""
    like_x = ["y", "grad_x", "grad_residual"]
    for name in ("alpha", "beta"):
        weight = getattr(case, name)
        if f"grad_{name}" in out and kind_of(weight, case.x) != "elementwise":
            grad = out[f"grad_{name}"]
            assert grad.dtype == weight.dtype and grad.shape == weight.shape, name
            assert grad.is_contiguous()
        else:
            like_x.append(f"grad_{name}")
    for name in like_x:
        if name in out:
            t = out[name]
            assert t.shape == case.x.shape and t.dtype == case.x.dtype, name
            strides = expected_strides(case.x) if case.x.dim() > 1 else (1,)
            assert t.stride() == strides, f"{name} of {case.describe()}"
    length = math.prod(case.x.shape[1:])
    masked = case.activation in PIECEWISE_LINEAR
    assert out["mask"].shape == ((case.x.size(0), -(-length // 8)) if masked else (0,))
    assert out["mask"].dtype == torch.uint8
