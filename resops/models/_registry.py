"""The names under which networks are made."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_MODELS: dict[str, Callable[..., nn.Module]] = {}
_Function = TypeVar("_Function", bound=Callable[..., nn.Module])


def register_model(function: _Function) -> _Function:
    """Decorator of a function that makes a network: its name becomes the model's."""
    name = function.__name__
    if name in _MODELS:
        raise ValueError(f"there is a model {name!r} already, of {_MODELS[name].__module__}")
    _MODELS[name] = function
    return function


def list_models(filter: str = "") -> list[str]:
    """Names that :func:`create_model` knows, family by family, each from small to large.

    Args:
        filter: a shell pattern such as ``"resnet*"``; empty for all.
    """
    return [name for name in _MODELS if fnmatch.fnmatchcase(name, filter or "*")]


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """A network by name, in training mode, with freshly initialised weights.

    Args:
        name: one of :func:`list_models`.
        kwargs: for the network's function, such as ``num_classes`` and ``in_chans``.

    Raises:
        ValueError: an unknown name; the message has those that are close to it.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.4)
        known = "resops.models.list_models() has all names"
        hint = f"did you mean {' or '.join(close)}?" if close else known
        raise ValueError(f"no model is called {name!r}; {hint}")
    return _MODELS[name](**kwargs)
