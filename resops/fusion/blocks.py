"""Blocks whose forward is replaced: a generated class for each way in which a class is fused.

Only ``__class__`` of the block changes. Its name, its children, parameters, buffers and hooks stay;
it is still an instance of its class. Before the fused forward runs, everything that it relies on is
looked at; if a child was replaced, or got hooks or a parametrization, or an attribute was set, the
original forward runs.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import linecache
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from ..nn import observer
from . import layers
from .layers import Path
from .steps import AnyStep, Match
from .tracing import required_arguments

CHANGED = "_resops_changed"  # attribute of a fused block that was changed since
_KEPT = "_resops_kept"  # its folded convolutions
_OWN = frozenset(nn.Module().__dict__)  # attributes that every module has for itself


class _Kept:
    """The folded convolution of one step."""

    __slots__ = ("_folded",)

    def __init__(self) -> None:
        self._folded: Any = None


class Plan:
    """How the blocks of one class run fused. Knows paths, and no module."""

    def __init__(
        self,
        original: type[nn.Module],
        steps: tuple[AnyStep, ...],
        block: nn.Module,
        inlined: tuple[Path, ...],
        accepts: Callable[..., bool] | None,
        refusal: Callable[..., str] | None,
    ) -> None:
        """
        Args:
            accepts: see :func:`resops.register_pattern`.
            refusal: why a call of the block, with the arguments that follow, had better go to the
                original forward; empty if it need not.
        """
        self.original, self.steps = original, steps
        self.accepts, self.refusal = accepts, refusal
        # Children that are not called any more: that they do what they did is for us to see.
        paths = dict.fromkeys(path for step in steps for path in step.children())
        if any(() in step.norms for step in steps):
            paths = {path: None for path in paths if path}
        self.identities = tuple(path for step in steps for path in step.identities)
        lists = {path[:i] for path in paths for i in range(len(path))}
        paths |= dict.fromkeys(inlined)
        self.children = tuple((path, type(layers.child(block, path))) for path in paths)
        self.names = tuple(
            (path, _child_names(layers.child(block, path))) for path in sorted(lists)
        )

    def key(self) -> tuple[Any, ...]:
        return (
            self.original,
            self.steps,
            self.children,
            self.names,
            self.accepts,
            self.refusal,
        )

    def takes(self, block: nn.Module, *args: Any) -> bool:
        """Whether the fused forward computes what the original one does."""
        if self.accepts is not None:
            if not self.accepts(*args):
                return False
        else:
            for arg in args:
                if not isinstance(arg, Tensor):
                    return False
        if self.refusal is not None and self.refusal(block, *args):
            return False
        return self.is_current(block)

    def why_not(self, block: nn.Module, *args: Any) -> str:
        """Why a call went to the original forward."""
        accepts = self.accepts or (lambda *args: all(isinstance(arg, Tensor) for arg in args))
        if len(args) != len(required_arguments(self.original.forward)) or not accepts(*args):
            return "called with other arguments than the fused forward takes"
        return self.change(block) or ("" if self.refusal is None else self.refusal(block, *args))

    def is_current(self, block: nn.Module) -> bool:
        """Whether the block is as it was when it was fused."""
        if CHANGED in block.__dict__ or _has_any_global_hook():
            return False
        for path, names in self.names:
            if _child_names(_find(block, path)) != names:
                return False
        for path, kind in self.children:
            if not _is_plain(_find(block, path), kind):
                return False
        for path in self.identities:  # noqa: SIM110 - a generator takes longer
            if not layers.returns_its_input(_find(block, path)):
                return False
        return True

    def change(self, block: nn.Module) -> str:
        """What is not as it was; empty if everything is."""
        if CHANGED in block.__dict__:
            return f"attribute {block.__dict__[CHANGED]} was set"
        if _has_any_global_hook():
            return "there are global module hooks"
        for path, names in self.names:
            if _child_names(_find(block, path)) != names:
                return f"children of {'.'.join(path) or 'the block'} were added or removed"
        for path, kind in self.children:
            module = _find(block, path)
            if type(module) is not kind:
                return f"{'.'.join(path)} is now a {type(module).__name__}"
            if not _is_plain(module, kind):
                return f"{'.'.join(path)} has hooks"
        for path in self.identities:
            if not layers.returns_its_input(_find(block, path)):
                return f"{'.'.join(path)} does not return its input any more"
        return ""


def _find(block: nn.Module, path: Path) -> nn.Module:
    module: nn.Module = block
    for name in path:
        child = module._modules.get(name)
        if child is None:
            return block  # whose type is none of those that are looked for
        module = child
    return module


def _child_names(module: nn.Module) -> tuple[str, ...]:
    return tuple([name for name, child in module._modules.items() if child is not None])


def _is_plain(module: nn.Module, kind: type) -> bool:
    """is_plain() of a module of exactly this class, without the hooks of all modules."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class FusedBlock:
    """What the generated classes share; stands before the original class in their bases."""

    _resops_plan: Plan

    def __setattr__(self, name: str, value: Any) -> None:
        # What the forward looked at when it was followed may be any attribute but the tensors,
        # which are read at every call.
        if name == "__class__" and _has_same_forward(value, type(self)):
            pass  # FSDP2 makes a subclass of every module that it shards
        elif name not in _OWN and not isinstance(value, Tensor):
            unknown = object()
            before = getattr(self, name, unknown)
            private = name.startswith("_") and before is unknown
            if not private and before is not value and not _equal_settings(before, value):
                self.__dict__[CHANGED] = name
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self.__dict__[CHANGED] = name
        super().__delattr__(name)

    def train(self, mode: bool = True) -> Any:
        self.__dict__.pop(_KEPT, None)
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop(_KEPT, None)
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.pop(_KEPT, None)
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def restore_class(self) -> None:
        """Be of the original class again."""
        for name in (_KEPT, CHANGED):
            self.__dict__.pop(name, None)
        swap_class(self, self._resops_plan.original)

    # A generated class cannot be found by its name: a pickle has the original class and the names
    # of the norms, and the class is made anew. A copy keeps it.

    def __reduce_ex__(self, protocol: Any) -> Any:
        plan = self._resops_plan
        norms = tuple(norm for step in plan.steps for norm in step.norms)
        return _new, (plan.original,), (_state(self), norms), None, None, restore

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = _new(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(_state(self), memo))
        return other

    def __copy__(self) -> Any:
        other = _new(type(self))
        other.__setstate__(_state(self))
        return other


