"""A dense block of modules as one op, where that gives the same as module after module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .. import _dispatch
from ..functional import DenseLayer, NormConv
from ..ops.dense_block import dense_block as op
from ..ops.dense_block import fallback_reason
from . import observer
from .batch_norm import BatchNormAct2d, is_plain, next_statistics
from .conv_bn_act import conv_norm_act, may_fuse

Pair = tuple[nn.Module, nn.Module]


def dense_block(
    layers: Sequence[tuple[Pair, Pair]],
    transition: tuple[nn.Module, nn.Module, nn.Module] | None,
    x: Tensor,
    *,
    drop_rate: float = 0.0,
) -> Tensor | None:
    """The block, and the transition behind it, by :func:`resops.functional.dense_block`.

    Args:
        layers: of each, a norm with a ReLU and a 1x1 convolution, and the same with a 3x3.
        transition: a norm with a ReLU, a 1x1 convolution and an average pool 2x2.
        x: (N, C, H, W).
        drop_rate: see the op.

    Returns:
        see the op; None where the modules have to be called one by one: one that is a subclass, has
        hooks or parametrizations, another activation, or a convolution that is not of the op.
    """
    pairs = [pair for layer in layers for pair in layer]
    if transition is not None:
        *last, pool = transition
        if not is_average_of_four(pool):
            return None
        pairs.append((last[0], last[1]))
    if x.dim() != 4 or not all(_may_fuse(norm, conv) for norm, conv in pairs):
        return None
    made = [norm_conv(norm, conv) for norm, conv in pairs]
    end = made.pop() if transition is not None else None
    dense = [DenseLayer(*made[i : i + 2]) for i in range(0, len(made), 2)]

    def narrow(index: int, z: Tensor) -> Tensor:
        (_, conv), (norm, _) = layers[index]
        assert isinstance(norm, BatchNormAct2d)
        return conv_norm_act(conv, norm, z)

    if observer.listening():
        why = fallback_reason(x, dense, end)
        norms, convolutions = (list(modules) for modules in zip(*pairs, strict=True))
        pattern = "+".join(["dense_block"] * (len(dense) > 0) + ["transition"] * (end is not None))
        # A norm of a layer is two levels below the block, that of a transition one below it.
        call = observer.BlockCall(norms, convolutions, pattern, 2 if dense else 1, why)
        observer.tell(call, _dispatch.choose("batch_norm", x), x)
    return op(x, dense, end, drop_rate=drop_rate, narrow=narrow)


def is_average_of_four(pool: Any) -> bool:
    """Whether a pool is the one of a transition."""
    if type(pool) is not nn.AvgPool2d or not is_plain(pool):
        return False
    settings = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.divisor_override)
    return settings == (2, 2, 0, False, None)


def _may_fuse(norm: nn.Module, conv: nn.Module) -> bool:
    """Whether these are exactly a norm with a ReLU and a convolution that the op has."""
    if type(norm) is not BatchNormAct2d or not may_fuse(conv, norm):
        return False
    return norm.epilogue() == ("relu", 0.0, ()) and is_of_the_op(conv)


def is_of_the_op(conv: Any) -> bool:
    """Whether an nn.Conv2d has the settings that the op takes."""
    padding = tuple(size // 2 for size in conv.kernel_size)
    odd = all(size % 2 for size in conv.kernel_size)
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias)
    zeros = conv.padding_mode == "zeros"
    return zeros and odd and settings == ((1, 1), padding, (1, 1), 1, None)


def norm_conv(norm: Any, conv: Any) -> NormConv:
    """Tensors and settings of the two modules; a batch is counted."""
    running_mean, running_var, training, momentum = next_statistics(norm)
    affine = (norm.weight, norm.bias)
    return NormConv(running_mean, running_var, *affine, conv.weight, training, momentum, norm.eps)
