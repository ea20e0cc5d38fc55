"""Lets :func:`resops.explain` hear which path a fused step, a layer or a block of layers takes.

Hooks would not do: a layer that has one is called by itself, where else it is part of an op.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

Listener = Callable[[Any, str, Tensor | None], None]


class NormCall(NamedTuple):
    """A norm layer of resops.nn is called by itself."""

    norm: nn.Module


class ConvNormCall(NamedTuple):
    """A convolution is called whose output goes to ``norm``, or which stands for both."""

    conv: nn.Module
    norm: nn.Module
    folded: bool


class BlockCall(NamedTuple):
    """Layers of resops.nn are computed by one op."""

    norms: list[nn.Module]
    convolutions: list[nn.Module]
    pattern: str
    levels: int  # how far below the block the first norm stands
    why: str | None = None  # it is computed layer by layer


class _State(threading.local):
    listener: Listener | None = None


_state = _State()


def listening() -> bool:
    """Whether anybody wants to know."""
    return _state.listener is not None


def tell(what: Any, path: str, x: Tensor | None) -> None:
    """``what``, one of the calls above or of resops.fusion, takes ``path`` with the input ``x``."""
    if _state.listener is not None:
        _state.listener(what, path, x)


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Inside, in this thread, ``listener`` is called for each of them."""
    before = _state.listener
    _state.listener = listener
    try:
        yield
    finally:
        _state.listener = before
