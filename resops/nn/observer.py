"""Lets :func:`resops.explain` hear which path a fused step or a block of layers takes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

Listener = Callable[[Any, str, Tensor], None]


class _State(threading.local):
    listener: Listener | None = None


_state = _State()


def listening() -> bool:
    """Whether anybody wants to know."""
    return _state.listener is not None


def tell(what: Any, path: str, x: Tensor) -> None:
    """``what``, a step or a block, takes ``path`` with the input ``x``."""
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
