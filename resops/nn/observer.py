"""Lets :func:`resops.explain` hear which path a fused step or a block of layers takes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

Listener = Callable[[Any, str, Tensor], None]


class BlockCall(NamedTuple):
    """What :func:`resops.explain` hears of a block of modules that is called as one op."""

    pattern: str
    norms: Sequence[nn.Module]
    convolutions: Sequence[nn.Module]
    depth: int  # levels between the block's name and that of its first norm
    why: str | None = None  # it is computed layer by layer


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
