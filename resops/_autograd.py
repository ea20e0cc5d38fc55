"""What every autograd Function here shares."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import has_torch_function


def traced_to_aten() -> bool:
    """Whether something records or transforms this call that knows PyTorch's own ops only:
    torch.export, torch.jit.trace, torch.vmap and the other transforms of torch.func, forward-mode
    differentiation."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return _transformed()


def _transformed() -> bool:
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def is_plain_call(tensors: tuple[Any, ...]) -> bool:
    """Whether an op may go straight to its C++ autograd node: a call on tensors as PyTorch makes
    them (or None), which nothing traces or transforms."""
    for t in tensors:
        if t is not None and type(t) not in PLAIN_TENSORS:
            return False
    return not (torch.compiler.is_compiling() or has_torch_function(tensors) or _transformed())


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` without its per-call signature inspection where that is safe.

    A Function with ``setup_context`` inspects its own signature at every call of ``apply``
    (some 25 us). Only torch.compile and the functorch transforms need that path.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*_without_repeats(args))
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _without_repeats(args: tuple[Any, ...]) -> list[Any]:
    """The same arguments, a tensor that stands there twice (x + x) as a view of itself the second
    time: torch.compile cannot trace a Function that is given one tensor twice."""
    distinct: list[Any] = []
    for arg in args:
        if isinstance(arg, torch.Tensor) and any(arg is other for other in distinct):
            arg = arg.view_as(arg)
        distinct.append(arg)
    return distinct
