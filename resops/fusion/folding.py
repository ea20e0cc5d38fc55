"""``fold``: a copy for deployment."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from ..nn.batch_norm import BatchNormAct
from ..nn.conv_bn_act import may_fold
from ..nn.norm_layers import NormThenAct
from ..reference.conv_bn_act import fold as folded_parameters
from . import layers
from .fusing import Analysis, unfuse

Module = TypeVar("Module", bound=nn.Module)


def fold(model: Module) -> Module:
    """A copy of a model in evaluation, with batch norms folded into the convolutions before them.

    Where a convolution's output goes to a batch norm and nowhere else, the copy has one convolution
    that does the work of both, and ``nn.Identity`` (or the activation of the norm) in place of the
    norm. Of resops' own layers and models it is those that a module of resops, or an nn.Sequential,
    calls one after the other, ghost batch norm and batch renormalisation among them. What cannot be
    folded stays. The copy is made of PyTorch's own layers as far as the model
    was, is not fused, and gives the same results to rounding; its state dict is another one.

    Args:
        model: fused or not; it stays as it is.

    Returns:
        the copy, whose parameters keep their ``requires_grad``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it is in training.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold expects an nn.Module, but got {type(model).__name__}")
    if model.training:
        raise ValueError("fold expects a model in evaluation: call model.eval() first")
    deployed = unfuse(copy.deepcopy(model))
    for blueprint in Analysis(deployed).blueprints:
        for match in blueprint.matches:
            for conv, norm in match.step.folds:
                _fold(blueprint.block, conv, norm)
    _fold_own_layers(deployed)
    return deployed


def _fold(block: nn.Module, conv_path: layers.Path, norm_path: layers.Path) -> None:
    conv, norm = layers.child(block, conv_path), layers.child(block, norm_path)
    kind = layers.norm_kind(norm)
    if kind is None or type(conv) not in kind.convs or not _fold_into(conv, norm):
        return
    rest = norm._modules.get("act") if kind.has_activation else None
    holder = layers.child(block, norm_path[:-1])
    holder._modules[norm_path[-1]] = nn.Identity() if rest is None else rest


def _fold_into(conv: Any, norm: Any) -> bool:
    """Give ``conv`` the weight and bias that do the work of both; False where there are none."""
    mean, var = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
    if norm.training or mean is None or var is None:
        return False
    with torch.no_grad():
        weight, bias = folded_parameters(
            conv.weight, conv.bias, mean, var, norm.weight, norm.bias, norm.eps
        )
    learned = conv.weight.requires_grad
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype), learned)
    conv.bias = nn.Parameter(bias.to(dtype), learned)
    return True


def _fold_own_layers(model: nn.Module) -> None:
    """Of the layers of resops.nn, those that a module of resops calls one after the other.

    In the norm's place stands what is left of it: an activation that may add a residual.
    """
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for holder in model.modules():
        for name, child in holder._modules.items():
            if child is not None:
                places.setdefault(child, []).append((holder, name))
    for block in list(model.modules()):
        for conv, norm in _own_pairs(block):
            if len(places.get(conv, ())) != 1 or len(places.get(norm, ())) != 1:
                continue  # shared: what else calls it would change
            if not may_fold(conv, norm) or type(norm._modules["drop"]) is not nn.Identity:
                continue
            if _fold_into(conv, norm):
                ((parent, place),) = places[norm]
                rest: Any = NormThenAct(None, None)
                rest.act = norm._modules["act"]
                parent._modules[place] = rest.eval()


def _own_pairs(block: Any) -> Iterable[tuple[nn.Module, nn.Module]]:
    """Each convolution of ``block`` whose output goes to a norm of resops.nn and nowhere else."""
    if type(block) is nn.Sequential:
        pairs: Iterable[Any] = itertools.pairwise(block.children())
    elif hasattr(block, "conv_norms"):
        pairs = block.conv_norms()
    else:
        return ()
    return [(conv, norm) for conv, norm in pairs if isinstance(norm, BatchNormAct)]
