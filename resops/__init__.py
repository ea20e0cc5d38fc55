"""Fused kernels for residual networks, as drop-in PyTorch layers."""

from __future__ import annotations

from . import functional, fusion, models, nn
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


def show_env() -> None:
    """Print versions, devices, what was built, which backends are there, and why others are not.

    The same as ``python -m resops.info``.
    """
    from .info import show_env as show  # python -m resops.info must find it not yet imported

    show()
