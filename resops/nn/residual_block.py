"""A block of modules as one op, where that gives the same as module after module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _dispatch, functional
from ..functional import ConvNorm
from ..ops.conv_bn_act import wants_gradient
from . import observer
from .batch_norm import BatchNormAct, is_plain, next_statistics
from .conv_bn_act import Conv2dNormActivation, Conv3dNormActivation, may_fuse
from .sync_batch_norm import SyncBatchNormAct

_OPS = {2: functional.basic_block, 3: functional.bottleneck}
_SHORTCUTS = (nn.Sequential, Conv2dNormActivation, Conv3dNormActivation)
Pair = tuple[nn.Module, nn.Module]


def residual_block(
    chain: Sequence[Pair], shortcut: nn.Module | None, x: Tensor, *, recompute: bool = False
) -> Tensor | None:
    """``act( F(x) + shortcut(x) )`` by :func:`resops.functional.bottleneck` or ``basic_block``.

    Args:
        chain: three or two pairs of a convolution and its norm, F.
        shortcut: None for the identity; else a convolution and a norm without activation in an
            ``nn.Sequential`` or a :class:`Conv2dNormActivation`.
        x: (N, C_in, *spatial).
        recompute: see the op.

    Returns:
        (N, C, *spatial of F's output); None where the modules have to be called one by one, as has
        to be done here: a module that is a subclass, has hooks or parametrizations, an activation
        that the op has not, or differing ones. Also in evaluation without gradients, where each
        layer keeps its own folded convolution.
    """
    pairs = list(chain)
    if shortcut is not None:
        children = list(shortcut._modules.values())
        if type(shortcut) not in _SHORTCUTS or not is_plain(shortcut) or len(children) != 2:
            return None
        pairs.append((children[0], children[1]))  # type: ignore[arg-type]
    activation = _one_activation(pairs, shortcut is not None)
    if activation is None or not _differentiates([x], pairs):
        return None
    layers: list[Any] = [_layer(conv, norm) for conv, norm in pairs]
    op: Any = _OPS[len(chain)]
    _tell(op, pairs, activation, x)
    return op(x, *layers, **activation, recompute=recompute)


def double_conv(chain: Sequence[Pair], x: Tensor | Sequence[Tensor]) -> Tensor | None:
    """Two convolutions, each with norm and activation, by :func:`resops.functional.double_conv`.

    Args:
        chain: two pairs of a convolution and its norm.
        x: one tensor, or several side by side along the channels.

    Returns:
        see the op; None as in :func:`residual_block`.
    """
    slices = [x] if isinstance(x, Tensor) else list(x)
    activation = _one_activation(chain, False)
    alike = all(t.dtype == slices[0].dtype for t in slices)
    if activation is None or not alike or not _differentiates(slices, chain):
        return None
    conv1, conv2 = (_layer(conv, norm) for conv, norm in chain)
    _tell(functional.double_conv, chain, activation, slices[0])
    return functional.double_conv(slices, conv1, conv2, **activation)


def _one_activation(pairs: Sequence[Pair], projected: bool) -> dict[str, Any] | None:
    """The activation that all norms have, but the last one where ``projected``, as arguments of an
    op; None where there are several, or a layer is not exactly one of the op's."""
    if not all(may_fuse(conv, norm) for conv, norm in pairs):
        return None
    if any(isinstance(norm, SyncBatchNormAct) for _, norm in pairs):
        return None  # its statistics are those of several processes
    epilogues = [norm.epilogue() for _, norm in pairs if isinstance(norm, BatchNormAct)]
    if any(rest for _, _, rest in epilogues):
        return None
    acts = [epilogue[:2] for epilogue in epilogues]
    if projected and acts.pop()[0] != "identity":
        return None
    if any(isinstance(slope, Tensor) for _, slope in acts) or acts.count(acts[0]) != len(acts):
        return None
    return {"activation": acts[0][0], "negative_slope": acts[0][1]}


def _differentiates(slices: Sequence[Tensor], pairs: Sequence[Pair]) -> bool:
    """Whether the call is one of training: else each layer has its own folded convolution."""
    training = any(norm.training for _, norm in pairs)
    parameters = [p for pair in pairs for module in pair for p in module._parameters.values()]
    return wants_gradient(*slices, *parameters) or (training and torch.is_grad_enabled())


def _tell(op: Any, pairs: Sequence[Pair], activation: dict[str, Any], x: Tensor) -> None:
    if observer.listening():
        convolutions, norms = (list(modules) for modules in zip(*pairs, strict=True))
        pattern = f"{op.__name__}, {activation['activation']}"
        call = observer.BlockCall(norms, convolutions, pattern, 1)
        observer.tell(call, _dispatch.choose("batch_norm", x), x)


def _layer(conv: Any, norm: Any) -> ConvNorm:
    """Tensors and settings of the two modules; a batch is counted."""
    running_mean, running_var, training, momentum = next_statistics(norm)
    return ConvNorm(
        conv.weight,
        conv.bias,
        running_mean,
        running_var,
        norm.weight,
        norm.bias,
        training,
        momentum,
        norm.eps,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )
