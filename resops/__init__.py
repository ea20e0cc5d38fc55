"""Fused kernels for residual networks, as drop-in PyTorch layers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import functional, fusion, nn
from ._dispatch import BackendError, backend, get_backend, set_backend
from ._precision import get_conv_precision, set_conv_precision
from ._version import __version__
from .fusion import (
    convert_sync_batchnorm,
    explain,
    fold,
    fuse,
    fuse_report,
    register_pattern,
    unfuse,
)
from .nn.checkpoint import checkpoint_context_fn

if TYPE_CHECKING:
    from . import models

__all__ = [
    "BackendError",
    "__version__",
    "backend",
    "checkpoint_context_fn",
    "convert_sync_batchnorm",
    "explain",
    "fold",
    "functional",
    "fuse",
    "fuse_report",
    "fusion",
    "get_backend",
    "get_conv_precision",
    "models",
    "nn",
    "register_pattern",
    "set_backend",
    "set_conv_precision",
    "show_env",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    """``resops.models`` when it is first asked for: who brings a model does not wait for ours."""
    if name == "models":
        return importlib.import_module(".models", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def show_env() -> None:
    """Print versions, devices, what was built, which backends are there, and why others are not.

    The same as ``python -m resops.info``.
    """
    from .info import show_env as show  # python -m resops.info must find it not yet imported

    show()
