"""Which modules a fused op stands for: norms, convolutions, activations."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from .. import _dispatch
from ..nn.batch_norm import NormAct, fused_activation, is_plain, normalize
from ..nn.instance_norm import group_normalize, instance_normalize
from ..nn.sync_batch_norm import SyncBatchNormAct, synchronised
from .report import Reason

Path = tuple[str, ...]


class NormKind(NamedTuple):
    """How a fused step computes a norm of one class."""

    label: str
    run: Callable[[nn.Module, Tensor, Tensor | None, str, float | Tensor], Tensor]
    convs: tuple[type[nn.Module], ...]  # the convolutions into which it folds
    has_activation: bool = False  # children ``drop`` and ``act``, as timm's has


def _run_batch_norm(
    norm: nn.Module, x: Tensor, residual: Tensor | None, activation: str, slope: float | Tensor
) -> Tensor:
    return normalize(norm, x, residual, activation, slope)  # type: ignore[arg-type]


def _run_sync_batch_norm(
    norm: nn.Module, x: Tensor, residual: Tensor | None, activation: str, slope: float | Tensor
) -> Tensor:
    group = synchronised(norm.process_group) if norm.training else None
    return normalize(norm, x, residual, activation, slope, group)  # type: ignore[arg-type]


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_INSTANCE_NORM = NormKind("IN", instance_normalize, ())  # type: ignore[arg-type]
_BATCH_NORM_2D = NormKind("BN", _run_batch_norm, (nn.Conv2d,))
_KINDS: dict[type, NormKind] = {
    nn.BatchNorm1d: NormKind("BN", _run_batch_norm, (nn.Conv1d,)),
    nn.BatchNorm2d: _BATCH_NORM_2D,
    nn.BatchNorm3d: NormKind("BN", _run_batch_norm, (nn.Conv3d,)),
    nn.InstanceNorm1d: _INSTANCE_NORM,
    nn.InstanceNorm2d: _INSTANCE_NORM,
    nn.InstanceNorm3d: _INSTANCE_NORM,
    nn.GroupNorm: NormKind("GN", group_normalize, ()),  # type: ignore[arg-type]
    nn.SyncBatchNorm: NormKind("SyncBN", _run_sync_batch_norm, _CONVS),
    SyncBatchNormAct: NormKind("SyncBN", _run_sync_batch_norm, _CONVS, has_activation=True),
}
# Classes of packages that need not be installed, by their qualified names.
_KINDS_BY_NAME = {
    "timm.layers.norm_act.BatchNormAct2d": _BATCH_NORM_2D._replace(has_activation=True),
}
_NORM_CLASSES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEVICES = ("cpu", "cuda", "meta")


def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def norm_kind(norm: nn.Module) -> NormKind | None:
    """How ``norm`` is computed in a fused step; None for what is no supported norm."""
    cls = type(norm)
    return _KINDS.get(cls) or _KINDS_BY_NAME.get(_qualified_name(cls))


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm, by its class or, for classes of others, by name and tensors."""
    if isinstance(module, _NORM_CLASSES):
        return True
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return re.search("norm", type(module).__name__, re.IGNORECASE) is not None and any(
        t is not None for t in tensors
    )