def swap_class(block: Any, cls: type) -> None:
    """Make ``block`` an object of ``cls``, without asking its ``__setattr__``."""
    object.__setattr__(block, "__class__", cls)


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def _state(block: Any) -> Any:
    """What the original class would put into a pickle."""
    get = getattr(block, "__getstate__", None)  # every object has it since Python 3.11
    state = dict(block.__dict__ if get is None else get())
    state.pop(_KEPT, None)
    return state


def restore(block: Any, saved: tuple[dict[str, Any], tuple[Path, ...]]) -> None:
    """Fill an object of the original class from a pickle, and fuse the same norms as before."""
    from .blueprint import blueprint  # which needs this module

    state, norms = saved
    block.__setstate__(state)
    found = blueprint(block, frozenset(layers.child(block, path) for path in norms))
    if found.matches:
        swap_class(block, fused_class(found))


def _has_same_forward(a: Any, b: Any) -> bool:
    """Of two classes of modules."""
    return issubclass(a, b) and a.forward is b.forward


def _equal_settings(a: object, b: object) -> bool:
    plain = (bool, int, float, str, type(None))
    return type(a) is type(b) and isinstance(a, plain) and a == b


def kept(block: nn.Module, index: int) -> Any:
    """What keeps the folded convolution of step ``index``, or of this layer of a dense block."""
    slots = block.__dict__.get(_KEPT)
    if slots is None:
        slots = block.__dict__[_KEPT] = {}
    slot = slots.get(index)
    if slot is None:
        slot = slots[index] = _Kept()
    return slot


