"""The oracle of batch_norm: a case, its exact outputs with their terms, and torch's own outputs.

    xhat = (x - mean) * invstd      z = weight * xhat + bias [+ residual]      y = act(z)
    g = grad_y * act'(z)
    grad_x = weight * invstd * (g - mean(g) - xhat * mean(g * xhat))     (training; else w*invstd*g)
    grad_weight = sum(g * xhat)    grad_bias = sum(g)    grad_residual = g

The sums of the absolute values of the terms, A_q (rule R, accuracy.py), |.| of each summand:

    A_y = |xhat * w| + |b| + |r|       A_mean = mean|x|         A_invstd = invstd
    A_grad_x = |w| invstd (A_g + mean(A_g) + |xhat| mean(A_g |xhat|))
    A_grad_weight = sum(A_g |xhat|)    A_grad_bias = sum(A_g)   A_grad_residual = A_g
    A_running_mean = |1-m| |old| + |m| mean|x|                  A_running_var likewise, unbiased

A_g is |g| where act' is piecewise constant. For silu and gelu z itself carries a rounding error
proportional to A_y, so A_g = |grad_y| (|act'(z)| + A_y |act''(z)|).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

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

ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "gelu")
PIECEWISE_LINEAR = ("relu", "leaky_relu")
SMOOTH = ("silu", "gelu")
ARGUMENTS = ("x", "residual", "weight", "bias", "running_mean", "running_var", "grad_y")
GRADS = ("grad_x", "grad_residual", "grad_weight", "grad_bias")

Outputs = dict[str, Tensor | None]


@dataclass
class BatchNormCase:
    """The arguments of one call and of its backward pass. x is (N, C, *spatial)."""

    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    activation: str = "identity"
    negative_slope: float = 0.01
    grad_y: Tensor | None = None
    label: str = ""
    _memory: dict[str, Any] = field(init=False, default_factory=dict, repr=False)

    def _once(self, key: str, compute: Callable[[], Any]) -> Any:
        """A case is read by several runs; its exact values are computed once."""
        if key not in self._memory:
            self._memory[key] = compute()
        return self._memory[key]

    def kappa(self) -> Array:
        return self._centred()["kappa"]

    def _array(self, t: Tensor) -> Array:
        return to_numpy(t, self.x.dtype)

    def _row(self, t: Tensor | None, default: float) -> Array:
        """A parameter, ready to be broadcast against x."""
        row = np.full(self.x.size(1), default, dtype=exact_dtype(self.x.dtype))
        if t is not None:
            row[:] = self._array(t)
        return row.reshape(1, -1, *[1] * (self.x.dim() - 2))

    def _centred(self) -> dict[str, Array]:
        return self._once("centred", self._compute_centred)

    def _compute_centred(self) -> dict[str, Array]:
        x = self._array(self.x)
        axes = (0, *range(2, x.ndim))
        if self.training:
            mean = x.mean(axes)
            var = ((x - mean.reshape(1, -1, *[1] * (x.ndim - 2))) ** 2).mean(axes)
        else:
            assert self.running_mean is not None and self.running_var is not None
            mean, var = self._array(self.running_mean), self._array(self.running_var)
        invstd = 1 / np.sqrt(var + np.asarray(self.eps, dtype=x.dtype))
        mean_abs = np.abs(x).mean(axes)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return {
            "xhat": (x - mean.reshape(shape)) * invstd.reshape(shape),
            "mean": mean,
            "var": var,
            "invstd": invstd,
            "mean_abs": mean_abs,
            "kappa": mean_abs * invstd,
        }

    def with_decided_signs(self) -> BatchNormCase:
        """The same case with grad_y zero where the sign of z is within rounding of zero.

        The derivative of relu has a step there, for which no tolerance can be given: either side
        is right. 4 roundings of the dtype (torch rounds its normalised x, the sum and the output)
        and twice the floor of rule R are excluded.
        """
        if self.grad_y is None or self.activation not in PIECEWISE_LINEAR:
            return self
        c = self._centred()
        z, terms = self._pre_activation(c["xhat"])
        unit = 4 * UNIT_ROUNDOFF[self.x.dtype] + 16 * accumulation_unit(self.x.dtype) * (
            1 + c["kappa"].reshape(1, -1, *[1] * (self.x.dim() - 2))
        )
        undecided = torch.from_numpy(np.abs(z) <= unit * terms)
        grad_y = self.grad_y.masked_fill(undecided, 0)
        if 0 not in self.grad_y.stride():  # no element stands for several: keep the strides
            strided = torch.empty_strided(grad_y.shape, self.grad_y.stride(), dtype=grad_y.dtype)
            grad_y = strided.fill_(math.nan).copy_(grad_y)
        return replace(self, grad_y=grad_y)

    def _pre_activation(self, xhat: Array) -> tuple[Array, Array]:
        """z and the absolute values of its terms."""
        scaled = xhat * self._row(self.weight, 1.0)
        bias = self._row(self.bias, 0.0)
        z, terms = scaled + bias, np.abs(scaled) + np.abs(bias)
        if self.residual is not None:
            r = self._array(self.residual)
            z, terms = z + r, terms + np.abs(r)
        return z, terms

    def exact(self) -> dict[str, Exact]:
        """Every output of the call and, where grad_y is given, every gradient."""
        return self._once("exact", self._compute_exact)

    def _compute_exact(self) -> dict[str, Exact]:
        c = self._centred()
        xhat, invstd = c["xhat"], c["invstd"]
        axes = (0, *range(2, xhat.ndim))
        shape = (1, -1, *[1] * (xhat.ndim - 2))
        count = xhat.size // max(xhat.shape[1], 1)
        z, z_terms = self._pre_activation(xhat)
        y, slope, curvature = _activate(z, self.activation, self.negative_slope)
        out = {
            "y": Exact(y, z_terms),
            "mean": Exact(c["mean"], c["mean_abs"], 0),
            "invstd": Exact(invstd, invstd, 0),
        }
        if self.training and self.running_mean is not None and self.running_var is not None:
            m = np.asarray(self.momentum, dtype=xhat.dtype)
            old_mean, old_var = self._array(self.running_mean), self._array(self.running_var)
            unbiased = c["var"] * (count / max(count - 1, 1))
            out["running_mean"] = Exact(
                (1 - m) * old_mean + m * c["mean"],
                np.abs((1 - m) * old_mean) + np.abs(m) * c["mean_abs"],
                0,
            )
            out["running_var"] = Exact(
                (1 - m) * old_var + m * unbiased,
                np.abs((1 - m) * old_var) + np.abs(m) * unbiased,
                0,
            )
        if self.grad_y is not None:
            grad_y = self._array(self.grad_y)
            g = grad_y * slope
            g_terms = np.abs(grad_y) * (np.abs(slope) + np.abs(curvature) * z_terms)
            scale = self._row(self.weight, 1.0) * invstd.reshape(shape)
            grad_x, grad_x_terms = g, g_terms
            if self.training:
                mean_g, mean_g_xhat = (t.mean(axes, keepdims=True) for t in (g, g * xhat))
                grad_x = g - mean_g - xhat * mean_g_xhat
                grad_x_terms = (
                    g_terms
                    + g_terms.mean(axes, keepdims=True)
                    + np.abs(xhat) * (g_terms * np.abs(xhat)).mean(axes, keepdims=True)
                )
            out["grad_x"] = Exact(scale * grad_x, np.abs(scale) * grad_x_terms)
            out["grad_weight"] = Exact((g * xhat).sum(axes), (g_terms * np.abs(xhat)).sum(axes), 0)
            out["grad_bias"] = Exact(g.sum(axes), g_terms.sum(axes), 0)
            out["grad_residual"] = Exact(g, g_terms)
        return out

    def torch_outputs(self) -> Outputs:
        """What PyTorch's own ops give, on dense copies of all data (see :func:`dense`)."""
        return self._once("torch", self._compute_torch_outputs)

    def _compute_torch_outputs(self) -> Outputs:
        dtype = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        x, weight, bias, residual = (
            None if t is None else dense(t).detach().requires_grad_()
            for t in (self.x, self.weight, self.bias, self.residual)
        )
        assert x is not None
        old_mean, old_var = (None if t is None else t.to(dtype, copy=True) for t in self.running)
        flags = (self.training, self.momentum, self.eps)
        with torch.no_grad():
            _, mean, invstd = torch.native_batch_norm(x, None, None, old_mean, old_var, *flags)
        if not self.training:  # torch saves nothing then
            assert self.running_mean is not None and self.running_var is not None
            mean, invstd = self.running_mean, torch.rsqrt(self.running_var.to(dtype) + self.eps)
        new_mean, new_var = (None if t is None else t.detach().clone() for t in self.running)
        z = F.batch_norm(x, new_mean, new_var, weight, bias, *flags)
        z = z if residual is None else z + residual
        y = torch_activation(self.activation, self.negative_slope)(z)
        out: Outputs = {"y": y.detach(), "mean": mean, "invstd": invstd}
        if self.training:
            out |= {"running_mean": new_mean, "running_var": new_var}
        if self.grad_y is not None:
            y.backward(dense(self.grad_y).contiguous(memory_format=suggest_memory_format(y)))
            leaves = {"x": x, "weight": weight, "bias": bias, "residual": residual}
            out |= {f"grad_{k}": None if t is None else t.grad for k, t in leaves.items()}
        return out

    @property
    def running(self) -> tuple[Tensor | None, Tensor | None]:
        return self.running_mean, self.running_var

    def check(self, ours: Outputs) -> dict[str, Figures]:
        """Rule R for every output in ``ours``; evaluation leaves the running statistics alone."""
        if not self.training:
            for name, before in zip(("running_mean", "running_var"), self.running, strict=True):
                after = ours.get(name)
                assert after is None or before is None or torch.equal(after, before), name
            ours = {k: v for k, v in ours.items() if not k.startswith("running")}
        return assert_rule_R_all(
            ours, self.torch_outputs(), self.exact(), self.x.dtype, self.kappa(), self.describe()
        )

    def describe(self) -> str:
        flags = [
            f"{tuple(self.x.shape)} strides {self.x.stride()} {self.x.dtype}",
            "training" if self.training else "eval",
            self.activation,
            *(n for n in ("residual", "weight", "bias") if getattr(self, n) is not None),
        ]
        return f"{self.label} [{', '.join(flags)}]"


