"""Runs of layers in the graph of a block that one fused op computes.

A step is a norm, with the convolution before it and the addition and the activation after it where
they are there, and where nothing else sees the values in between:

    act( norm( conv(x) ) [+ residual] )
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn import observer
from ..nn.batch_norm import activation_of_call
from ..nn.conv_bn_act import convolve, folded_conv
from ..reference.activation import activate
from . import layers
from .layers import Path
from .report import Reason

FOLDED = "folded into the convolution"  # the path of a step, as resops.explain tells it


@dataclass(frozen=True)
class Step:
    """One fused op of a block. Paths go from the block to its children."""

    norm: Path
    conv: Path | None = None
    act: Path | None = None
    # An activation that is a function, with its slope; where ``act`` is None.
    activation: str = "identity"
    negative_slope: float = 0.0
    # Further children that the step stands for, which return their input.
    identities: tuple[Path, ...] = ()
    pattern: str = ""

    @property
    def norms(self) -> tuple[Path, ...]:
        """Those that the step stands for."""
        return (self.norm,)

    @property
    def place(self) -> Path:
        """By whose name it is told."""
        return self.norm

    @property
    def folds(self) -> tuple[tuple[Path, Path], ...]:
        """Convolutions, and the norms that are folded into them in evaluation."""
        return () if self.conv is None else ((self.conv, self.norm),)

    def children(self) -> list[Path]:
        """The children that are not called any more."""
        paths = [self.norm, *self.identities]
        paths += [path for path in (self.conv, self.act) if path is not None]
        return [path for path in paths if path]

    def run(self, block: nn.Module, keeper: Any, x: Tensor, residual: Tensor | None) -> Tensor:
        """act( norm( conv(x) ) [+ residual] ).

        Args:
            keeper: keeps the folded convolution as its attribute ``_folded``.
        """
        norm = layers.child(block, self.norm)
        kind = layers.norm_kind(norm)
        assert kind is not None
        slope: float | Tensor
        activation, slope, act = self.activation, self.negative_slope, None
        if self.act is not None:
            module = layers.child(block, self.act)
            fused = activation_of_call(module)
            activation, slope = ("identity", 0.0) if fused is None else fused
            act = module if fused is None else None  # since then its settings were changed
        if self.conv is not None:
            conv = layers.child(block, self.conv)
            if not norm.training and type(conv) in kind.convs:
                y = folded_conv(conv, norm, keeper, x, residual, activation, slope)
                if y is not None:
                    observer.tell(StepCall(block, self), FOLDED, x)
                    return y if act is None else act(y)
            x = convolve(conv, x)
        if observer.listening():
            observer.tell(StepCall(block, self), layers.backend_of(norm), x)
        if residual is None or residual.shape == x.shape:
            y = kind.run(norm, x, residual, activation, slope)
        else:  # one of the two is broadcast
            y = kind.run(norm, x, None, "identity", 0.0) + residual
            y = y if act is not None else activate(y, activation, slope)
        return y if act is None else act(y)


_ADDITIONS = {
    ("call_function", operator.add),
    ("call_function", operator.iadd),
    ("call_function", torch.add),
    ("call_method", "add"),
    ("call_method", "add_"),
}
# Of these, the left operand is overwritten: it has to be what the norm made.
_IN_PLACE_ADDITIONS = {("call_function", operator.iadd), ("call_method", "add_")}
_ACTIVATION_FUNCTIONS: dict[tuple[str, Any], str] = {
    **{("call_function", f): "relu" for f in (F.relu, F.relu_, torch.relu, torch.relu_)},
    ("call_method", "relu"): "relu",
    ("call_method", "relu_"): "relu",
    ("call_function", F.leaky_relu): "leaky_relu",
    ("call_function", F.silu): "silu",
    ("call_function", F.gelu): "gelu",
}
_LABELS = {"relu": "ReLU", "leaky_relu": "LeakyReLU", "silu": "SiLU", "gelu": "GELU"}


class AnyStep(Protocol):
    """What a block does in one op: a :class:`Step`, or a whole dense block."""

    @property
    def norms(self) -> tuple[Path, ...]: ...
    @property
    def place(self) -> Path: ...
    @property
    def pattern(self) -> str: ...
    @property
    def identities(self) -> tuple[Path, ...]: ...
    @property
    def folds(self) -> tuple[tuple[Path, Path], ...]: ...
    def children(self) -> list[Path]: ...
    def run(self, block: nn.Module, keeper: Any, x: Tensor, residual: Tensor | None) -> Tensor: ...


class StepCall(NamedTuple):
    """What :func:`resops.explain` hears of a step."""

    block: nn.Module
    step: AnyStep
    why: str | None = None  # it is computed layer by layer


@dataclass
class Match:
    """A step and its place in the graph."""

    step: AnyStep
    nodes: list[fx.Node]  # what it replaces, in order; the last one is its place
    input: fx.Node
    residual: fx.Node | None


class Matcher:
    """Finds the steps in the graph of ``block``."""

    def __init__(self, block: nn.Module, graph: fx.Graph, allowed: frozenset[nn.Module]) -> None:
        """
        Args:
            allowed: the norms that may be fused.
        """
        self.block, self.allowed = block, allowed
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        calls: dict[nn.Module, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                calls.setdefault(self.module(node), []).append(node)
        self.calls = calls
        self.matches: dict[nn.Module, Match] = {}
        self.refusals: dict[nn.Module, tuple[Reason, str]] = {}
        taken: set[fx.Node] = set()
        # Backwards: where two norms meet in an addition, the one that is computed last takes it.
        for node in reversed(graph.nodes):
            if node.op == "call_module" and self.module(node) in allowed:
                self._match(node, taken)

    def module(self, node: fx.Node) -> nn.Module:
        return layers.child(self.block, self.path(node))

    def path(self, node: fx.Node) -> Path:
        return tuple(str(node.target).split("."))

    def _match(self, node: fx.Node, taken: set[fx.Node]) -> None:
        norm = self.module(node)
        if len(self.calls[norm]) > 1:
            self.refusals[norm] = Reason.SHARED, "it is called several times"
            return
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return
        found = self._longest(node, taken) or self._without_residual(node, taken)
        if found is None:
            self.refusals[norm] = self._nothing_beside(node)
            return
        self.matches[norm] = found
        taken.update(found.nodes)

    def _next(self, node: fx.Node, taken: set[fx.Node]) -> fx.Node | None:
        """The only user of ``node``, if there is one and it belongs to no other step."""
        users = list(node.users)
        if len(users) != 1 or users[0] in taken or users[0].op == "output":
            return None
        return users[0]

    def _longest(
        self, norm: fx.Node, taken: set[fx.Node], with_residual: bool = True
    ) -> Match | None:
        path, kind = self.path(norm), layers.norm_kind(self.module(norm))
        assert kind is not None
        nodes, labels = [norm], [kind.label]
        identities: list[Path] = []
        act: Path | None = None
        activation, slope = "identity", 0.0
        residual: fx.Node | None = None
        closed = False
        if kind.has_activation:
            module = self.module(norm)._modules["act"]
            assert module is not None
            identities.append((*path, "drop"))
            act = (*path, "act")  # which runs after the op where that does not have it
            closed = type(module) is not nn.Identity
            if layers.is_activation(module):
                labels.append(layers.activation_label(module))
        while not closed and (user := self._next(nodes[-1], taken)) is not None:
            key = (user.op, user.target)
            if user.op == "call_module" and user.args == (nodes[-1],) and not user.kwargs:
                module = self.module(user)
                if len(self.calls[module]) > 1 and not self._reusable(module):
                    break
                if layers.is_identity(module):
                    identities.append(self.path(user))
                elif layers.is_activation(module):
                    act, closed = self.path(user), True
                    labels.append(layers.activation_label(module))
                else:
                    break
            elif key in _ADDITIONS and residual is None and with_residual:
                residual = self._other_operand(user, nodes[-1])
                if residual is None:
                    break
                labels.append("add")
            elif key in _ACTIVATION_FUNCTIONS:
                function = _function_activation(user, nodes[-1])
                if function is None:
                    break
                (activation, slope), act, closed = function, None, True
                labels.append(_LABELS[activation])
            else:
                break
            nodes.append(user)
        return self._with_convolution(
            norm, nodes, labels, residual, taken, (path, act, activation, slope, identities)
        )

    def _without_residual(self, norm: fx.Node, taken: set[fx.Node]) -> Match | None:
        return self._longest(norm, taken, with_residual=False)

    def _reusable(self, module: nn.Module) -> bool:
        """One ReLU may stand for several, as in torchvision's blocks: it has no state."""
        return layers.is_activation(module) or layers.is_identity(module)

    def _with_convolution(
        self,
        norm: fx.Node,
        nodes: list[fx.Node],
        labels: list[str],
        residual: fx.Node | None,
        taken: set[fx.Node],
        parts: tuple[Path, Path | None, str, float, list[Path]],
    ) -> Match | None:
        path, act, activation, slope, identities = parts
        kind = layers.norm_kind(self.module(norm))
        assert kind is not None
        x = norm.args[0]
        assert isinstance(x, fx.Node)
        conv: Path | None = None
        before = x
        if x.op == "call_module" and self._single_call(x) and layers.is_conv(self.module(x)):
            source = x.args[0]
            assert isinstance(source, fx.Node)
            foldable = kind.convs != ()  # else nothing is gained by taking the convolution in
            if foldable and x not in taken and self._may_move(x, source, nodes):
                conv, before = self.path(x), source
                nodes, labels = [x, *nodes], ["Conv", *labels]
        if conv is None and not self._may_move(norm, x, nodes):
            return None
        labels = [label for label in labels if label]
        if len(labels) == 1:
            return None
        if conv is None and residual is None and self._feeds_convolution(nodes[-1]):
            labels.append("Conv")
        step = Step(path, conv, act, activation, slope, tuple(identities), "+".join(labels))
        return Match(step, nodes, before, residual)

    def _single_call(self, node: fx.Node) -> bool:
        return (
            len(self.calls[self.module(node)]) == 1
            and len(node.users) == 1
            and len(node.args) == 1
            and not node.kwargs
            and isinstance(node.args[0], fx.Node)
        )

    def _feeds_convolution(self, node: fx.Node) -> bool:
        users = list(node.users)
        return (
            len(users) == 1
            and users[0].op == "call_module"
            and isinstance(self.module(users[0]), layers._CONVS)
        )

    def _may_move(self, first: fx.Node, source: fx.Node, nodes: list[fx.Node]) -> bool:
        """Whether ``first`` may read ``source`` as late as at the place of the last node.

        What is computed in between could overwrite ``source``, unless nothing else can see it.
        """
        chain = {first, *nodes}
        between = range(self.order[first], self.order[nodes[-1]])
        passed = [n for n, i in self.order.items() if i in between and n not in chain]
        passed = [n for n in passed if not self._only_reads(n)]
        return not passed or self._is_private(source, first)

    def _only_reads(self, node: fx.Node) -> bool:
        """Whether a call surely writes to none of its arguments."""
        return node.op == "get_attr" or (
            node.op == "call_module" and layers.only_reads(self.module(node))
        )

    def _is_private(self, node: fx.Node, reader: fx.Node) -> bool:
        """Whether ``node`` is new memory that only ``reader`` sees."""
        if list(node.users) != [reader] or node.op != "call_module":
            return False
        module = self.module(node)
        if layers.norm_kind(module) is not None or layers.is_conv(module):
            return True
        if layers.is_identity(module) or layers.is_activation(module):
            source = node.args[0]
            return isinstance(source, fx.Node) and self._is_private(source, node)
        return False

    def _other_operand(self, addition: fx.Node, mine: fx.Node) -> fx.Node | None:
        if len(addition.args) != 2 or addition.kwargs:
            return None
        left, right = addition.args
        other = right if left is mine else left
        if not isinstance(other, fx.Node) or other is mine:
            return None
        if (addition.op, addition.target) in _IN_PLACE_ADDITIONS and left is not mine:
            return None
        return other

    def _nothing_beside(self, norm: fx.Node) -> tuple[Reason, str]:
        """Why the norm stands alone: what comes after it says it."""
        own = self.module(norm)._modules.get("act")
        if own is not None and not layers.is_activation(own):
            why = layers.activation_refusal(own)
            if why is not None:
                return why
        node = norm
        while (user := self._next(node, set())) is not None:
            if user.op != "call_module":
                break
            module = self.module(user)
            if not layers.is_identity(module):
                return layers.activation_refusal(module) or (Reason.NOTHING_BESIDE, "")
            node = user
        return Reason.NOTHING_BESIDE, ""


def _function_activation(call: fx.Node, x: fx.Node) -> tuple[str, float] | None:
    """The activation, with its slope, that a call of a function or method is; None if it has
    arguments that the op does not know."""
    name = _ACTIVATION_FUNCTIONS[call.op, call.target]
    if not call.args or call.args[0] is not x:
        return None
    kwargs = dict(call.kwargs)
    kwargs.pop("inplace", None)
    rest = list(call.args[1:])
    slope = 0.0
    if name == "leaky_relu":
        given = kwargs.pop("negative_slope", rest.pop(0) if rest else 0.01)
        if not isinstance(given, int | float):
            return None
        slope = float(given)
    elif name == "gelu" and kwargs.pop("approximate", "none") != "none":
        return None
    if rest and isinstance(rest[0], bool):  # in place
        rest.pop(0)
    return None if rest or kwargs else (name, slope)