# ---- generated classes --------------------------------------------------------------------------

_classes: WeakValueDictionary[Any, type[nn.Module]] = WeakValueDictionary()
_numbers = itertools.count()

_WRAPPER = """
def forward(self, {signature}):
    if {defaults}_takes(self, {required}):
        return _fused_forward(self, {required})
    _tell_original(self, {names})
    return _original_forward(self, {every})
"""


class OriginalCall(NamedTuple):
    """What :func:`resops.explain` hears of a block that goes to its original forward."""

    block: nn.Module
    why: str


def _tell_original(block: Any, *args: Any) -> None:
    if observer.listening():
        why = block._resops_plan.why_not(block, *args)
        observer.tell(OriginalCall(block, why), "original forward", None)


def _compiled(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    """The function ``forward`` of ``source``, which tracebacks and debuggers can show."""
    file = f"<resops.fuse {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), names)
    forward: Callable[..., Any] = names["forward"]
    return forward


def _wrapper_source(forward: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """A forward of the same signature, and the defaults that it names."""
    defaults: dict[str, Any] = {}
    signature, required, every, names = [], [], [], []
    keyword_only = False
    for p in list(inspect.signature(forward).parameters.values())[1:]:
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            signature.append("*")
        every.append(f"{p.name}={p.name}" if keyword_only else p.name)
        names.append(p.name)
        if p.default is p.empty:
            signature.append(p.name)
            required.append(p.name)
        else:
            default = f"_default_{p.name}"
            defaults[default] = p.default
            signature.append(f"{p.name}={default}")
    return (
        _WRAPPER.format(
            signature=", ".join(signature),
            defaults="".join(f"{d.removeprefix('_default_')} is {d} and " for d in defaults),
            required=", ".join(required),
            names=", ".join(names),
            every=", ".join(every),
        ),
        defaults,
    )


def _step_method(step: AnyStep, index: int) -> Callable[..., Tensor]:
    folds = step.folds != ()

    def run(self: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        keeper = None
        if folds and not torch.compiler.is_compiling():
            keeper = kept(self, index)
        return step.run(self, keeper, x, residual)

    return run


def _fused_graph(graph: fx.Graph, matches: list[Match]) -> None:
    """Put one call into ``graph`` in the place of every match."""
    replaced: dict[fx.Node, fx.Node] = {}
    for i, match in enumerate(matches):
        last = match.nodes[-1]
        args = [n for n in (match.input, match.residual) if n is not None]
        with graph.inserting_before(last):
            call = graph.create_node(
                "call_module", f"_resops_step_{i}", tuple(replaced.get(n, n) for n in args)
            )
        last.replace_all_uses_with(call)
        replaced[last] = call
        for node in reversed(match.nodes):
            graph.erase_node(node)


def fused_class(blueprint: Any) -> type[nn.Module]:
    """The class for blocks like that of ``blueprint``, whose graph is used up."""
    block, matches = blueprint.block, blueprint.matches
    original = type(block)
    plan = Plan(
        original,
        tuple(match.step for match in matches),
        block,
        blueprint.inlined,
        blueprint.accepts,
        blueprint.refusal,
    )
    _fused_graph(blueprint.graph, matches)
    code = blueprint.graph.python_code("self")
    used = tuple(sorted((name, id(value)) for name, value in code.globals.items()))
    key = (plan.key(), code.src, used)
    if key in _classes:
        return _classes[key]
    source, defaults = _wrapper_source(original.forward)
    names = {
        **defaults,
        "_takes": plan.takes,
        "_fused_forward": _compiled(code.src, dict(code.globals)),
        "_original_forward": original.forward,
        "_tell_original": _tell_original,
    }
    body: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_resops_plan": plan,
        "forward": _compiled(source, names),
    }
    for i, step in enumerate(plan.steps):
        body[f"_resops_step_{i}"] = _step_method(step, i)
    metaclass: Any = type(original)
    cls: type[nn.Module] = metaclass(original.__name__, (FusedBlock, original), body)
    _classes[key] = cls
    return cls
