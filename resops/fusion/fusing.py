"""``fuse``, ``unfuse`` and ``fuse_report``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from .. import _dispatch
from ..nn.batch_norm import NormAct
from . import layers
from .blocks import FusedBlock, fused_class, swap_class
from .blueprint import Blueprint, blueprint, has_forward
from .report import FusedEntry, FuseReport, Reason, SkippedEntry

Module = TypeVar("Module", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]

_SKIPPED = "_resops_skipped"  # attribute of the model: why which norms were left as they are


class FuseError(RuntimeError):
    """``strict=True`` and some norm cannot be fused; the message lists them."""


class Analysis:
    """What can be fused in a model, and why the rest cannot. Changes nothing."""

    def __init__(self, model: nn.Module, module_filter_fn: Filter | None = None) -> None:
        self.names = {m: name for name, m in model.named_modules()}
        self.holders = _holders(model)
        self.refusals: dict[nn.Module, tuple[Reason, str]] = {}
        self.blueprints: list[Blueprint] = []
        norms = [m for m in model.modules() if layers.is_norm(m)]
        free = set()
        for norm in norms:
            why = self._refusal(norm, module_filter_fn)
            if why is None:
                free.add(norm)
            else:
                self.refusals[norm] = why
        for block in list(model.modules()):  # from the outside in
            if free and has_forward(block) and not isinstance(block, torch.jit.ScriptModule):
                self._visit(block, free)
        for norm in free:
            if isinstance(norm, NormAct):
                self.refusals[norm] = Reason.ALREADY_FUSED, type(norm).__name__
            self.refusals.setdefault(norm, (Reason.NOTHING_BESIDE, ""))

    def _refusal(
        self, norm: nn.Module, module_filter_fn: Filter | None
    ) -> tuple[Reason, str] | None:
        why = layers.refusal(norm)
        holders = self.holders.get(norm, [])
        if why is None and len(_places(holders)) > 1:
            why = Reason.SHARED, ""
        if why is None and module_filter_fn is not None:
            for module in (norm, *holders):
                if not module_filter_fn(module, self.names[module]):
                    return Reason.FILTERED, ""
        return why

    def _visit(self, block: nn.Module, free: set[nn.Module]) -> None:
        if layers.is_norm(block) and not _is_container(block):
            return
        found = blueprint(block, frozenset(free))
        self.refusals.update(found.refusals)
        for norm in found.norms():
            free.discard(norm)
            self.refusals.pop(norm, None)
        if found.matches:
            self.blueprints.append(found)


def _is_container(norm: nn.Module) -> bool:
    """Whether the forward of ``norm`` itself can be replaced: timm's, with its activation."""
    kind = layers.norm_kind(norm)
    return kind is not None and kind.has_activation and not isinstance(norm, NormAct)


