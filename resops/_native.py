"""Loads the compiled extension, and keeps the reason where that fails."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import torch  # its shared libraries must be loaded before the extension

REBUILD = "rebuild it with `pip install --no-build-isolation .` in the source tree"


def _built_for_torch(extension: Path) -> str | None:
    """The torch version that csrc/build_facts.h.in left in the file, read without loading it."""
    mark = re.search(rb"resops-built-for-torch=([^;]+);", extension.read_bytes())
    return None if mark is None else mark[1].decode()


def _load() -> tuple[ModuleType | None, str | None]:
    """The extension and None, or None and why there is none."""
    spec = importlib.util.find_spec("resops._C")
    if spec is None or spec.origin is None:
        return None, (
            "the C++ extension was not built; to build it, install a C++ compiler and run "
            "`pip install --no-build-isolation .` in the source tree"
        )
    # torch's C++ interface changes between minor versions, and a module built for another one may
    # load and crash later: so compare first.
    built, running = _built_for_torch(Path(spec.origin)), torch.__version__
    if built is not None and built.split(".")[:2] != running.split(".")[:2]:
        return None, f"the C++ extension was built for torch {built}, running {running}: {REBUILD}"
    try:
        return importlib.import_module("resops._C"), None
    except ImportError as failure:
        return None, (
            f"the C++ extension, built for torch {built or 'unknown'}, does not load with torch "
            f"{running} ({failure}): {REBUILD}"
        )


module, error = _load()
