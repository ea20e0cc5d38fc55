"""Layers of torch behind a block that is one op: they keep what the block keeps anyway."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._autograd import PLAIN_TENSORS, is_plain_call
from ..ops import recomputed_input as ops
from ..ops.activation_source import Source, source_of
from ..ops.conv_bn_act_phases import size_tuple
from .batch_norm import is_plain

_CONVOLUTIONS: dict[type[nn.Module], int] = {
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
_POOLINGS: dict[type[nn.Module], int] = {nn.MaxPool2d: 2, nn.MaxPool3d: 3}


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``.

    A convolution, a transposed convolution or a max pooling of nn itself, without hooks, of the
    output of :func:`resops.functional.double_conv` does not keep it for the backward pass, but what
    it is computed from.
    """
    n = (_CONVOLUTIONS | _POOLINGS).get(type(layer))
    y: Tensor | None = None
    if n == x.dim() - 2 and is_plain(layer) and type(x) in PLAIN_TENSORS and is_plain_call((x,)):
        source = source_of(x)
        if source is not None:
            apply = _pool if type(layer) in _POOLINGS else _convolve
            y = apply(layer, n, source, x)
    result: Tensor = layer(x) if y is None else y
    return result


def _convolve(conv: Any, n: int, source: Source, x: Tensor) -> Tensor | None:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    settings = ops.Convolution(
        list(conv.stride),
        list(conv.padding),
        list(conv.dilation),
        conv.transposed,
        list(conv.output_padding),
        conv.groups,
    )
    return ops.convolution(source, x, conv.weight, conv.bias, settings)


def _pool(pool: Any, n: int, source: Source, x: Tensor) -> Tensor | None:
    if pool.return_indices:
        return None
    stride = pool.kernel_size if pool.stride is None else pool.stride
    sizes = (pool.kernel_size, stride, pool.padding, pool.dilation)
    kernel_size, stride, padding, dilation = (list(size_tuple(size, n)) for size in sizes)
    settings = ops.MaxPool(kernel_size, stride, padding, dilation, pool.ceil_mode)
    return ops.max_pool(source, x, settings)
