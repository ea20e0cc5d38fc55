"""Lets :func:`resops.explain` hear which path a fused step takes."""

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


def tell(step: Any, path: str, x: Tensor) -> None:
    """``step`` takes ``path`` with the input ``x``."""
    if _state.listener is not None:
        _state.listener(step, path, x)


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Inside, in this thread, ``listener`` is called for every step."""
    before = _state.listener
    _state.listener = listener
    try:
        yield
    finally:
        _state.listener = before
