"""The oracle of batch_norm_act_max_pool: a case, its exact outputs with their terms, and torch's.

    a = act(z)      y = max of a over a window      g_a = sum over the windows whose maximum it is

The exact values are those of batch_norm's oracle for a and its gradients; pooling adds no rounding,
so y has the terms of the element that it is. Where two elements of a window are within rounding of
each other, either may be the maximum: y is right with both, but the gradient goes elsewhere, so
grad_y is zero for such windows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.accuracy import (
    UNIT_ROUNDOFF,
    Array,
    Exact,
    Figures,
    accumulation_unit,
    assert_rule_R_all,
)
from tests.ops import batch_norm_oracle as oracle
from tests.ops.batch_norm_oracle import BatchNormCase, dense
from tests.tensors import in_layout


class Windows(NamedTuple):
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (1, 1)

    def pool(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Maxima and where in the image they are."""
        return F.max_pool2d_with_indices(a, self.kernel, self.stride, self.padding)

    def lists(self) -> list[list[int]]:
        return [list(pair) for pair in self]


STEM = Windows()
# Overlapping, touching, apart; padded or not; one row, one column, the whole image.
WINDOWS = [
    STEM,
    Windows((2, 2), (2, 2), (0, 0)),
    Windows((1, 1), (1, 1), (0, 0)),
    Windows((3, 2), (1, 3), (1, 0)),
    Windows((2, 3), (3, 1), (1, 1)),
    Windows((5, 4), (1, 2), (2, 2)),
    Windows((5, 1), (4, 1), (0, 0)),
]


