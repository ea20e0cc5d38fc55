"""Blocks whose forward cannot be followed, described by one that can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import measured


class Pattern(NamedTuple):
    """See :func:`register_pattern`."""

    forward: Callable[..., Any]
    accepts: Callable[..., bool] | None
    refusal: Callable[..., str] | None = None  # why a call had better not be fused


_patterns: dict[type[nn.Module], Pattern] = {}
# Of packages that need not be installed, by qualified names.
_patterns_by_name: dict[str, Pattern] = {}


def register_pattern(
    block_type: type[nn.Module],
    forward: Callable[..., Any],
    *,
    accepts: Callable[..., bool] | None = None,
) -> None:
    """Describe blocks of one class to :func:`resops.fuse`, whose forward it cannot follow.

    ``forward(block, *tensors)`` does what ``block_type.forward`` does, and ``torch.fx`` can follow
    it: no decision depends on a tensor. It is used to find the layers that can be fused; calls that
    it does not describe go to the original forward.

    >>> def forward(block, x):  # what MyBlock.forward does, without its look at isinstance(x, ...)
    ...     return block.relu(block.bn(block.conv(x)))
    >>> resops.register_pattern(MyBlock, forward)

    Args:
        block_type: the class itself; subclasses are not meant.
        forward: may raise NotImplementedError for a block that it does not describe.
        accepts: whether ``forward`` describes a call with these positional arguments; without it,
            calls with tensors only.

    Raises:
        TypeError: ``block_type`` is no class of modules, or ``forward`` cannot be called.
    """
    if not (isinstance(block_type, type) and issubclass(block_type, nn.Module)):
        raise TypeError(f"block_type must be a subclass of nn.Module, but got {block_type!r}")
    if not callable(forward):
        raise TypeError(f"forward must be a function, but got {forward!r}")
    _patterns[block_type] = Pattern(forward, accepts)


def pattern_for(block_type: type[nn.Module]) -> Pattern | None:
    """What was registered for a class, here or by a user."""
    name = f"{block_type.__module__}.{block_type.__qualname__}"
    return _patterns.get(block_type) or _patterns_by_name.get(name)


# ---- torchvision and timm -----------------------------------------------------------------------

# Both write their dense layer (Huang et al., "Densely Connected Convolutional Networks", 2017,
# section 3, DenseNet-B) for a tensor or a list of them; dense blocks give a list. Where the op of a
# whole block is not taken (dense_blocks.py), its layers are fused by these.


def _torchvision_dense_layer(block: Any, input: Any) -> Any:
    if block.memory_efficient or block.drop_rate > 0:
        raise NotImplementedError("memory_efficient and drop_rate change what the layer does")
    x = block.conv1(block.relu1(block.norm1(torch.cat(input, 1))))
    return block.conv2(block.relu2(block.norm2(x)))


def _timm_dense_layer(block: Any, x: Any) -> Any:
    if block.grad_checkpointing or block.drop_rate > 0:
        raise NotImplementedError("grad_checkpointing and drop_rate change what the layer does")
    return block.conv2(block.norm2(block.conv1(block.norm1(torch.cat(x, 1)))))


def _is_slower_fused(block: Any, features: Any) -> str:
    return measured.slower(measured.DENSE_LAYER, features[0])


def _is_list_of_tensors(*args: Any) -> bool:
    return (
        len(args) == 1
        and isinstance(args[0], list | tuple)
        and len(args[0]) > 0
        and all(isinstance(t, Tensor) for t in args[0])
    )


_patterns_by_name["torchvision.models.densenet._DenseLayer"] = Pattern(
    _torchvision_dense_layer, _is_list_of_tensors, _is_slower_fused
)
_patterns_by_name["timm.models.densenet.DenseLayer"] = Pattern(
    _timm_dense_layer, _is_list_of_tensors, _is_slower_fused
)
