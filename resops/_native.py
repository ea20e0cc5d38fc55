"""Loads the compiled extension, and keeps the reason where that fails."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # noqa: F401  (its shared libraries must be loaded before the extension)

module: ModuleType | None = None
error: str | None = None

try:
    module = importlib.import_module("resops._C")
except ModuleNotFoundError:
    error = (
        "the C++ extension was not built; to build it, install a C++ compiler and run "
        "`pip install --no-build-isolation .` in the source tree"
    )
except ImportError as failure:
    error = (
        f"the C++ extension does not load ({failure}); it was built for another torch than "
        f"{torch.__version__}: rebuild it with `pip install --no-build-isolation .`"
    )
