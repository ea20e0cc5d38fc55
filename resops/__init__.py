"""Fused kernels for residual networks, as drop-in PyTorch layers."""

from __future__ import annotations

from . import functional, models, nn
from ._dispatch import BackendError, backend, get_backend, set_backend
from ._precision import get_conv_precision, set_conv_precision
from ._version import __version__

__all__ = [
    "BackendError",
    "__version__",
    "backend",
    "functional",
    "get_backend",
    "get_conv_precision",
    "models",
    "nn",
    "set_backend",
    "set_conv_precision",
    "show_env",
]


def show_env() -> None:
    """Print versions, devices, what was built, which backends are there, and why others are not.

    The same as ``python -m resops.info``.
    """
    from .info import show_env as show  # python -m resops.info must find it not yet imported

    show()
