"""Batch norm layers with an activation and an optional residual."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from .. import functional
from .._autograd import is_plain_call
from . import observer
from .checkpoint import recomputing

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "hard_sigmoid": nn.Hardsigmoid,
    "hard_swish": nn.Hardswish,
    "identity": nn.Identity,
}


def create_activation(
    layer: Callable[..., nn.Module] | str | None, kwargs: Mapping[str, Any] | None, inplace: bool
) -> nn.Module:
    """The layer ``act`` for the arguments ``act_layer``, ``act_kwargs`` and ``inplace`` of timm.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(layer, str):
        if layer and layer not in _ACTIVATIONS:
            raise ValueError(
                f"act_layer must be a module class or one of {', '.join(_ACTIVATIONS)}, "
                f"but got {layer!r}"
            )
        layer = _ACTIVATIONS.get(layer)
    if layer is None or layer is nn.Identity:
        return nn.Identity()
    kwargs = dict(kwargs or {})
    try:
        return layer(**{"inplace": inplace, **kwargs})
    except TypeError:  # an activation that has no in-place form
        return layer(**kwargs)


def is_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` runs its class's forward and nothing else: no hooks."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def fused_activation(act: nn.Module) -> tuple[str, float] | None:
    """The activation of the op, and its slope, that stands for ``act``; None if there is none."""
    kind = type(act)
    if kind is nn.ReLU:
        return "relu", 0.0
    if kind is nn.Identity:
        return "identity", 0.0
    if kind is nn.SiLU:
        return "silu", 0.0
    if isinstance(act, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return "leaky_relu", act.negative_slope
    if isinstance(act, nn.GELU) and kind is nn.GELU and act.approximate == "none":
        return "gelu", 0.0
    return None


def activation_of_call(act: nn.Module) -> tuple[str, float | Tensor] | None:
    """:func:`fused_activation`, and PReLU with one slope.

    That is leaky_relu where its slope is not learned in this call, and known to the host.
    """
    if type(act) is not nn.PReLU:
        return fused_activation(act)
    slope = act.weight
    if slope.numel() != 1:
        return None
    learned = torch.is_grad_enabled() and slope.requires_grad
    if learned or slope.device.type != "cpu" or not is_plain_call((slope,)):
        return "prelu", slope
    return "leaky_relu", float(slope)


def next_statistics(norm: _BatchNorm) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """What the next call of ``norm`` takes, which is counted if it is in training: the running
    statistics, whether those of the batch are used, and the batch's weight in the running ones."""
    running_mean, running_var = norm.running_mean, norm.running_var
    momentum = norm.momentum
    training = norm.training
    if not training:
        training = running_mean is None and running_var is None
    elif not norm.track_running_stats or recomputing():
        running_mean = running_var = None
    elif norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the plain mean over all batches
            momentum = 1.0 / float(norm.num_batches_tracked)
    return running_mean, running_var, training, 0.0 if momentum is None else momentum


def normalize(
    norm: _BatchNorm,
    x: Tensor,
    residual: Tensor | None,
    activation: str,
    negative_slope: float | Tensor,
    process_group: Any = None,
) -> Tensor:
    """What ``forward`` of a batch norm of torch does, with a residual and an activation.

    Args:
        norm: gives parameters, running statistics, which are updated, and settings.
        process_group: in training, of the processes over which the statistics are taken.
    """
    norm._check_input_dim(x)
    running_mean, running_var, training, momentum = next_statistics(norm)
    return functional.batch_norm_act(
        x,
        running_mean,
        running_var,
        norm.weight,
        norm.bias,
        training,
        momentum,
        norm.eps,
        residual=residual,
        activation=activation,
        negative_slope=negative_slope,
        process_group=process_group if norm.training else None,
    )


class NormAct(nn.Module):
    """What a norm layer with an activation and an optional residual is, beside being a norm.

    A class of it gives ``_normalize`` and calls ``_set_epilogue`` at the end of its ``__init__``.
    """

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float | Tensor
    ) -> Tensor:
        """act( norm(x) [+ residual] ) with an activation of the op."""
        raise NotImplementedError

    def _set_epilogue(
        self,
        apply_act: bool,
        act_layer: Callable[..., nn.Module] | str | None,
        act_kwargs: Mapping[str, Any] | None,
        inplace: bool,
        drop_layer: Callable[[], nn.Module] | None,
    ) -> None:
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = create_activation(act_layer if apply_act else None, act_kwargs, inplace)

    def epilogue(self) -> tuple[str, float | Tensor, tuple[nn.Module, ...]]:
        """What follows the norm: an activation of the op with its slope, and what runs after it.

        The slope is a tensor for "prelu". What runs after the op is nothing, or ``act`` where the
        op has no such activation or ``act`` has hooks, or ``drop`` and ``act``, between which the
        residual is then added.
        """
        drop, act = self._modules["drop"], self._modules["act"]
        assert drop is not None and act is not None
        if type(drop) is not nn.Identity or not is_plain(drop):
            return "identity", 0.0, (drop, act)
        fused = activation_of_call(act) if is_plain(act) else None
        return ("identity", 0.0, (act,)) if fused is None else (*fused, ())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act( drop( norm(x) ) [+ residual] ).

        Args:
            x: as torch's layer takes it.
            residual: like ``x``.

        Raises:
            ValueError: another number of dimensions, or one value per channel in training.
            RuntimeError: an argument whose size, dtype or device does not fit.
        """
        if observer.listening():
            observer.tell(observer.NormCall(self), "", x)
        activation, negative_slope, rest = self.epilogue()
        residual_of_op = residual if len(rest) < 2 else None
        y = self._normalize(x, residual_of_op, activation, negative_slope)
        if not rest:
            return y
        if len(rest) == 2:
            y = self.drop(y)
            if residual is not None:
                y = y + residual
        return self.act(y)


def makes_norm_act(layer: Any) -> bool:
    """Whether ``layer`` is a class of norm with activation, perhaps in a ``functools.partial``."""
    while isinstance(layer, functools.partial):
        layer = layer.func
    return isinstance(layer, type) and issubclass(layer, NormAct)


class BatchNormAct(NormAct, _BatchNorm):
    """What the layers for 1 to 3 spatial dimensions share; use one of those."""

    # The convolution with this norm folded in, see conv_bn_act.py: not part of the state.
    _folded: Any = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] | str | None = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self._set_epilogue(apply_act, act_layer, act_kwargs, inplace, drop_layer)

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float | Tensor
    ) -> Tensor:
        return normalize(self, x, residual, activation, negative_slope, self._group())

    def _group(self) -> Any:
        """The processes over which statistics are taken; None for this one."""
        return None

    # What was folded is checked at every use; here it is dropped because it takes memory.

    def _drop_folded(self) -> None:
        self.__dict__.pop("_folded", None)

    def train(self, mode: bool = True) -> BatchNormAct:
        self._drop_folded()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> BatchNormAct:
        self._drop_folded()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_folded()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_folded", None)
        return state


class BatchNormAct1d(BatchNormAct, nn.BatchNorm1d):
    """Batch norm over (N, C) or (N, C, L) inputs, residual and activation in one op.

    See :class:`BatchNormAct2d`.
    """


class BatchNormAct2d(BatchNormAct, nn.BatchNorm2d):
    """Batch norm over (N, C, H, W) inputs, residual and activation in one op.

    ``y = act( weight * (x - mean) / sqrt(var + eps) + bias [+ residual] )`` (Ioffe and Szegedy,
    "Batch Normalization", 2015). Stands for ``nn.BatchNorm2d`` followed by an addition and an
    activation: same parameters, buffers and ``state_dict``, same results, with fewer passes over
    memory and fewer saved activations. Signature, and the children ``drop`` and ``act``, are those
    of timm's ``BatchNormAct2d``; ``forward`` takes a residual besides.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` makes a plain ``SyncBatchNorm`` of it, as of
    every subclass of ``nn.BatchNorm2d``: activation and residual would be lost.

    Args:
        num_features: C.
        eps: added to the variance, inside the root.
        momentum: weight of a batch in the running statistics; None: their plain mean over batches.
        affine: learn weight and bias, (C,) each.
        track_running_stats: keep running statistics and normalise with them in evaluation.
        apply_act: False for no activation.
        act_layer: class of the activation or its name. nn.ReLU, nn.LeakyReLU, nn.PReLU with one
            slope (on a CPU), nn.SiLU, nn.GELU() and nn.Identity (or None) are part of the fused op;
            any other runs after it.
        act_kwargs: arguments of the activation, such as ``{"negative_slope": 0.2}``.
        inplace: passed to an activation that runs after the op; the fused op never overwrites
            its input.
        drop_layer: class of a layer between norm and activation, before the residual is added.
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: an unknown name of an activation.

    Shape: input, residual and output (N, C, H, W); float32, bfloat16, float16 or float64.
    """


class BatchNormAct3d(BatchNormAct, nn.BatchNorm3d):
    """Batch norm over (N, C, D, H, W) inputs, residual and activation in one op.

    See :class:`BatchNormAct2d`.
    """
