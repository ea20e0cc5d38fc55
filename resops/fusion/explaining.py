"""``explain``: which path every fused step, and every layer of resops.nn, takes in one call."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _dispatch
from ..nn import observer
from ..nn.batch_norm import NormAct, activation_of_call
from ..nn.norm_layers import NormThenAct
from ..ops import conv_bn_act
from . import layers
from .blocks import OriginalCall
from .fusing import fuse_report, fused_blocks, join
from .report import FuseReport
from .steps import FOLDED, AnyStep, Step, StepCall


@dataclass(frozen=True)
class Path:
    """What a fused step, or a fused block that went another way, did in one call.

    Attributes:
        name: qualified name of the norm, or of the block.
        pattern: what the step stands for; empty for a block.
        path: which kernels ran, or "original forward".
        why: the reason, where it is not the best path.
    """

    name: str
    pattern: str
    path: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found, in the order of the calls."""

    paths: tuple[Path, ...]
    report: FuseReport

    def __str__(self) -> str:
        rows = [(p.name or "(model)", p.pattern, p.path, p.why) for p in self.paths]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[3]]).rstrip())
        left = [name for entry in self.report.skipped for name in entry.modules]
        if left:
            lines.append(f"not fused: {', '.join(left)} (resops.fuse_report says why)")
        return "\n".join(lines)


class _Listener:
    """Hears fused blocks and their steps, and the layers and blocks of resops.nn."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.paths: list[Path] = []
        # Norms and convolutions that are part of a block of which a row tells already.
        self.inside: set[nn.Module] = set()
        # The input of the convolution whose output goes to a norm.
        self.convolutions: dict[nn.Module, tuple[nn.Module, Tensor]] = {}

    def hear(self, call: Any, path: str, x: Tensor | None) -> None:
        if isinstance(call, OriginalCall):
            self.paths.append(Path(self.names[call.block], "", path, call.why))
            return
        assert x is not None
        if isinstance(call, StepCall):
            if call.why is not None:
                path = f"layer by layer, {path}"
            reasons = (call.why, _why(path, x), _convolution(call.block, call.step, path, x))
            name = join(self.names[call.block], *call.step.place)
            self.paths.append(Path(name, call.step.pattern, path, _joined(*reasons)))
        elif isinstance(call, observer.BlockCall):
            self._hear_block(call, path, x)
        elif call.norm not in self.inside:
            self._hear_layer(call, x)

    def _hear_block(self, call: observer.BlockCall, path: str, x: Tensor) -> None:
        self.inside.update(call.norms, call.convolutions)
        parts = self.names[call.norms[0]].split(".")
        name = ".".join(parts[: len(parts) - call.levels])
        if call.why is not None:
            path = f"layer by layer, {path}"
        self.paths.append(Path(name, call.pattern, path, _joined(call.why, _why(path, x))))

    def _hear_layer(self, call: observer.NormCall | observer.ConvNormCall, x: Tensor) -> None:
        norm = call.norm
        if isinstance(call, observer.ConvNormCall) and not call.folded:
            self.convolutions[norm] = call.conv, x
            return
        if isinstance(call, observer.ConvNormCall):
            assert isinstance(norm, NormAct)
            path, why = FOLDED, _runs_after(norm)
            conv: tuple[nn.Module, Tensor] | None = (call.conv, x)
        else:
            path, why = _layer_path(norm, x)
            conv = self.convolutions.pop(norm, None)
        if conv is not None and isinstance(norm, NormAct) and conv[1].device.type != "cpu":
            folded = not norm.training and not torch.is_grad_enabled()
            why = _joined(why, _convolution_path(*conv, norm.epilogue()[0], folded))
        act = type(norm.act).__name__
        pattern = type(norm).__name__ + ("" if act == "Identity" else f"+{act}")
        self.paths.append(Path(self.names[norm], pattern, path, why))


def _joined(*reasons: str | None) -> str:
    return "; ".join(dict.fromkeys(filter(None, reasons)))


def _why(path: str, x: Tensor) -> str:
    """Why a step took no better path, and whether its input is copied first."""
    reasons = []
    if path == "reference" and _dispatch.get_backend() == "auto":
        refused = _dispatch.refusal("native", "batch_norm", x)
        reasons.append(refused or f"no kernel has been measured on {x.device.type} yet")
    if not _is_dense(x):
        reasons.append("the input is not dense and is copied")
    return "; ".join(reasons)


def _convolution(block: nn.Module, step: AnyStep, path: str, x: Tensor) -> str:
    """What computes the convolution of a step on a GPU, and why; on a CPU ``path`` has it all."""
    if not isinstance(step, Step) or step.conv is None or x.device.type == "cpu":
        return ""
    fused: tuple[str, Any] | None = (step.activation, step.negative_slope)
    if step.act is not None:
        fused = activation_of_call(layers.child(block, step.act))
    conv = layers.child(block, step.conv)
    activation = "identity" if fused is None else fused[0]
    return _convolution_path(conv, x, activation, folded=path == FOLDED)


def _convolution_path(conv: Any, x: Tensor, activation: str, folded: bool) -> str:
    if activation == "prelu":  # which runs after it
        activation = "identity"
    taken = conv_bn_act.path(
        x, conv.weight, groups=conv.groups, activation=activation, training=not folded
    )
    return f"convolution: {taken.reason}"


def _is_dense(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (
        x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])
    )


def _layer_path(layer: nn.Module, x: Tensor) -> tuple[str, str]:
    """Which kernels a norm layer takes for ``x``, and why no better ones."""
    if isinstance(layer, NormThenAct):
        return "its own forward", f"{type(layer.norm).__name__} has no fused form"
    assert isinstance(layer, NormAct)
    tensors = [x, *layer.parameters()] if isinstance(layer, nn.GroupNorm) else []
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "torch", "group norm has kernels where no gradient is recorded"
    path = _dispatch.choose("batch_norm", x)
    return path, _joined(_runs_after(layer), _why(path, x))


def _runs_after(layer: NormAct) -> str:
    rest = layer.epilogue()[2]
    return _joined(*(f"{type(act).__name__} has no fused form and runs after it" for act in rest))


def explain(model: nn.Module, *inputs: Any) -> Explanation:
    """Call a fused model, and tell which path every fused step took, and why no better one.

    Of the layers of resops.nn, of which the models of resops.models are made, it tells the path of
    every norm, and of every block that is one op.

    On a GPU it also tells what computes the convolution before a norm, and why.

    The call is made on a copy, in the model's mode (training or evaluation) and the caller's (such
    as ``torch.no_grad``): statistics, random numbers and hooks of the model stay as they are.

    Args:
        model: what :func:`resops.fuse` returned.
        inputs: arguments of the call.

    Returns:
        an object that prints as a table; ``.paths`` has its rows.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing in it is fused, and there is no norm of resops.nn.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain expects an nn.Module, but got {type(model).__name__}")
    fused = next(fused_blocks(model), None) is not None
    if not fused and not any(isinstance(m, NormAct | NormThenAct) for m in model.modules()):
        raise ValueError("nothing in the model is fused: call resops.fuse(model) first")
    other = copy.deepcopy(model)
    listener = _Listener(other)
    with torch.random.fork_rng(), observer.listen(listener.hear):
        other(*inputs)
    report = fuse_report(model) if fused else FuseReport((), ())
    return Explanation(tuple(listener.paths), report)
