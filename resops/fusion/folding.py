"""``fold``: a copy for deployment."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..reference.conv_bn_act import fold as folded_parameters
from . import layers
from .fusing import Analysis, unfuse

Module = TypeVar("Module", bound=nn.Module)


def fold(model: Module) -> Module:
    """A copy of a model in evaluation, with batch norms folded into the convolutions before them.

    Where a convolution's output goes to a batch norm and nowhere else, the copy has one convolution
    that does the work of both, and ``nn.Identity`` (or the activation of the norm) in place of the
    norm. What cannot be folded stays. The copy is made of PyTorch's own layers as far as the model
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
    return deployed


def _fold(block: nn.Module, conv_path: layers.Path, norm_path: layers.Path) -> None:
    conv, norm = layers.child(block, conv_path), layers.child(block, norm_path)
    kind = layers.norm_kind(norm)
    statistics = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
    if kind is None or type(conv) not in kind.convs or norm.training:
        return
    mean, var = statistics
    if mean is None or var is None:
        return
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) and isinstance(norm, _BatchNorm)
    with torch.no_grad():
        weight, bias = folded_parameters(
            conv.weight, conv.bias, mean, var, norm.weight, norm.bias, norm.eps
        )
    learned = conv.weight.requires_grad
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype), learned)
    conv.bias = nn.Parameter(bias.to(dtype), learned)
    rest = norm._modules.get("act") if kind.has_activation else None
    holder = layers.child(block, norm_path[:-1])
    holder._modules[norm_path[-1]] = nn.Identity() if rest is None else rest
