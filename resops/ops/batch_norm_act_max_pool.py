"""``batch_norm_act_max_pool``: argument checks, backend choice, autograd Function, fake kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, _native
from .._autograd import apply_function, traced_to_aten
from ..reference import batch_norm_act_max_pool as reference
from ..reference.layout import empty_output
from . import batch_norm as norm

OP = "batch_norm_act_max_pool"


def check_pooling(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> None:
    """Raise what the C++ op raises (csrc/batch_norm_act_max_pool.cpp) for windows that do not fit,
    or for an input that is no batch of images."""
    if x.dim() != 4:
        raise ValueError(
            f"{OP} expects an input of size (N, C, H, W), but got input of size {list(x.shape)}"
        )
    for name, pair in (("kernel_size", kernel_size), ("stride", stride), ("padding", padding)):
        if len(pair) != 2:
            raise RuntimeError(f"{name} should have 2 elements, but got {list(pair)}")
        if min(pair) < (0 if name == "padding" else 1):
            wanted = "at least 0" if name == "padding" else "greater than zero"
            raise RuntimeError(f"{name} should be {wanted}, but got {list(pair)}")
    if any(p > k // 2 for p, k in zip(padding, kernel_size, strict=True)):
        raise RuntimeError(
            f"padding should be at most half of kernel_size, but got padding={list(padding)} and "
            f"kernel_size={list(kernel_size)}"
        )
    if kernel_size[0] * kernel_size[1] > reference.MOST_POSITIONS:
        raise NotImplementedError(
            f"{OP} takes windows of up to {reference.MOST_POSITIONS} positions, but got "
            f"kernel_size={list(kernel_size)}"
        )
    if 0 in x.shape[1:]:
        raise RuntimeError(
            f"{OP} expects an input whose sizes are not 0, but for the batch, and got input of "
            f"size {list(x.shape)}"
        )
    size = reference.output_size(x, list(kernel_size), list(stride), list(padding))
    if min(size[2:]) < 1:
        raise RuntimeError(
            f"Given input size: {list(x.shape)}. Calculated output size: {size}. Output size is "
            "too small"
        )


def check_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> None:
    """Raise what the C++ op raises for the same arguments, before any work."""
    check_pooling(x, kernel_size, stride, padding)
    norm.check_arguments(
        x,
        None,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        activation,
    )


def backward_formulas(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    index: Tensor,
    training: bool,
    eps: float,
    activation: str,
    negative_slope: float,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``batch_norm_act_max_pool_backward`` in operations that autograd can follow."""
    grad_a = reference.unpool(grad_y, index, x, kernel_size, stride, padding).to(x.dtype)
    need_x, need_weight, need_bias = output_mask
    grad_x, _, grad_weight, grad_bias = norm.backward_formulas(
        grad_a,
        x,
        None,
        None,
        weight,
        bias,
        mean,
        invstd,
        training,
        eps,
        activation,
        negative_slope,
        [need_x, False, need_weight, need_bias],
    )
    return grad_x, grad_weight, grad_bias


class BatchNormActMaxPoolFunction(torch.autograd.Function):
    """The passes of the native kernels. Saved: x, mean, invstd, weight, bias and 8 bits for every
    window; neither y nor what was pooled."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        activation: str,
        negative_slope: float,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _native_forward(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            training,
            momentum,
            eps,
            activation,
            negative_slope,
            kernel_size,
            stride,
            padding,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, _, training, _, eps, *activation_and_windows = inputs
        _, mean, invstd, index = output
        ctx.mark_non_differentiable(mean, invstd, index)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, invstd, index)
        ctx.call = (training, eps, activation_and_windows)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 13
        saved = ctx.saved_tensors
        training, eps, rest = ctx.call
        needed = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():  # create_graph=True
            arguments: tuple[Any, ...] = (grad_y, *saved, training, eps, *rest, needed)
            grads = backward_formulas(*arguments)
        else:
            grads = _native_backward(grad_y, *saved, training, *rest, needed)
        wanted = (g if need else None for g, need in zip(grads, needed, strict=True))
        return (*wanted, *[None] * 10)


def _pair(name: str, value: int | Sequence[int]) -> list[int]:
    """One number for both directions, or one for each."""
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        return [value, value]
    if not isinstance(value, tuple | list):
        raise TypeError(
            f"{OP}(): argument '{name}' must be int or a tuple of ints, not {type(value).__name__}"
        )
    pair = list(value)
    for number in pair:
        norm.check_number(OP, name, number)
    return pair * 2 if len(pair) == 1 else pair


def batch_norm_act_max_pool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """See :func:`resops.functional.batch_norm_act_max_pool`."""
    norm.check_tensor(OP, "input", x)
    if not isinstance(training, bool):
        raise TypeError(f"{OP}(): argument 'training' must be bool, not {type(training).__name__}")
    windows = _pair("kernel_size", kernel_size)
    steps = windows if stride is None else _pair("stride", stride)
    args = (
        x,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        "identity" if activation is None else activation,
        negative_slope,
        windows,
        steps,
        _pair("padding", padding),
    )
    backend = _dispatch.choose(OP, x)
    if backend == "reference" or traced_to_aten():
        if not torch.jit.is_tracing():  # type: ignore[attr-defined]
            check_arguments(*args[:9], *args[10:])
        return reference.batch_norm_act_max_pool(*args)
    if torch.is_grad_enabled():
        y: Tensor = apply_function(BatchNormActMaxPoolFunction, *args)[0]
        return y
    return _native_forward(*args)[0]


# Fake kernels: sizes, dtypes and strides of what the compiled ops return, after the same checks.


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_arguments(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        activation,
        kernel_size,
        stride,
        padding,
    )
    y = reference.empty_pooled(x, kernel_size, stride, padding)
    return y, norm.statistic_like(x), norm.statistic_like(x), torch.empty_like(y, dtype=torch.uint8)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    index: Tensor,
    training: bool,
    activation: str,
    negative_slope: float,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    check_pooling(x, kernel_size, stride, padding)
    norm.check_apply(x, None, weight, bias, mean, invstd, activation)
    pooled = reference.empty_pooled(x, kernel_size, stride, padding)
    norm.check_like("grad_y", grad_y, pooled)
    if index.shape != pooled.shape or index.dtype != torch.uint8:
        raise RuntimeError(
            f"index should be a torch.uint8 tensor of size {list(pooled.shape)}, but got "
            f"{index.dtype} of size {list(index.shape)}"
        )
    need_x, need_weight, need_bias = output_mask
    return (
        empty_output(x) if need_x else norm.empty(x, x.dtype),
        norm.parameter_grad_like(x, weight, mean, need_weight),
        norm.parameter_grad_like(x, bias, mean, need_bias),
    )


if _native.module is not None:
    torch.library.register_fake(f"resops::{OP}_forward", _fake_forward)
    torch.library.register_fake(f"resops::{OP}_backward", _fake_backward)
    _native_forward = torch.ops.resops.batch_norm_act_max_pool_forward.default
    _native_backward = torch.ops.resops.batch_norm_act_max_pool_backward.default
