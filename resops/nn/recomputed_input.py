"""Layers of torch behind a block that is one op: they keep what the block keeps anyway."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._autograd import PLAIN_TENSORS, is_plain_call
from ..ops import recomputed_input as ops
from ..ops.activation_source import source_of
from .batch_norm import is_plain
from .conv_bn_act import _kernel_tuple

_CONVOLUTIONS = {nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_POOLINGS = {nn.MaxPool2d: 2, nn.MaxPool3d: 3}


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``.

    A convolution, a transposed convolution or a max pooling of nn itself, without hooks, of the
    output of :func:`resops.functional.double_conv` does not keep it for the backward pass, but what
    it is computed from.
    """
    n = _CONVOLUTIONS.get(type(layer), _POOLINGS.get(type(layer), 0))
    source = None
    if n == x.dim() - 2 and is_plain(layer) and type(x) in PLAIN_TENSORS and is_plain_call((x,)):
        source = source_of(x)
    y: Tensor | None = None
    if source is not None:
        any_layer: Any = layer
        y = _pool(any_layer, n, source, x) if type(layer) in _POOLINGS else None
        if type(layer) in _CONVOLUTIONS:
            y = _convolve(any_layer, n, source, x)
    result: Tensor = layer(x) if y is None else y
    return result


def _convolve(conv: Any, n: int, source: Any, x: Tensor) -> Tensor | None:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    sizes = (list(size) for size in (conv.stride, conv.padding, conv.dilation))
    output_padding = list(conv.output_padding)
    settings = ops.Convolution(*sizes, conv.transposed, output_padding, conv.groups)
    return ops.convolution(source, x, conv.weight, conv.bias, settings)


def _pool(pool: Any, n: int, source: Any, x: Tensor) -> Tensor | None:
    if pool.return_indices:
        return None
    stride = pool.kernel_size if pool.stride is None else pool.stride
    sizes = (pool.kernel_size, stride, pool.padding, pool.dilation)
    settings = ops.MaxPool(*(list(_kernel_tuple(size, n)) for size in sizes), pool.ceil_mode)
    return ops.max_pool(source, x, settings)
