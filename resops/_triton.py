"""The Triton kernels as ops, ``torch.ops.resops_triton``, and the reason where they cannot run.

A launcher of ``triton_kernels`` is registered under its own name with the schema of the function of
that name in ``reference``. To torch.compile such an op is one node, with a fake kernel.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Read by Triton when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
DEVICES = frozenset({"cuda", "cpu"} if INTERPRETED else {"cuda"})
# Without a device to run on nobody waits for Triton's import.
_USABLE = INTERPRETED or torch.version.cuda is not None

MISSING = "Triton cannot be imported; to install it, run `pip install triton`"


def _find() -> str | None:
    """Why there are no Triton kernels here; None if there are."""
    if importlib.util.find_spec("triton") is None:
        return MISSING
    if not _USABLE:
        return None
    try:
        error: str | None = importlib.import_module("resops.triton_kernels").error
    except ImportError as failure:
        return f"the package resops.triton_kernels cannot be imported ({failure})"
    return error


error = _find()
_library = torch.library.Library("resops_triton", "DEF")


def register(
    op: str,
    phase: str,
    definition: Callable[..., Any],
    fake: Callable[..., Any],
    writes: Sequence[str] = (),
) -> Callable[..., Any]:
    """Make ``torch.ops.resops_triton.<op>_<phase>`` of the launcher of that name.

    Args:
        definition: the function of ``reference`` whose signature becomes the schema.
        fake: sizes, dtypes and strides of what is returned.
        writes: arguments that are written to, beside running statistics.

    Returns:
        the op's overload; where nothing can run it, a function that says so.
    """
    name = f"{op}_{phase}"
    if error is not None or not _USABLE:

        def missing(*args: Any) -> Any:
            raise RuntimeError(error or "this torch is built without CUDA")

        return missing

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"resops.triton_kernels.{op}"), name)(*args)

    running = [a for a in definition.__annotations__ if a.startswith("running_")]
    written = [*writes, *running]
    _library.define(name + torch.library.infer_schema(definition, mutates_args=written))
    for device in DEVICES:
        _library.impl(name, launch, device.upper())
    torch.library.register_fake(f"resops_triton::{name}", fake, lib=_library)
    overload: Callable[..., Any] = getattr(torch.ops.resops_triton, name).default
    return overload
