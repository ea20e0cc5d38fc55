"""The dense blocks of torchvision and timm, and their transitions, as one op each (Huang, Liu, van
der Maaten and Weinberger, "Densely Connected Convolutional Networks", 2017, section 3):
resops.functional.dense_block and transition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._autograd import PLAIN_TENSORS
from ..nn import observer
from ..nn.batch_norm import is_plain, normalize
from ..nn.conv_bn_act import convolve, folded_conv
from ..nn.dense_block import is_average_of_four, is_of_the_op, norm_conv
from ..ops.dense_block import dense_block, fallback_reason
from ..reference.dense_block import DenseLayer
from . import layers, measured
from .blocks import kept
from .layers import Path
from .steps import StepCall


class _Family(NamedTuple):
    """How a package writes its dense layer: children norm1, conv1, norm2 and conv2, and"""

    layer: str  # qualified name of its class
    relus: tuple[str, ...]  # children of it after the norms; else each norm has its own
    checkpoints: str  # attribute: the layer is run under activation checkpointing


_FAMILIES = {
    "torchvision.models.densenet._DenseBlock": _Family(
        "torchvision.models.densenet._DenseLayer", ("relu1", "relu2"), "memory_efficient"
    ),
    "timm.models.densenet.DenseBlock": _Family(
        "timm.models.densenet.DenseLayer", (), "grad_checkpointing"
    ),
}
# The same of a transition, a sequence of norm, conv and pool: whether the ReLU is a child of it.
_TRANSITIONS = {
    "torchvision.models.densenet._Transition": True,
    "timm.models.densenet.DenseTransition": False,
}
_NORMS, _CONVS = ("norm1", "norm2"), ("conv1", "conv2")


@dataclass(frozen=True)
class DenseBlockStep:
    """A whole dense block."""

    layers: tuple[str, ...]
    relus: tuple[str, ...]
    checkpoints: str
    pattern: str = "DenseBlock"
    place: Path = ()

    def _paths(self, names: tuple[str, ...]) -> tuple[Path, ...]:
        return tuple((layer, name) for layer in self.layers for name in names)

    @property
    def norms(self) -> tuple[Path, ...]:
        """Those that the step stands for."""
        return self._paths(_NORMS)

    @property
    def folds(self) -> tuple[tuple[Path, Path], ...]:
        """Convolutions, and the norms that are folded into them in evaluation."""
        return tuple(((layer, "conv1"), (layer, "norm2")) for layer in self.layers)

    @property
    def identities(self) -> tuple[Path, ...]:
        """Children that have to return their input."""
        return () if self.relus else tuple((*path, "drop") for path in self.norms)

    def children(self) -> list[Path]:
        """The children that are not called any more."""
        acts = self._paths(self.relus) or tuple((*path, "act") for path in self.norms)
        of_layers = (*self.norms, *self._paths(_CONVS), *acts, *self.identities)
        return [*((layer,) for layer in self.layers), *of_layers]

    def pairs(self, block: nn.Module) -> Iterator[tuple[Any, Any]]:
        """Each norm with the convolution behind it."""
        for name in self.layers:
            children: Any = block._modules[name]._modules  # type: ignore[union-attr]
            for norm, conv in zip(_NORMS, _CONVS, strict=True):
                yield children[norm], children[conv]

    def run(self, block: nn.Module, keeper: Any, x: Tensor, residual: Tensor | None) -> Tensor:
        """All features of the block, in the memory format of ``x``."""
        pairs = list(self.pairs(block))
        parts = [norm_conv(norm, conv) for norm, conv in pairs]
        dense = [DenseLayer(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
        if observer.listening():
            why = fallback_reason(x, dense, None)
            observer.tell(StepCall(block, self, why), layers.backend_of(pairs[0][0]), x)

        def narrow(index: int, z: Tensor) -> Tensor:
            conv, norm = pairs[2 * index][1], pairs[2 * index + 1][0]
            keeper = None if torch.compiler.is_compiling() else kept(block, index)
            y = folded_conv(conv, norm, keeper, z, None, "relu", 0.0)
            return normalize(norm, convolve(conv, z), None, "relu", 0.0) if y is None else y

        return _in_format_of(x, dense_block(x, dense, narrow=narrow))


@dataclass(frozen=True)
class TransitionStep:
    """A whole transition between two dense blocks."""

    relu: bool  # as a child of the transition
    pattern: str = "DenseTransition"
    place: Path = ()
    norms: tuple[Path, ...] = (("norm",),)
    folds: tuple[tuple[Path, Path], ...] = ()

    @property
    def identities(self) -> tuple[Path, ...]:
        """Children that have to return their input."""
        return () if self.relu else (("norm", "drop"),)

    def act(self) -> Path:
        """The ReLU."""
        return ("relu",) if self.relu else ("norm", "act")

    def children(self) -> list[Path]:
        """The children that are not called any more."""
        return [("norm",), self.act(), ("conv",), ("pool",), *self.identities]

    def pairs(self, block: nn.Module) -> Iterator[tuple[Any, Any]]:
        """The norm with the convolution behind it."""
        yield block._modules["norm"], block._modules["conv"]

    def run(self, block: nn.Module, keeper: Any, x: Tensor, residual: Tensor | None) -> Tensor:
        """Of half the height and width, in the memory format of ``x``."""
        norm, conv = next(self.pairs(block))
        end = norm_conv(norm, conv)
        if observer.listening():
            why = fallback_reason(x, (), end)
            observer.tell(StepCall(block, self, why), layers.backend_of(norm), x)
        return _in_format_of(x, dense_block(x, (), end))


WholeStep = DenseBlockStep | TransitionStep


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


def whole_step(block: nn.Module) -> WholeStep | None:
    """The step that stands for ``block``, or None."""
    return _dense_block_step(block) or _transition_step(block)


def _class_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _transition_step(block: nn.Module) -> TransitionStep | None:
    relu = _TRANSITIONS.get(_class_name(block))
    names = ["norm", "conv", "pool"] if not relu else ["norm", "relu", "conv", "pool"]
    if relu is None or [n for n, c in block._modules.items() if c is not None] != names:
        return None
    step = TransitionStep(relu)
    norm, conv = next(step.pairs(block))
    fits = _fits(norm, conv, relu) and _is_relu(layers.child(block, step.act()))
    return step if fits and not _setting_of_transition(block) else None


def _is_relu(module: nn.Module) -> bool:
    return type(module) is nn.ReLU and is_plain(module)


def _setting_of_transition(block: Any) -> str:
    """What else it does than the op; empty if nothing."""
    if block.conv.kernel_size != (1, 1):
        return "its convolution is not 1x1"
    return "" if is_average_of_four(block.pool) else "its pool is no average of 2x2"


def _dense_block_step(block: nn.Module) -> DenseBlockStep | None:
    family = _FAMILIES.get(_class_name(block))
    if family is None or not block._modules:
        return None
    for layer in block._modules.values():
        if layer is None or _class_name(layer) != family.layer or not is_plain(layer):
            return None
    step = DenseBlockStep(tuple(block._modules), family.relus, family.checkpoints)
    fits = all(_fits(norm, conv, bool(step.relus)) for norm, conv in step.pairs(block))
    relus = (layers.child(block, path) for path in step._paths(step.relus))
    if not fits or not all(_is_relu(relu) for relu in relus):
        return None
    return None if _setting_of_layers(step, block) else step


def _fits(norm: nn.Module, conv: nn.Module, bare: bool) -> bool:
    """Whether these are a norm, bare or with a ReLU, and a convolution of the op."""
    kind = layers.norm_kind(norm)
    if kind is None or type(conv) not in kind.convs or kind.label != "BN":
        return False
    if not (is_plain(conv) and is_of_the_op(conv)):
        return False
    if bare:
        return not kind.has_activation
    return kind.has_activation and type(norm._modules["act"]) is nn.ReLU


def _setting_of_layers(step: DenseBlockStep, block: Any) -> str:
    """What else its layers do than the op; empty if nothing."""
    for name in step.layers:
        layer = block._modules[name]
        if layer.drop_rate > 0:
            return f"{name} has a dropout"
        if getattr(layer, step.checkpoints):
            return f"{name} is run under activation checkpointing"
    return ""


def refusal(block: Any, x: Tensor) -> str:
    """Why a call goes to the original forward; empty if it is one of the op."""
    if type(x) not in PLAIN_TENSORS or x.dim() != 4 or not x.is_floating_point():
        return "its input is no plain tensor of size (N, C, H, W)"
    step: WholeStep = block._resops_plan.steps[0]
    whole = isinstance(step, DenseBlockStep)
    why = measured.slower(measured.DENSE_BLOCK if whole else measured.TRANSITION, x)
    if why:
        return why
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.get_autocast_dtype(kind):
        return "autocast is on, and its input of another dtype"
    for _, conv in step.pairs(block):
        if not is_of_the_op(conv):
            return "a convolution was changed"
    if isinstance(step, DenseBlockStep):
        return _setting_of_layers(step, block)
    return _setting_of_transition(block) or (
        "" if min(x.shape[2:]) > 1 else "its image is too small"
    )
