"""``explain``: which path every fused step takes in one call."""

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
from ..nn.observer import BlockCall
from ..ops import conv_bn_act
from . import layers
from .fusing import fuse_report, fused_blocks, join
from .report import FuseReport
from .steps import FOLDED, AnyStep, Step


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
    """Hears blocks begin and end, and their steps."""

    def __init__(self, model: nn.Module) -> None:
        self.paths: list[Path] = []
        self.running: list[tuple[str, nn.Module, list[AnyStep]]] = []
        for name, block in fused_blocks(model):
            block.register_forward_pre_hook(self._begin(name))
            block.register_forward_hook(self._end(name))

    def _begin(self, name: str) -> Any:
        def hook(block: Any, args: tuple[Any, ...]) -> None:
            self.running.append((name, block, []))

        return hook

    def _end(self, name: str) -> Any:
        def hook(block: Any, args: tuple[Any, ...], output: Any) -> None:
            _, _, steps = self.running.pop()
            if not steps:
                why = block._resops_plan.why_not(block, *args)
                self.paths.append(Path(name, "", "original forward", why))

        return hook

    def hear(self, step: AnyStep | BlockCall, path: str, x: Tensor) -> None:
        if isinstance(step, BlockCall):  # of resops.nn
            return
        name, block, steps = self.running[-1]
        steps.append(step)
        reasons = (_why(path, x), _convolution(block, step, path, x))
        why = "; ".join(filter(None, reasons))
        self.paths.append(Path(join(name, *step.place), step.pattern, path, why))


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


def _layer_paths(model: nn.Module, inputs: tuple[Any, ...]) -> list[Path]:
    """Of every norm layer of resops.nn, and of every block that is one op, in the order of the
    calls."""
    names = {module: name for name, module in model.named_modules()}
    if not any(isinstance(module, NormAct | NormThenAct) for module in names):
        return []
    blocks: list[BlockCall] = []
    # Modules with hooks would be called one by one: first without, to learn which are not.
    with torch.random.fork_rng(), observer.listen(lambda call, path, x: blocks.append(call)):
        model(*inputs)
    inside = {module for call in blocks for module in (*call.norms, *call.convolutions)}
    paths: list[Path] = []
    last: list[tuple[Tensor, Tensor, nn.Module]] = []  # convolution: output, input and itself

    def hear_convolution(conv: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        last[:] = [(output, args[0], conv)]

    def hear(layer: nn.Module, args: tuple[Any, ...]) -> None:
        path, why = _layer_path(layer, args[0])
        for output, x, conv in last:
            if output is args[0] and isinstance(layer, NormAct):
                folded = not layer.training and not torch.is_grad_enabled()
                taken = _convolution_path(conv, x, layer.epilogue()[0], folded)
                why = "; ".join(filter(None, (why, taken)))
        act = type(layer.act).__name__
        pattern = type(layer).__name__ + ("" if act == "Identity" else f"+{act}")
        paths.append(Path(names[layer], pattern, path, why))

    def hear_block(call: BlockCall, path: str, x: Tensor) -> None:
        paths.append(_block_path(names[call.norms[0]], call, path, x))

    for module in names.keys() - inside:
        if isinstance(module, NormAct | NormThenAct):
            module.register_forward_pre_hook(hear)
        elif isinstance(module, nn.Conv2d | nn.Conv3d) and module.weight.device.type != "cpu":
            module.register_forward_hook(hear_convolution)
    with torch.random.fork_rng(), observer.listen(hear_block):
        model(*inputs)
    return paths


def _block_path(first_norm: str, call: BlockCall, path: str, x: Tensor) -> Path:
    """Of a block of modules; the name of the first norm in it has that of the block in front."""
    name = ".".join(first_norm.split(".")[: -call.depth])
    if call.why is not None:
        path = f"layer by layer, {path}"
    return Path(name, call.pattern, path, "; ".join(filter(None, [call.why, _why(path, x)])))


def _layer_path(layer: nn.Module, x: Tensor) -> tuple[str, str]:
    """Which kernels a norm layer takes for ``x``, and why no better ones."""
    if isinstance(layer, NormThenAct):
        return "its own forward", f"{type(layer.norm).__name__} has no fused form"
    assert isinstance(layer, NormAct)
    tensors = [x, *layer.parameters()] if isinstance(layer, nn.GroupNorm) else []
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "torch", "group norm has kernels where no gradient is recorded"
    path = _dispatch.choose("batch_norm", x)
    rest = layer.epilogue()[2]
    after = [f"{type(module).__name__} has no fused form and runs after it" for module in rest]
    return path, "; ".join([*after, *filter(None, [_why(path, x)])])


def explain(model: nn.Module, *inputs: Any) -> Explanation:
    """Call a fused model, and tell which path every fused step took, and why no better one.

    Of a model that was not fused, but made of the layers of resops.nn, such as those of
    resops.models, it tells the path of every norm layer, and of every block that is one op.

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
    if next(fused_blocks(model), None) is None:
        paths = _layer_paths(copy.deepcopy(model), inputs)
        if not paths:
            raise ValueError("nothing in the model is fused: call resops.fuse(model) first")
        return Explanation(tuple(paths), FuseReport((), ()))
    other = copy.deepcopy(model)
    listener = _Listener(other)
    with torch.random.fork_rng(), observer.listen(listener.hear):
        other(*inputs)
    return Explanation(tuple(listener.paths), fuse_report(model))