def dense(t: Tensor) -> Tensor:
    """A dense copy in the layout that torch takes ``t`` for.

    torch is a yardstick for dense data only: its CPU batch_norm backward (2.13) gives wrong
    gradients for a permuted gradient of shape (1, 2, 1, 2).
    """
    return (
        t.detach()
        .clone(memory_format=torch.contiguous_format)
        .contiguous(memory_format=suggest_memory_format(t))
    )


def torch_activation(name: str, negative_slope: float = 0.01) -> Callable[[Tensor], Tensor]:
    return {
        "identity": lambda z: z,
        "relu": F.relu,
        "leaky_relu": lambda z: F.leaky_relu(z, negative_slope),
        "silu": F.silu,
        "gelu": F.gelu,
    }[name]


def _activate(z: Array, name: str, negative_slope: float) -> tuple[Array, Array, Array]:
    """act(z), act'(z) and act''(z)."""
    one, zero = np.ones_like(z), np.zeros_like(z)
    if name == "identity":
        return z, one, zero
    if name in PIECEWISE_LINEAR:
        blocked = np.asarray(negative_slope if name == "leaky_relu" else 0.0, dtype=z.dtype)
        slope = np.where(z <= 0, blocked, one)
        return z * slope, slope, zero
    if name == "silu":
        s = 1 / (1 + np.exp(-z))
        ds = s * (1 - s)
        return z * s, s + z * ds, ds * (2 + z * (1 - 2 * s))
    assert name == "gelu"
    # erf and its complement only exist in float64; their error is below 2 u(float64).
    half_erfc = 0.5 * torch.special.erfc(torch.from_numpy(-z.astype(np.float64)) / 2**0.5)
    cdf = half_erfc.numpy().astype(z.dtype)
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    return z * cdf, cdf + z * density, density * (2 - z * z)


