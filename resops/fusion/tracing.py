"""The forward of one block as a graph of calls to its children.

``torch.fx`` runs the forward once, with placeholders for tensors. What it did then may depend on
more than the tensors: on training or evaluation, on gradients being recorded, on random numbers,
on the type of an argument. So a forward counts as followed only if it did the same in training with
gradients and in evaluation without and under autocast, in no context of its own, and left no trace
on the block; else :class:`Untraceable` is raised.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .report import Reason


class Untraceable(Exception):
    """The forward of a block cannot be followed."""

    def __init__(self, detail: str, reason: Reason = Reason.UNTRACEABLE) -> None:
        super().__init__(detail)
        self.reason = reason


_ALLOWED_TO_ASK = ("torch.fx", "torch.utils._pytree", "torch.overrides", __name__)
_QUESTIONS = {"isinstance", "issubclass", "__class__"}


class _Placeholder(fx.Proxy):
    """A tensor to be. Asked by the block for its type it refuses to answer."""

    @property
    def __class__(self) -> Any:
        frame: Any = sys._getframe(1)
        if frame.f_code.co_name == "__instancecheck__":  # nn.Parameter has one
            frame = frame.f_back
        module = frame.f_globals.get("__name__", "")
        # Functions written in C ask too, on behalf of whom calls them; that is answered.
        if module.startswith(_ALLOWED_TO_ASK) or not _QUESTIONS & set(frame.f_code.co_names):
            return _Placeholder
        raise Untraceable(f"isinstance() is asked about a tensor, in {module}")

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("__class__ of a traced tensor cannot be set")


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def record(self: _Placeholder, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


# fx records x += y as x + y, which is something else where x has another name.
for _function in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_Placeholder, f"__{_function.__name__}__", _in_place(_function))


def _surroundings() -> tuple[Any, ...]:
    """What changes the meaning of a call and is not one of its arguments."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


class _BlockTracer(fx.Tracer):
    proxy_buffer_attributes = True  # else an update of a buffer would happen, and not be recorded

    def __init__(self, forward: Callable[..., Any], inlined: frozenset[nn.Module]) -> None:
        super().__init__()
        self._forward, self._inlined = forward, inlined
        self._surroundings = _surroundings()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._inlined

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names = required_arguments(self._forward)
        args = [self.create_proxy("placeholder", name, (), {}) for name in names]
        return self._forward, [self.root, *args]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Placeholder(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._surroundings:
            raise Untraceable("it switches gradients, autocast or checkpointing on or off")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise Untraceable("it makes a tensor that does not depend on its arguments")
        return super().create_arg(a)


def required_arguments(forward: Callable[..., Any]) -> list[str]:
    """Names of the arguments that have no default, which are those that must be tensors.

    Raises:
        Untraceable: ``forward`` takes any number of arguments.
    """
    names = []
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable(f"it takes any number of arguments (*{parameter.name})")
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise Untraceable(f"argument {parameter.name} goes by keyword only")
            names.append(parameter.name)
    return names


@contextlib.contextmanager
def _mode(block: nn.Module, training: bool) -> Iterator[None]:
    """In training with gradients, or in evaluation without and under autocast."""
    modules = list(block.modules())
    before = [m.training for m in modules]
    try:
        for m in modules:
            m.__dict__["training"] = training
        with (
            torch.set_grad_enabled(training),
            torch.autocast("cpu", torch.bfloat16, enabled=not training),
        ):
            yield
    finally:
        for m, was in zip(modules, before, strict=True):
            m.__dict__["training"] = was


@contextlib.contextmanager
def _untouched(modules: list[nn.Module]) -> Iterator[None]:
    """Raise where attributes of the modules or a state of random numbers were changed; restore."""
    attributes = [dict(m.__dict__) for m in modules]
    numbers, state = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        changed = [
            m
            for m, before in zip(modules, attributes, strict=True)
            if m.__dict__.keys() != before.keys()
            or any(m.__dict__[k] is not v for k, v in before.items())
        ]
        for m, before in zip(modules, attributes, strict=True):
            if m in changed:
                m.__dict__.clear()
                m.__dict__.update(before)
        drawn = random.getstate() != numbers or not torch.equal(torch.get_rng_state(), state)
        random.setstate(numbers)
        torch.set_rng_state(state)
    if changed:
        raise Untraceable("it sets attributes")
    if drawn:
        raise Untraceable("it draws random numbers")


def _trace_once(
    block: nn.Module, forward: Callable[..., Any], inlined: frozenset[nn.Module], training: bool
) -> fx.Graph:
    with _mode(block, training), _untouched([block, *inlined]):
        try:
            return _BlockTracer(forward, inlined).trace(block)
        except Untraceable:
            raise
        except Exception as error:  # whatever a forward may do with a placeholder
            text = str(error).strip().split("\n")[0]
            raise Untraceable(f"{type(error).__name__}: {text}") from error


def trace(
    block: nn.Module, forward: Callable[..., Any], inlined: frozenset[nn.Module] = frozenset()
) -> fx.Graph:
    """The graph of ``forward(block, *tensors)``; children are nodes, but for the ``inlined`` ones.

    Arguments that have a default have it.

    Raises:
        Untraceable: the forward cannot be followed, or not in all modes in the same way.
    """
    graph = _trace_once(block, forward, inlined, training=True)
    other = _trace_once(block, forward, inlined, training=False)
    codes = [g.python_code("self") for g in (graph, other)]
    if codes[0].src != codes[1].src or codes[0].globals != codes[1].globals:
        raise Untraceable("", Reason.MODES_DIFFER)
    return graph
