"""What every autograd Function here shares."""

from __future__ import annotations

from typing import Any

import torch


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