def random_case(
    x: Tensor,
    *,
    seed: int = 0,
    residual: bool | Tensor = False,
    affine: bool = True,
    running: bool = True,
    parameter_dtype: torch.dtype | None = None,
    grad: bool | Tensor = True,
    **flags: object,
) -> BatchNormCase:
    """A case with random parameters of both signs and running statistics that are not 0 and 1.

    Args:
        residual, grad: a tensor to use, or True for a random one in x's layout.
        parameter_dtype: of weight, bias and running statistics; float32 (float64 for float64).
        flags: further fields of :class:`BatchNormCase`.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = parameter_dtype or (torch.float64 if x.dtype == torch.float64 else torch.float32)
    channels = x.size(1)

    def like_x() -> Tensor:
        values = torch.randn(x.shape, generator=generator).to(x.dtype)
        return torch.empty_like(x).copy_(values)

    def per_channel(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(channels, generator=generator)).to(dtype)

    case = BatchNormCase(
        x,
        residual=residual if isinstance(residual, Tensor) else like_x() if residual else None,
        weight=per_channel(-1.5, 1.5) if affine else None,
        bias=per_channel(-1, 1) if affine else None,
        running_mean=per_channel(-3, 3) if running else None,
        running_var=per_channel(0.5, 2) if running else None,
        grad_y=grad if isinstance(grad, Tensor) else like_x() if grad else None,
    )
    return replace(case, **flags)


def run_functional(case: BatchNormCase, requires_grad: str = "x residual weight bias") -> Outputs:
    """The public function, and autograd for the arguments that are named."""
    from resops.functional import batch_norm_act

    leaves = {
        name: t.detach().requires_grad_(name in requires_grad.split())
        for name in ("x", "residual", "weight", "bias")
        if (t := getattr(case, name)) is not None
    }
    running_mean, running_var = (None if t is None else t.clone() for t in case.running)
    y = batch_norm_act(
        leaves["x"],
        running_mean,
        running_var,
        leaves.get("weight"),
        leaves.get("bias"),
        case.training,
        case.momentum,
        case.eps,
        residual=leaves.get("residual"),
        activation=None if case.activation == "identity" else case.activation,
        negative_slope=case.negative_slope,
    )
    out: Outputs = {"y": y.detach(), "running_mean": running_mean, "running_var": running_var}
    if case.grad_y is not None and y.requires_grad:
        y.backward(case.grad_y)
        out |= {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    return out


def run_ops(case: BatchNormCase, ops: Any = None) -> Outputs:
    """The two registered ops, forward and backward, of ``ops`` (default torch.ops.resops).

    The definition, resops.reference.batch_norm, has functions of the same names and signatures.
    """
    ops = torch.ops.resops if ops is None else ops
    running_mean, running_var = (None if t is None else t.clone() for t in case.running)
    y, mean, invstd, mask = ops.batch_norm_forward(
        case.x,
        case.residual,
        case.weight,
        case.bias,
        running_mean,
        running_var,
        case.training,
        case.momentum,
        case.eps,
        case.activation,
        case.negative_slope,
    )
    out: Outputs = {"y": y, "mean": mean, "invstd": invstd}
    out |= {"running_mean": running_mean, "running_var": running_var}
    if case.grad_y is not None:
        wanted = [True, *(t is not None for t in (case.residual, case.weight, case.bias))]
        grads = ops.batch_norm_backward(
            case.grad_y,
            case.x,
            case.residual if case.activation in SMOOTH else None,
            mask,
            case.weight,
            case.bias,
            mean,
            invstd,
            case.training,
            case.activation,
            case.negative_slope,
            wanted,
        )
        for name, grad, want in zip(GRADS, grads, wanted, strict=True):
            out[name] = grad if want else None
    return out


def run_phases(case: BatchNormCase, ops: Any = None) -> Outputs:
    """The four phases one by one, as a synchronised batch norm calls them."""
    ops = torch.ops.resops if ops is None else ops
    if case.training:
        mean, var = ops.batch_norm_statistics(case.x)
    else:
        assert case.running_mean is not None and case.running_var is not None
        wide = torch.float64 if case.x.dtype == torch.float64 else torch.float32
        mean, var = case.running_mean.to(wide), case.running_var.to(wide)
    invstd = torch.rsqrt(var + case.eps)
    act = (case.activation, case.negative_slope)
    affine = (case.weight, case.bias)
    y, mask = ops.batch_norm_apply(case.x, case.residual, *affine, mean, invstd, *act)
    out: Outputs = {"y": y, "mean": mean, "invstd": invstd}
    if case.grad_y is not None:
        kept = case.residual if case.activation in SMOOTH else None
        saved = (case.grad_y, case.x, kept, mask, *affine, mean, invstd)
        sums = ops.batch_norm_backward_reduce(*saved, *act)
        count = max(case.x.numel() // max(case.x.size(1), 1), 1)
        means = [s / count if case.training else None for s in sums]
        with_residual = case.residual is not None
        grad_x, grad_residual = ops.batch_norm_backward_apply(
            *saved, *means, *act, True, with_residual
        )
        out |= {"grad_x": grad_x, "grad_residual": grad_residual if with_residual else None}
        out |= {"grad_bias": sums[0], "grad_weight": sums[1]}
    return out


def run_native(case: BatchNormCase) -> Outputs:
    """All outputs of the public function, after checks that hold for every call:

    the native ops ran, once each; the ops called directly give the same bits; no argument but the
    running statistics was written to; y and grad_x have torch's strides, the parameters'
    gradients their parameters' dtype.
    """
    before = {name: bits(t) for name in ARGUMENTS if (t := getattr(case, name)) is not None}
    with counted_calls() as calls:
        out = run_functional(case)
    expected = {"batch_norm_forward": 1}
    if case.grad_y is not None:
        expected["batch_norm_backward"] = 1
    assert native_calls(calls) == dict(sorted(expected.items())), calls
    direct = run_ops(case)
    for name, t in out.items():
        if t is not None:
            other = direct[name]
            assert other is not None and torch.equal(bits(t), bits(other)), name
    for name, value in before.items():
        assert torch.equal(bits(getattr(case, name)), value), f"{name} was written to"
    wide = torch.float64 if case.x.dtype == torch.float64 else torch.float32
    for name in ("mean", "invstd"):
        statistic = direct[name]
        assert statistic is not None and statistic.dtype == wide
    assert_metadata(case, direct)
    return direct


def assert_metadata(case: BatchNormCase, out: Outputs) -> None:
    """Sizes, dtypes and strides of y and of the gradients."""
    for name in ("y", "grad_x", "grad_residual"):
        t = out.get(name)
        if t is not None:
            assert t.shape == case.x.shape and t.dtype == case.x.dtype, name
            assert t.stride() == expected_strides(case.x), f"{name} of {case.describe()}"
    for parameter in ("weight", "bias"):
        grad, of = out.get(f"grad_{parameter}"), getattr(case, parameter)
        if grad is not None:
            assert grad.dtype == of.dtype and grad.shape == of.shape, parameter


def expected_strides(x: Tensor) -> tuple[int, ...]:
    """torch's own, but a 3-D channels-last input keeps its strides (torch makes it contiguous)."""
    _, C, *spatial = x.shape
    if len(spatial) == 1 and C > 1 and spatial[0] > 1 and x.stride() == (C * spatial[0], 1, C):
        return x.stride()
    return torch.empty_like(x, memory_format=suggest_memory_format(x)).stride()


def bits(t: Tensor) -> Tensor:
    """The bits of ``t`` as integers, so that NaN equals itself and 0 differs from -0."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()]
    return t.detach().contiguous().view(integer).clone()
