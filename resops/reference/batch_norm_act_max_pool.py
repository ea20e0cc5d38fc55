"""batch_norm, activation and max-pool over images, in plain PyTorch: the first layers of a ResNet.

    z = weight * (x - mean) * invstd + bias       a = act(z)       y = maximum of a over each window

x is (N, C, H, W). ``index`` says where in its window a maximum is, row by row from 0: 8 bits, where
the position in the image would take 32 or 64, and all that the backward pass needs besides x. As in
``F.max_pool2d`` what lies in the padding is no candidate, a NaN is greater than any number, and of
equal values the first one counts.

:func:`batch_norm_act_max_pool` is the definition. The functions below it are the passes that every
backend has, with the names and signatures of ``torch.ops.resops``; docs/math has the derivation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import batch_norm as norm

MOST_POSITIONS = 256  # of a window: an index has 8 bits


def output_size(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]
) -> list[int]:
    """(N, C, OH, OW): windows that start within the image and its padding, and end there."""
    sizes = zip(x.shape[2:], kernel_size, stride, padding, strict=True)
    return [*x.shape[:2], *((size + 2 * p - k) // s + 1 for size, k, s, p in sizes)]


def batch_norm_act_max_pool(
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
) -> Tensor:
    """The composition of PyTorch's own ops that the fused op replaces."""
    a = norm.batch_norm(
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
        negative_slope,
    )
    return F.max_pool2d(a, kernel_size, stride, padding)


def batch_norm_act_max_pool_forward(
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
    """y, mean, invstd and index; y and index (uint8) have the memory format of x. Running
    statistics as in ``batch_norm_forward``."""
    a, mean, invstd, _ = norm.batch_norm_forward(
        norm._wide(x),
        None,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        activation,
        negative_slope,
    )
    y, flat = F.max_pool2d_with_indices(a, kernel_size, stride, padding)
    row, column = flat // x.size(3), flat % x.size(3)
    first_row, first_column = _window_starts(y, stride, padding)
    index = (row - first_row) * kernel_size[1] + column - first_column
    like = empty_pooled(x, kernel_size, stride, padding)
    return like.copy_(y), mean, invstd, torch.empty_like(like, dtype=torch.uint8).copy_(index)


def empty_pooled(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """An uninitialised tensor for y: x's dtype and memory format."""
    size = output_size(x, kernel_size, stride, padding)
    memory_format = suggest_memory_format(x)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _window_starts(y: Tensor, stride: list[int], padding: list[int]) -> tuple[Tensor, Tensor]:
    """First row and first column of every window, which may lie in the padding."""
    row = torch.arange(y.size(2), device=y.device) * stride[0] - padding[0]
    column = torch.arange(y.size(3), device=y.device) * stride[1] - padding[1]
    return row.view(-1, 1), column


def unpool(
    grad_y: Tensor,
    index: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    """The gradient of a, like x: what each element gets of the windows whose maximum it is."""
    first_row, first_column = _window_starts(grad_y, stride, padding)
    position = index.long()
    row = first_row + position // kernel_size[1]
    column = first_column + position % kernel_size[1]
    flat = (row * x.size(3) + column).flatten(2)
    wide = norm._wide(grad_y).flatten(2)
    zeros = torch.zeros(*x.shape[:2], x.size(2) * x.size(3), dtype=wide.dtype, device=x.device)
    return zeros.scatter_add(2, flat, wide).view(x.shape)


def batch_norm_act_max_pool_backward(
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
    """Gradients of x, weight and bias; those not in ``output_mask`` are empty."""
    grad_a = unpool(grad_y, index, x, kernel_size, stride, padding)
    need_x, need_weight, need_bias = output_mask
    grad_x, _, grad_weight, grad_bias = norm.batch_norm_backward(
        grad_a,
        x,
        None,
        None,
        weight,
        bias,
        mean,
        invstd,
        training,
        activation,
        negative_slope,
        [need_x, False, need_weight, need_bias],
    )
    return grad_x, grad_weight, grad_bias
