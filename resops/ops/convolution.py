"""The phases of a convolution inside a block, or of slices of channels, each by the implementation
that is chosen for it.

There are three:

* LIBRARY: PyTorch's convolution, before which a normalised input is written to a workspace and
  beside which batch norm runs as an op of its own;
* PLAIN: the backend's convolution in the library's place, of the same workspace;
* FUSED: the backend's kernel, which takes the raw input with its prologue and leaves statistics or
  sums (resops/reference/conv_bn_act.py).

:func:`choose` decides, phase by phase and shape by shape. The library's is taken wherever nothing
better was measured.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _dispatch
from ..reference.conv_bn_act import convolution
from ..reference.layout import empty_channels_last, is_channels_last_only
from . import convolution_table
from .conv_bn_act_convolution import native_geometry, path_of
from .conv_bn_act_gpu import native_refusal

LIBRARY, PLAIN, FUSED = "library", "plain", "fused"
_CHOICES = ("auto", LIBRARY, FUSED)

# The ops of a backend: torch.ops.<namespace>.batch_norm_* and conv_bn_act_*.
NAMESPACES: dict[str, Any] = {"native": torch.ops.resops, "triton": torch.ops.resops_triton}


def _checked(name: str, source: str) -> str:
    if name not in _CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(_CHOICES)}, but got {name!r}")
    return name


_default = _checked(os.environ.get("RESOPS_CONVOLUTIONS", "auto"), "RESOPS_CONVOLUTIONS")


class _State(threading.local):
    def __init__(self) -> None:
        self.wanted = _default


_state = _State()


@contextmanager
def convolutions(wanted: str) -> Iterator[None]:
    """Choose the convolutions of blocks, and of tensors side by side along the channels, inside a
    ``with`` block, in this thread.

    Args:
        wanted: "library"; "fused", wherever the backend has such a kernel; or "auto", by what was
            measured. Also RESOPS_CONVOLUTIONS.

    Raises:
        ValueError: ``wanted`` is none of these.
    """
    before = _state.wanted
    _state.wanted = _checked(wanted, "convolutions")
    try:
        yield
    finally:
        _state.wanted = before


def wanted_convolutions() -> str:
    """What :func:`convolutions` or RESOPS_CONVOLUTIONS says."""
    return _state.wanted


class Geometry(NamedTuple):
    """One number per spatial dimension, and the groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def lists(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding and dilation as a schema wants them."""
        return list(self.stride), list(self.padding), list(self.dilation)


class Norm(NamedTuple):
    """act( weight * (x - mean) * invstd + bias ): what stands between two convolutions."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    activation: str
    negative_slope: float

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The same as act( scale * x + shift ), in the dtype of the statistics."""
        scale = (
            self.invstd if self.weight is None else self.weight.to(self.mean.dtype) * self.invstd
        )
        shift = -self.mean * scale
        return scale, shift if self.bias is None else shift + self.bias


class Input:
    """What is convolved: ``x`` itself, or, with a norm, ``x`` normalised and activated on load.

    Several tensors for ``x`` stand side by side along the channels, and are concatenated only where
    something asks for the whole.
    """

    def __init__(
        self, x: Tensor | Sequence[Tensor], norm: Norm | None = None, value: Tensor | None = None
    ) -> None:
        self.slices = [x] if isinstance(x, Tensor) else list(x)
        self.norm, self._value = norm, value

    @property
    def x(self) -> Tensor:
        return self.slices[0] if len(self.slices) == 1 else torch.cat(self.slices, 1)

    @property
    def size(self) -> list[int]:
        """Of ``x``."""
        first, *_ = self.slices
        return [first.size(0), sum(t.size(1) for t in self.slices), *first.shape[2:]]

    def value(self, backend: str) -> Tensor:
        """The normalised tensor, or the concatenated one, written to memory at the first call."""
        if self._value is None:
            self._value = self.x
            if self.norm is not None:
                weight, bias, mean, invstd, *act = self.norm
                apply = NAMESPACES[backend].batch_norm_apply
                self._value = apply(self._value, None, weight, bias, mean, invstd, *act)[0]
        return self._value

    def like(self) -> Tensor:
        """Something like ``x``, of which only size, layout, dtype and device are asked for."""
        first, *more = self.slices
        if not more or self._value is not None:
            return first if self._value is None else self._value
        channels_last = is_channels_last_only(first)
        return (empty_channels_last if channels_last else Tensor.new_empty)(first, self.size)

    def without_value(self) -> Input:
        """The same, where the normalised tensor is not needed any more."""
        return Input(self.slices, self.norm)

    def prologue(self) -> tuple[Tensor | None, Tensor | None, str, float]:
        """scale, shift, activation and slope, as the fused phases take them."""
        if self.norm is None:
            return None, None, "identity", 0.0
        return (*self.norm.scale_and_shift(), self.norm.activation, self.norm.negative_slope)


def choose(
    phase: str,
    backend: str,
    wanted: str,
    x: Tensor | Sequence[Tensor],
    weight: Tensor,
    geometry: Geometry,
    prologue: bool,
) -> str:
    """LIBRARY, PLAIN or FUSED: who computes ``phase`` of a convolution of something like ``x``.

    Args:
        phase: "forward", "backward_data" or "backward_weight".
        backend: whose fused kernels are asked for.
        wanted: as :func:`convolutions` takes it.
        x: one tensor, or several side by side along the channels.
        prologue: whether ``x`` is normalised on load.
    """
    input = Input(x)
    first, *_ = input.slices
    if wanted == LIBRARY or geometry.groups != 1:
        return LIBRARY
    if _dispatch.refusal(backend, "conv_bn_act", first) is not None:
        return LIBRARY
    if (backend, first.device.type) == ("native", "cuda") and not (
        phase == "forward" and native_refusal(first, weight, geometry.groups, None) is None
    ):
        return LIBRARY  # csrc/cuda computes forward passes only; the gradients are cuDNN's
    if wanted == FUSED:
        return FUSED
    if first.device.type == "cpu":
        return _choose_on_cpu(phase, backend, first, weight, geometry)
    how = (weight, geometry[:3], prologue)
    faster = convolution_table.fused_is_faster(phase, backend, input.like(), *how)
    return FUSED if faster else LIBRARY


def _choose_on_cpu(phase: str, backend: str, x: Tensor, weight: Tensor, geometry: Geometry) -> str:
    """By the rules that csrc/cpu/conv_path.cpp has from measurements, which are for layers.

    resops' own kernels normalise on load: Winograd's as they transform tiles, those for 1x1 as they
    copy rows. For the other algorithms batch norm's pass over their input is made by batch norm.
    """
    stride, padding, dilation, groups = geometry
    # x may be the first of several slices: the weight, which was checked, has their channels.
    taken = native_geometry(x, weight, None, stride, padding, dilation, groups, weight.size(1))
    if backend != "native" or isinstance(taken, str):
        return LIBRARY
    if tuple(weight.shape[2:]) == (3, 3):
        return FUSED
    if torch.compiler.is_compiling():  # which cannot see who computes a 1x1 convolution
        return PLAIN
    algorithm, _ = path_of(x, weight.size(1), weight, taken, phase)
    return FUSED if algorithm == "pointwise" else PLAIN


def forward(
    input: Input,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    backend: str,
    wanted: str,
    statistics: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The raw convolution, and its mean and variance where those cost nothing."""
    normed = input.norm is not None
    chosen = choose("forward", backend, wanted, input.slices, weight, geometry, normed)
    if chosen == LIBRARY:
        return convolution(input.value(backend), weight, bias, *geometry), None
    if chosen == PLAIN:
        input, statistics = Input(input.value(backend)), False
    c, mean, var = NAMESPACES[backend].conv_bn_act_forward(
        input.slices,
        *input.prologue(),
        weight,
        bias,
        None,
        "identity",
        0.0,
        *geometry.lists(),
        statistics,
    )
    return c, (mean, var) if statistics else None


def _library_backward(
    grad_c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    n = len(geometry.stride)
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]
    grads = torch.ops.aten.convolution_backward(
        grad_c,
        x,
        weight,
        None if bias is None else [bias.numel()],
        *geometry.lists(),
        False,
        [0] * n,
        geometry.groups,
        output_mask,
    )
    return grads


def backward_weight(
    grad_c: Tensor,
    input: Input,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    backend: str,
    wanted: str,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias; None for one that is not needed."""
    if not any(needed):
        return None, None
    normed = input.norm is not None
    chosen = choose("backward_weight", backend, wanted, input.slices, weight, geometry, normed)
    if chosen == LIBRARY:
        x = input.value(backend) if needed[0] else input.like()
        mask = [False, needed[0], needed[1]]
        return _library_backward(grad_c, x, weight, bias, geometry, mask)[1:]
    if chosen == PLAIN:
        input = Input(input.value(backend))
    grad_weight = grad_bias = None
    if needed[0]:
        grad_weight = NAMESPACES[backend].conv_bn_act_backward_weight(
            grad_c, input.slices, *input.prologue(), list(weight.shape), *geometry.lists()
        )
    if needed[1]:
        grad_bias = grad_c.sum([0, *range(2, grad_c.dim())])
    return grad_weight, grad_bias


def backward_data(
    grad_c: Tensor,
    input: Input,
    weight: Tensor,
    geometry: Geometry,
    backend: str,
    wanted: str,
    addend: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Gradient of what is convolved, [+ addend].

    Where the input has a norm and the kernel is fused: that of the activation's argument, and the
    two sums of :func:`resops.reference.batch_norm.batch_norm_backward_reduce`.
    """
    norm, like = input.norm, input.like()
    normed = norm is not None
    chosen = choose("backward_data", backend, wanted, input.slices, weight, geometry, normed)
    if chosen == LIBRARY:
        g = _library_backward(grad_c, like, weight, None, geometry, [True, False, False])[0]
        assert g is not None
        return g if addend is None else g.add_(addend), None
    if chosen == PLAIN:
        norm, input = None, Input(like)
    g, sum_grad, sum_grad_xhat = NAMESPACES[backend].conv_bn_act_backward_data(
        grad_c,
        weight,
        input.size,
        None if norm is None else input.x,
        *input.prologue(),
        None if norm is None else norm.mean,
        None if norm is None else norm.invstd,
        addend,
        *geometry.lists(),
    )
    return g, None if norm is None else (sum_grad, sum_grad_xhat)


def count_of(c: Tensor) -> int:
    """M, the values per channel of (N, C, *spatial)."""
    return c.size(0) * math.prod(c.shape[2:])
