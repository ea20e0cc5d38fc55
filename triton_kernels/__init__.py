"""Triton kernels and their launchers, one module per op; imported as ``resops.triton_kernels``.

A launcher takes and returns tensors, with the name and signature of the same pass in
``torch.ops.resops``: no autograd, no state. Importing an op's module needs Triton; importing this
package does not, and :data:`error` says why there is none.
"""

from __future__ import annotations

import importlib

__all__ = ["error"]

error: str | None = None

try:
    importlib.import_module("triton")
except ImportError as failure:
    error = f"Triton cannot be imported ({failure}); to install it, run `pip install triton`"