def _holders(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Where every module stands: the modules of which it is a child, once for every name."""
    found: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        for child in module._modules.values():
            if child is not None:
                found.setdefault(child, []).append(module)
    return found


def _places(holders: list[nn.Module]) -> list[nn.Module]:
    """The holders that differ: a block that has a layer as an attribute and in a list of its own,
    as nnU-Net's have, is one place."""
    if len(holders) < 2:
        return holders
    inside = {holder: set(holder.modules()) for holder in holders}
    return [
        holder
        for holder in holders
        if not any(other is not holder and other in inside[holder] for other in holders)
    ]


def _check(model: object) -> None:
    """Raise for what cannot be fused as a whole."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse expects an nn.Module, but got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f" (at {name!r})" if name else ""
        if isinstance(module, FusedBlock):
            raise ValueError(f"the model is already fused{where}; resops.unfuse(model) undoes that")
        wrapper = _wrapper(module)
        if wrapper is not None:
            raise ValueError(
                f"fuse cannot look into {wrapper}{where}: fuse the model first, wrap it after"
            )
    if _SKIPPED in model.__dict__:
        raise ValueError("the model is already fused; resops.unfuse(model) undoes that")
    chosen = _dispatch.get_backend()
    missing = None if chosen == "auto" else _dispatch.unavailable_reason(chosen, "batch_norm")
    if missing is not None:
        raise _dispatch.BackendError(f"backend {chosen!r} cannot compute batch_norm: {missing}")


def _wrapper(module: nn.Module) -> str | None:
    """What a module that changes how a model is called is called; None for others."""
    name = type(module).__name__
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return name
    if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
        return "a model of torch.compile"
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule"
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        if isinstance(module, FSDPModule | FullyShardedDataParallel):
            return f"FSDP's {name}"
    return None


def fuse(
    model: Module,
    *,
    module_filter_fn: Filter | None = None,
    strict: bool = False,
    verbose: bool = False,
) -> Module:
    """Let the fused ops compute the norms of a model, with what stands beside them. In place.

    Norms of torch and timm, and the convolutions, additions and activations around them, become one
    op in nn.Sequential and in every block whose forward can be followed (docs/fuse.md). Nothing
    else changes: names, parameters, buffers, hooks and the results in training and evaluation stay,
    optimizers made before go on working, and the state dict loads both ways. Wrap the model (DDP,
    FSDP, torch.compile) after this call.

    Args:
        module_filter_fn: called with a norm, and with the module that holds it, and its qualified
            name; where it returns False the norm is left as it is.
        strict: raise if a norm cannot be fused.
        verbose: print the report.

    Returns:
        the same object.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it is already fused, or wrapped.
        FuseError: ``strict``, and a norm cannot be fused.
        BackendError: the backend that was chosen by name is not there.

        The model is then unchanged.
    """
    _check(model)
    analysis = Analysis(model, module_filter_fn)
    skipped = {
        analysis.names[norm]: (reason, detail)
        for norm, (reason, detail) in analysis.refusals.items()
    }
    left = {name: why for name, why in skipped.items() if why[0] is not Reason.ALREADY_FUSED}
    if strict and left:
        lines = [f"{name}: {reason.value}. {reason.hint}" for name, (reason, _) in left.items()]
        raise FuseError("these norms cannot be fused:\n" + "\n".join(lines))
    classes = [(found.block, fused_class(found)) for found in analysis.blueprints]
    done: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for block, cls in classes:
            before = type(block)
            swap_class(block, cls)
            done.append((block, before))
    except BaseException:
        for block, before in done:
            swap_class(block, before)
        raise
    model.__dict__[_SKIPPED] = skipped
    if verbose:
        print(fuse_report(model))
    return model


def unfuse(model: Module) -> Module:
    """Undo :func:`fuse`, in place; a model that is not fused stays as it is.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse expects an nn.Module, but got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, FusedBlock):
            module.restore_class()
        module.__dict__.pop(_SKIPPED, None)
    return model


def fused_blocks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The blocks that run fused, with their qualified names."""
    for name, module in model.named_modules():
        if isinstance(module, FusedBlock):
            yield name, module


def fused_norms(model: nn.Module) -> set[nn.Module]:
    """The norms that are computed by fused ops."""
    return {
        layers.child(block, path)
        for _, block in fused_blocks(model)
        for step in block._resops_plan.steps
        for path in step.norms
    }


def join(*names: str) -> str:
    """A qualified name."""
    return ".".join(name for name in names if name)


def fuse_report(model: nn.Module) -> FuseReport:
    """Which norms of a model are fused, in which pattern, and why the others are not.

    Args:
        model: fused or not; one that was not is reported as such.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_report expects an nn.Module, but got {type(model).__name__}")
    entries: dict[tuple[str, str, str], list[str]] = {}
    names = {m: name for name, m in model.named_modules()}
    covered = set()
    for name, block in fused_blocks(model):
        for step in block._resops_plan.steps:
            norms = [layers.child(block, path) for path in step.norms]
            covered.update(norms)
            key = (name, step.pattern, layers.backend_of(norms[0]))
            entries.setdefault(key, []).extend(names[norm] for norm in norms)
    fused = [
        FusedEntry(name, tuple(modules), pattern, backend)
        for (name, pattern, backend), modules in entries.items()
    ]
    skipped = []
    known = model.__dict__.get(_SKIPPED, {})
    for name, module in model.named_modules():
        if module in covered or not layers.is_norm(module):
            continue
        reason, detail = known.get(name, (Reason.NOT_FUSED, ""))
        hint = f"{reason.hint} ({detail})" if detail else reason.hint
        skipped.append(SkippedEntry(name.rpartition(".")[0], (name,), reason, hint))
    return FuseReport(tuple(fused), tuple(skipped))
