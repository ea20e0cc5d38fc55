"""Batch norm, activation and max-pool of a network's first layers as one op."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from .. import _dispatch, functional
from ..reference.batch_norm_act_max_pool import MOST_POSITIONS
from . import observer
from .batch_norm import BatchNormAct2d, is_plain, next_statistics


def norm_act_max_pool(norm: nn.Module, pool: nn.Module, x: Tensor) -> Tensor:
    """``pool(norm(x))``, in one op where that gives the same.

    That is for a BatchNormAct2d and an nn.MaxPool2d, themselves and not subclasses, without hooks,
    with an activation that the op has, and windows that it takes; and for ``x`` in channels-last:
    in contiguous the two ops one after the other are faster on a CPU.

    Args:
        x: (N, C, H, W).

    Returns:
        (N, C, OH, OW).
    """
    if not (x.dim() == 4 and _may_fuse(norm, pool) and _is_channels_last(x)):
        y: Tensor = pool(norm(x))
        return y
    assert isinstance(norm, BatchNormAct2d) and isinstance(pool, nn.MaxPool2d)
    activation, negative_slope, _ = norm.epilogue()
    assert not isinstance(negative_slope, Tensor)
    if observer.listening():
        pattern = f"batch_norm_act_max_pool, {activation}"
        call = observer.BlockCall([norm], [], pattern, 0)
        observer.tell(call, _dispatch.choose("batch_norm_act_max_pool", x), x)
    norm._check_input_dim(x)
    running_mean, running_var, training, momentum = next_statistics(norm)
    return functional.batch_norm_act_max_pool(
        x,
        running_mean,
        running_var,
        norm.weight,
        norm.bias,
        training,
        momentum,
        norm.eps,
        kernel_size=pool.kernel_size,
        stride=pool.stride,
        padding=pool.padding,
        activation=activation,
        negative_slope=negative_slope,
    )


def _is_channels_last(x: Tensor) -> bool:
    return suggest_memory_format(x) == torch.channels_last


def _may_fuse(norm: nn.Module, pool: nn.Module) -> bool:
    if type(norm) is not BatchNormAct2d or type(pool) is not nn.MaxPool2d:
        return False
    if not (is_plain(norm) and is_plain(pool)):
        return False
    activation, _, rest = norm.epilogue()
    if rest or activation == "prelu":
        return False
    sizes = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,) * 2
    few = sizes[0] * sizes[-1] <= MOST_POSITIONS
    return pool.dilation in (1, (1, 1)) and not (pool.ceil_mode or pool.return_indices) and few
