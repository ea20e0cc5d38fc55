"""DenseNet's block and its transition: the definition, in plain PyTorch.

    x_l = H_l( [x_0, x_1, ..., x_{l-1}] ),   H = conv2 . relu . norm2 . conv1 . relu . norm1

with a 1x1 and a 3x3 convolution, the brackets a concatenation of channels (Huang, Liu, van der
Maaten and Weinberger, "Densely Connected Convolutional Networks", 2017, section 3, DenseNet-B). The
transition to the next block is T(y) = average pool 2x2 . conv 1x1 . relu . norm.

The phases below read and write slices of one (N, C_total, H, W) channels-last buffer;
docs/math/dense_block.md derives them. Every backend with kernels of its own has functions of these
names and signatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch_norm import batch_norm


class NormConv(NamedTuple):
    """A batch norm, a ReLU and a convolution of stride 1 that keeps the size of an image."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    conv_weight: Tensor
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def padding(self) -> tuple[int, int]:
        """Of the convolution, whose kernel has odd sizes."""
        height, width = self.conv_weight.shape[2:]
        return height // 2, width // 2


class DenseLayer(NamedTuple):
    """A layer of a dense block: conv1 narrows all channels so far, conv2 makes the new ones."""

    conv1: NormConv
    conv2: NormConv


def norm_relu_conv(x: Tensor, layer: NormConv) -> Tensor:
    """conv( relu( norm(x) ) )."""
    affine = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    settings = (layer.training, layer.momentum, layer.eps)
    z = batch_norm(x, None, *affine, *settings, "relu", 0.0)
    return F.conv2d(z, layer.conv_weight, padding=layer.padding)


def dense_block(
    x: Tensor, layers: Sequence[DenseLayer], transition: NormConv | None, drop_rate: float
) -> Tensor:
    """The composition of PyTorch's own ops that the fused op replaces.

    Args:
        drop_rate: share of the values of each layer's output that is set to 0; the others are
            divided by 1 - drop_rate.
    """
    features = [x]
    for layer in layers:
        new = norm_relu_conv(norm_relu_conv(torch.cat(features, 1), layer.conv1), layer.conv2)
        features.append(F.dropout(new, drop_rate) if drop_rate > 0 else new)
    y = torch.cat(features, 1)
    return y if transition is None else F.avg_pool2d(norm_relu_conv(y, transition), 2)


