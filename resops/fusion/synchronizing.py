"""``convert_sync_batchnorm``."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.batch_norm import BatchNormAct, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from ..nn.sync_batch_norm import SyncBatchNormAct
from . import layers
from .blocks import swap_class
from .fusing import fuse, fused_norms, unfuse

Module = TypeVar("Module", bound=nn.Module)

_OURS = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)


def convert_sync_batchnorm(model: Module, process_group: Any = None) -> Module:
    """Take the statistics of all batch norms over several processes. In place.

    What ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` does, keeping activations and residuals:
    of the layers of resops and timm, and of models of :func:`resops.fuse`, which stay fused. Every
    batch norm becomes a :class:`resops.nn.SyncBatchNormAct`; parameters, buffers, names and hooks
    stay.

    Args:
        model: not yet wrapped by DistributedDataParallel.
        process_group: the processes; None for all of them.

    Returns:
        the same object.

    Raises:
        TypeError: ``model`` is no module.

    Warns:
        UserWarning: a batch norm of a class that is not known was left as it is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"convert_sync_batchnorm expects an nn.Module, but got {type(model).__name__}"
        )
    fused = fused_norms(model)
    unfuse(model)
    left = []
    for name, module in model.named_modules():
        if isinstance(module, SyncBatchNormAct):
            module.process_group = process_group
        elif _is_known(module):
            _convert(module, process_group)
        elif isinstance(module, _BatchNorm):
            left.append(name)
    if fused:
        fuse(model, module_filter_fn=lambda m, name: m in fused or not layers.is_norm(m))
    if left:
        warnings.warn(
            f"not converted, because their classes are not known: {', '.join(left)}", stacklevel=2
        )
    return model


def _is_known(module: nn.Module) -> bool:
    kind = layers.norm_kind(module)
    return type(module) in _OURS or (kind is not None and isinstance(module, _BatchNorm))


def _convert(norm: nn.Module, process_group: Any) -> None:
    if "act" not in norm._modules:
        norm.drop, norm.act = nn.Identity(), nn.Identity()
    if isinstance(norm, BatchNormAct):
        norm._drop_folded()
    swap_class(norm, SyncBatchNormAct)
    norm.process_group = process_group
