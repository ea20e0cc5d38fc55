"""Fused kernels for residual networks, as drop-in PyTorch layers."""

from __future__ import annotations

from . import functional, models, nn
from ._dispatch import BackendError, backend, get_backend, set_backend
from .info import __version__, show_env

__all__ = [
    "BackendError",
    "__version__",
    "backend",
    "functional",
    "get_backend",
    "models",
    "nn",
    "set_backend",
    "show_env",
]
