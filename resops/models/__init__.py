"""Networks made of the fused layers, with torchvision's names and ``state_dict`` keys."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from typing import Any

from torch import nn

from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152

__all__ = [
    "ResNet",
    "create_model",
    "list_models",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
}


def list_models(filter: str = "") -> list[str]:
    """Names that :func:`create_model` knows, in the order of the networks' sizes.

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
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(_MODELS)}"
        raise ValueError(f"no model is called {name!r}; {hint}")
    return _MODELS[name](**kwargs)