def refusal(norm: nn.Module) -> tuple[Reason, str] | None:
    """Why ``norm`` cannot be part of a fused op, and what exactly was found; None if it can."""
    cls = _qualified_name(type(norm))
    if isinstance(norm, NormAct) and type(norm) is not SyncBatchNormAct:
        return Reason.ALREADY_FUSED, cls
    if parametrize.is_parametrized(norm):
        return Reason.PARAMETRIZED, ", ".join(norm.parametrizations)  # type: ignore[arg-type]
    if not is_plain(norm):
        return Reason.HOOKS, cls
    kind = norm_kind(norm)
    if kind is None:
        known = tuple(_KINDS)
        return (Reason.SUBCLASS if isinstance(norm, known) else Reason.UNSUPPORTED_NORM), cls
    if kind.has_activation:
        drop = norm._modules.get("drop")
        if type(drop) is not nn.Identity:
            return Reason.DROPOUT_BETWEEN, f"{type(drop).__name__} in {cls}"
        act = norm._modules.get("act")
        if act is None or not is_plain(act):
            return Reason.HOOKS, f"{type(act).__name__} in {cls}"
    for name, t in [*norm._parameters.items(), *norm._buffers.items()]:
        if t is None or name == "num_batches_tracked":
            continue
        if t.layout != torch.strided:
            return Reason.UNSUPPORTED_LAYOUT, f"{name} has layout {t.layout}"
        if t.dtype not in _DTYPES:
            return Reason.UNSUPPORTED_DTYPE, f"{name} has dtype {t.dtype}"
        if t.device.type not in _DEVICES:
            return Reason.UNSUPPORTED_DEVICE, f"{name} is on {t.device}"
        chosen = _dispatch.get_backend()
        if chosen != "auto" and t.device.type != "meta":
            missing = _dispatch.refusal(chosen, "batch_norm", t)
            if missing is not None:
                return Reason.BACKEND_MISSING, missing
    return None


def backend_of(norm: nn.Module) -> str:
    """The backend that computes ``norm`` where it now is; "reference" is plain PyTorch."""
    for t in [*norm._parameters.values(), *norm._buffers.values()]:
        if t is not None and t.is_floating_point():
            try:
                return _dispatch.choose("batch_norm", t)
            except _dispatch.BackendError:
                break
    return _dispatch.get_backend()


def is_conv(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution that a norm after it may be folded into."""
    return type(module) in _CONVS and is_plain(module)


_READERS = (*_CONVS, nn.Identity, nn.Linear, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)


def only_reads(module: nn.Module) -> bool:
    """Whether calling ``module`` surely overwrites no argument."""
    if type(module) is nn.Sequential:
        return is_plain(module) and all(only_reads(c) for c in module.children())
    known = type(module) in _READERS or norm_kind(module) is not None
    return known and is_plain(module)


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def returns_its_input(module: nn.Module) -> bool:
    """Whether ``module`` is nn.Identity, or a dropout of nothing, as MONAI puts everywhere."""
    return type(module) is nn.Identity or (type(module) in _DROPOUTS and bool(module.p == 0))


def is_identity(module: nn.Module) -> bool:
    """Whether calling ``module`` returns its input and does nothing else."""
    return returns_its_input(module) and is_plain(module)


def is_activation(module: nn.Module) -> bool:
    """Whether the op has the activation ``module``."""
    return is_plain(module) and _has_activation(module)


def _has_activation(module: nn.Module) -> bool:
    if type(module) is nn.PReLU:
        return module.num_parameters == 1
    return fused_activation(module) is not None


_ACTIVATION_MODULES = tuple(
    getattr(nn, name) for name in nn.modules.activation.__all__ if name != "MultiheadAttention"
)


def activation_refusal(module: nn.Module) -> tuple[Reason, str] | None:
    """Why ``module`` cannot follow a norm in the op, where it is an activation or a dropout."""
    cls = _qualified_name(type(module))
    if isinstance(module, nn.modules.dropout._DropoutNd) or "drop" in cls.lower():
        return Reason.DROPOUT_BETWEEN, cls
    if _has_activation(module):
        return Reason.HOOKS, cls
    if isinstance(module, _ACTIVATION_MODULES) or "activation" in cls.lower():
        return Reason.UNSUPPORTED_ACTIVATION, cls
    return None


def activation_label(module: nn.Module) -> str:
    """Name of an activation in a pattern; "" for the identity."""
    return "" if type(module) is nn.Identity else type(module).__name__


def child(module: nn.Module, path: Path) -> nn.Module:
    """The submodule at ``path``; ``module`` itself for the empty one."""
    for name in path:
        module = module._modules[name]  # type: ignore[assignment]
    return module