class Case(NamedTuple):
    norm: BatchNormCase  # grad_y is the gradient of y, of the pooled size
    windows: Windows

    def exact(self) -> dict[str, Exact]:
        """Exact values of all outputs."""
        whole = replace(self.norm, grad_y=None).exact()
        a = torch.from_numpy(whole["y"].value.astype(np.float64))
        y, where = self.windows.pool(a)

        def picked(values: Array) -> Array:
            flat = values.reshape(*values.shape[:2], -1)
            return np.take_along_axis(flat, where.numpy().reshape(*flat.shape[:2], -1), 2).reshape(
                y.shape
            )

        out = whole | {"y": Exact(picked(whole["y"].value), picked(whole["y"].terms))}
        if self.norm.grad_y is None:
            return out
        wide = self.norm.grad_y.double()
        grad_a = torch.zeros_like(a).flatten(2).scatter_add(2, where.flatten(2), wide.flatten(2))
        inner = replace(self.norm, grad_y=grad_a.view(a.shape)).exact()
        size = torch.zeros_like(a).flatten(2)
        size = size.scatter_add(2, where.flatten(2), wide.abs().flatten(2)).view(a.shape)
        terms = replace(self.norm, grad_y=size).exact()
        for name in ("grad_x", "grad_weight", "grad_bias"):
            out[name] = Exact(inner[name].value, terms[name].terms, inner[name].channel_dim)
        return out

    def torch_outputs(self) -> dict[str, Tensor]:
        c = self.norm
        running = {
            name: None if (t := getattr(c, name)) is None else t.clone()
            for name in ("running_mean", "running_var")
        }
        leaves = {
            name: dense(t).requires_grad_()
            for name in ("x", "weight", "bias")
            if (t := getattr(c, name)) is not None
        }
        a = oracle.torch_activation(c.activation, c.negative_slope)(
            F.batch_norm(
                leaves["x"],
                running["running_mean"],
                running["running_var"],
                leaves.get("weight"),
                leaves.get("bias"),
                c.training,
                c.momentum,
                c.eps,
            )
        )
        y = F.max_pool2d(a, *self.windows)
        out = {"y": y.detach()}
        if c.training:
            out |= {name: t for name, t in running.items() if t is not None}
        if c.grad_y is not None:
            y.backward(dense(c.grad_y))
            for name, leaf in leaves.items():
                assert leaf.grad is not None
                out[f"grad_{name}"] = leaf.grad
        return out

    def with_decided_maxima(self) -> Case:
        """grad_y is zero where the two largest of a window, or the sign of the largest's z, are
        within the roundings that rule R allows."""
        c = self.norm
        assert c.grad_y is not None
        centred = c._centred()
        z, terms = c._pre_activation(centred["xhat"])
        a = oracle._activate(z, c.activation, c.negative_slope)[0]
        unit = 4 * UNIT_ROUNDOFF[c.x.dtype] + 16 * accumulation_unit(c.x.dtype) * (
            1 + centred["kappa"].reshape(1, -1, 1, 1)
        )
        margin = torch.from_numpy((unit * terms).astype(np.float64))
        values = torch.from_numpy(a.astype(np.float64))
        best, where = self.windows.pool(values)
        # Is anything but the winner as high as the winner may be low?
        k = self.windows
        lower = (values - margin).flatten(2).gather(2, where.flatten(2)).view(best.shape)
        columns = F.unfold(
            F.pad(values + margin, (k.padding[1],) * 2 + (k.padding[0],) * 2, value=-math.inf)
            .flatten(0, 1)
            .unsqueeze(1),
            k.kernel,
            stride=k.stride,
        )
        above = (columns >= lower.flatten(0, 1).flatten(1).unsqueeze(1)).sum(1)
        undecided = (above > 1).view(best.shape)
        if c.activation in oracle.PIECEWISE_LINEAR:
            sign = torch.from_numpy(np.abs(z) <= unit * terms)
            undecided |= sign.flatten(2).gather(2, where.flatten(2)).view(best.shape)
        return self._replace(norm=replace(c, grad_y=c.grad_y.masked_fill(undecided, 0)))

    def check(self, ours: dict[str, Tensor]) -> dict[str, Figures]:
        return assert_rule_R_all(
            ours,
            self.torch_outputs(),
            self.exact(),
            self.norm.x.dtype,
            self.norm.kappa(),
            f"{self.windows} {self.norm.describe()}",
        )

    def arguments(self) -> tuple[Any, ...]:
        c = self.norm
        names = ("x", "weight", "bias", "running_mean", "running_var")
        tensors = [None if (t := getattr(c, n)) is None else t.clone() for n in names[1:]]
        rest = (c.training, c.momentum, c.eps, c.activation, c.negative_slope)
        return (c.x, *tensors, *rest, *self.windows.lists())


def make_case(
    shape: tuple[int, ...],
    windows: Windows = STEM,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    seed: int = 0,
    **fields: Any,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 2 + 1).to(dtype)
    norm = oracle.random_case(in_layout(x, layout), seed=seed, grad=False, **fields)
    pooled = windows.pool(x.double())[0].shape
    grad = torch.randn(pooled, generator=generator).to(dtype)
    return Case(replace(norm, grad_y=grad), windows).with_decided_maxima()


def run_ops(case: Case, ops: Any) -> dict[str, Tensor]:
    """All outputs of the two ops of ``ops``, or of the functions of the definition."""
    arguments = case.arguments()
    y, mean, invstd, index = ops.batch_norm_act_max_pool_forward(*arguments)
    out = {"y": y, "mean": mean, "invstd": invstd}
    if case.norm.training:
        for name, t in zip(("running_mean", "running_var"), arguments[3:5], strict=True):
            if t is not None:
                out[name] = t
    c = case.norm
    saved = (c.grad_y, c.x, c.weight, c.bias, mean, invstd, index, c.training)
    wanted = [True, c.weight is not None, c.bias is not None]
    grads = ops.batch_norm_act_max_pool_backward(
        *saved, c.activation, c.negative_slope, *case.windows.lists(), wanted
    )
    for name, grad, want in zip(("grad_x", "grad_weight", "grad_bias"), grads, wanted, strict=True):
        if want:
            out[name] = grad
    return out
