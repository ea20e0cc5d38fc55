"""How one block can be fused: its graph and the steps in it, or why there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..nn.batch_norm import is_plain
from . import layers, patterns
from .dense_blocks import refusal as refusal_of_whole
from .dense_blocks import whole_step
from .layers import Path
from .report import Reason
from .steps import AnyStep, Match, Matcher, Step
from .tracing import Untraceable, trace


@dataclass
class Blueprint:
    """What :func:`blueprint` found out about a block."""

    block: nn.Module
    graph: fx.Graph = field(default_factory=fx.Graph)
    matches: list[Match] = field(default_factory=list)
    inlined: tuple[Path, ...] = ()
    accepts: Callable[..., bool] | None = None
    refusal: Callable[..., str] | None = None  # see Plan
    # Why a norm of the block is in no match, and what exactly was found.
    refusals: dict[nn.Module, tuple[Reason, str]] = field(default_factory=dict)

    def norms(self) -> list[nn.Module]:
        """The norms of the steps."""
        paths = (path for match in self.matches for path in match.step.norms)
        return [layers.child(self.block, path) for path in paths]


def has_forward(module: nn.Module) -> bool:
    """Whether ``module`` can be called: nn.ModuleList and nn.ModuleDict cannot."""
    return type(module).forward is not nn.Module.forward


def is_sequential(module: nn.Module) -> bool:
    """Whether calling ``module`` calls its children one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _ends_in_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a run of layers that ends in a norm without activation, to which the
    block around it may add something."""
    children = [c for c in module.children() if type(c) is not nn.Identity]
    if not children or not is_plain(module) or not has_forward(module):
        return False
    last = children[-1]
    kind = layers.norm_kind(last)
    if kind is not None:
        simple = all(not list(c.children()) or layers.is_norm(c) for c in children)
        bare = not kind.has_activation or type(last._modules.get("act")) is nn.Identity
        return bare and (is_sequential(module) or (simple and len(children) < 4))
    return is_sequential(module) and _ends_in_norm(last)


def _crosses(
    match: Match, deeper: frozenset[nn.Module], block: nn.Module, inlined: dict[nn.Module, Path]
) -> bool:
    """Whether the step takes in more than the child that holds its norm could give it."""
    step = match.step
    assert isinstance(step, Step)
    if layers.child(block, step.norm) not in deeper:
        return False
    if match.residual is not None or step.activation != "identity":
        return True
    return step.act is not None and not any(
        step.act[: len(path)] == path == step.norm[: len(path)] for path in inlined.values()
    )


def callable_children(block: nn.Module) -> Iterator[tuple[Path, nn.Module]]:
    """The children that the forward of ``block`` may call: those in its lists are among them."""
    for name, child in block.named_children():
        if has_forward(child):
            yield (name,), child
        else:
            for path, inner in callable_children(child):
                yield (name, *path), inner


def _inlinable(block: nn.Module) -> dict[nn.Module, Path]:
    """Children, at any depth, whose layers the graph of ``block`` may show."""
    found: dict[nn.Module, Path] = {}

    def visit(module: nn.Module, start: Path) -> None:
        for path, child in callable_children(module):
            if _ends_in_norm(child):
                found[child] = (*start, *path)
                if is_sequential(child):
                    visit(child, found[child])

    if not is_sequential(block):
        visit(block, ())
    return found


def _matched(
    block: nn.Module,
    allowed: frozenset[nn.Module],
    forward: Callable[..., Any],
    inlined: dict[nn.Module, Path],
) -> Blueprint:
    graph = trace(block, forward, frozenset(inlined))
    matcher = Matcher(block, graph, allowed)
    matches = sorted(matcher.matches.values(), key=lambda m: matcher.order[m.nodes[-1]])
    called = set(matcher.calls)
    refusals = dict(matcher.refusals)
    for norm in allowed - called:
        refusals[norm] = Reason.NOT_CALLED, ""
    return Blueprint(block, graph, matches, tuple(inlined.values()), refusals=refusals)


def blueprint(block: nn.Module, allowed: frozenset[nn.Module]) -> Blueprint:
    """How ``block`` can be fused.

    Args:
        allowed: the norms that may be fused.
    """
    if block in allowed:
        return _norm_with_activation(block)
    whole = whole_step(block)
    if whole is not None and all(layers.child(block, path) in allowed for path in whole.norms):
        found = _of_one_step(block, whole)
        found.refusal = refusal_of_whole
        return found
    pattern = patterns.pattern_for(type(block))
    forward = type(block).forward if pattern is None else pattern.forward
    accepts = None if pattern is None else pattern.accepts
    inlined = {} if pattern is not None else _inlinable(block)
    own = frozenset(child for _, child in callable_children(block)) & allowed
    if inlined:
        deeper = frozenset(c for m in inlined for _, c in callable_children(m)) & allowed
        try:
            found = _matched(block, own | deeper, forward, inlined)
        except Untraceable:
            pass
        else:
            if any(_crosses(m, deeper, block, inlined) for m in found.matches):
                return found
    if not own:
        return Blueprint(block)
    try:
        found = _matched(block, own, forward, {})
    except Untraceable as error:
        why = (error.reason, str(error))
        return Blueprint(block, refusals=dict.fromkeys(own, why))
    found.accepts = accepts
    found.refusal = None if pattern is None else pattern.refusal
    return found


def _of_one_step(block: nn.Module, step: AnyStep) -> Blueprint:
    """A block that the step stands for as a whole."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_module("block", (x,))
    graph.output(call)
    return Blueprint(block, graph, [Match(step, [call], x, None)])


def _norm_with_activation(norm: nn.Module) -> Blueprint:
    """timm's BatchNormAct2d by itself."""
    kind = layers.norm_kind(norm)
    assert kind is not None and kind.has_activation
    act = norm._modules["act"]
    assert act is not None
    label = layers.activation_label(act)
    if not layers.is_activation(act) or not label:
        why = layers.activation_refusal(act) if not layers.is_activation(act) else None
        return Blueprint(norm, refusals={norm: why or (Reason.NOTHING_BESIDE, "")})
    step = Step((), None, ("act",), identities=(("drop",),), pattern=f"{kind.label}+{label}")
    return _of_one_step(norm, step)