# ---- phases: a consumer is a norm that reads the first C of the buffer's channels ---------------


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _affine(
    buffer: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x - mean, weight * invstd, and the argument of the ReLU; in the dtype of the statistics."""
    centred = buffer[:, : mean.numel()].to(mean.dtype) - _per_channel(mean)
    scale = invstd if weight is None else weight.to(mean.dtype) * invstd
    z = centred * _per_channel(scale)
    return centred, scale, z if bias is None else z + _per_channel(bias.to(mean.dtype))


def dense_block_apply(
    buffer: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    y: Tensor,
) -> None:
    """Write relu( weight * (x - mean) * invstd + bias ) to ``y``, x the buffer's first C channels.

    Args:
        buffer: (N, C_total, H, W).
        mean, invstd: (C,), which sets C.
        y: (N, C, H, W), written.
    """
    y.copy_(_affine(buffer, weight, bias, mean, invstd)[2].relu())


def dense_block_narrow_forward(
    buffer: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    conv_weight: Tensor,
) -> Tensor:
    """The 1x1 convolution of what :func:`dense_block_apply` writes, which is kept nowhere.

    Args:
        conv_weight: (outputs, C, 1, 1).
    """
    z = _affine(buffer, weight, bias, mean, invstd)[2].relu().to(buffer.dtype)
    return F.conv2d(z, conv_weight)


def dense_block_accumulate(
    grad_y: Tensor,
    buffer: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    grad_sum: Tensor,
    training: bool,
    first: bool,
) -> tuple[Tensor, Tensor]:
    """Add weight * g to ``grad_sum``, g the gradient before the ReLU of a consumer.

    Args:
        grad_y: (N, C, H, W), gradient of what :func:`dense_block_apply` wrote.
        grad_sum: (N, at least C, H, W), in ``buffer``'s dtype or that of the statistics; its first
            C channels are written.
        training: with constant statistics weight * invstd * g is added.
        first: store, for ``grad_sum`` holds nothing yet.

    Returns:
        sum(g) and sum(g * xhat) per channel: gradients of bias and weight.
    """
    centred, scale, z = _affine(buffer, weight, bias, mean, invstd)
    g = grad_y.to(mean.dtype).masked_fill(z <= 0, 0)
    if not training:
        factor = scale
    else:
        factor = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    added = _per_channel(factor) * g
    written = grad_sum[:, : mean.numel()]
    written.copy_(added if first else written + added)
    return g.sum((0, 2, 3)), (g * centred).sum((0, 2, 3)) * invstd


def dense_block_narrow_backward(
    grad_c: Tensor,
    conv_weight: Tensor,
    buffer: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    grad_sum: Tensor,
    training: bool,
    first: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`dense_block_accumulate` behind the 1x1 convolution.

    Args:
        grad_c: gradient of what :func:`dense_block_narrow_forward` returned.
        of_weight: whether the convolution's weight has a gradient.

    Returns:
        the two sums, and the gradient of ``conv_weight`` or an empty tensor.
    """
    consumer = (buffer, weight, bias, mean, invstd)
    grad_z = torch.einsum("nohw,oc->nchw", grad_c, conv_weight.flatten(1))
    sums = dense_block_accumulate(grad_z, *consumer, grad_sum, training, first)
    if not of_weight:
        return *sums, grad_c.new_empty(0)
    z = _affine(*consumer)[2].relu().to(buffer.dtype)
    return *sums, torch.einsum("nohw,nchw->oc", grad_c, z).view_as(conv_weight)


def dense_block_gradient(
    grad_y: Tensor | None,
    buffer: Tensor,
    grad_sum: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    mean_grad: Tensor | None,
    mean_grad_xhat: Tensor | None,
    begin: int,
    end: int,
) -> Tensor:
    """The gradient of the buffer's channels [begin, end), all of whose consumers are through.

    dx = [grad_y] + invstd * (grad_sum - mean_grad - xhat * mean_grad_xhat); with constant
    statistics, and so without the last four vectors, [grad_y] + grad_sum.

    Args:
        grad_y: of the whole buffer, from outside; None for 0.
        grad_sum: see :func:`dense_block_accumulate`; None where there was no consumer.
        mean, invstd, mean_grad, mean_grad_xhat: (end - begin,), or all None.

    Returns:
        (N, end - begin, H, W), channels-last.
    """
    x = buffer[:, begin:end]
    outside = None if grad_y is None else grad_y[:, begin:end]
    inside = None if grad_sum is None else grad_sum[:, begin:end]
    if inside is not None and mean is not None:
        assert invstd is not None and mean_grad is not None and mean_grad_xhat is not None
        centred = x.to(mean.dtype) - _per_channel(mean)
        constant = _per_channel(mean_grad) + centred * _per_channel(invstd * mean_grad_xhat)
        inside = _per_channel(invstd) * (inside.to(mean.dtype) - constant)
    if inside is None:
        total = torch.zeros_like(x) if outside is None else outside
    else:
        total = inside if outside is None else inside + outside
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return out.copy_(total)


def dense_block_update_running(
    mean: Tensor,
    var: Tensor,
    count: int,
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    momenta: Sequence[float],
) -> None:
    """Update the running statistics of all consumers, of each its first channels.

    running = (1 - momentum) * running + momentum * batch, with the unbiased variance. As in torch
    the version counters stay.

    Args:
        mean, var: (C,), of ``count`` values per channel; var is biased.
        running_means, running_vars: (at most C,) each; written.
        momenta: of each consumer.
    """
    unbiased = var * (count / max(count - 1, 1))
    for batch, written in ((mean, running_means), (unbiased, running_vars)):
        for running, momentum in zip(written, momenta, strict=True):
            new = momentum * batch[: running.numel()]
            running.data.copy_((1 - momentum) * running.to(batch.dtype) + new)
