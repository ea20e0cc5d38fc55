"""torchvision and timm beside a CPU build of torch, for the tests marked ``models``.

A torchvision wheel from the package index is built for CUDA: its operators do not load beside
torch+cpu, and its import then fails where it adds fake kernels to two that are missing. To declare
these is all that it takes; the networks here call none of them.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import torch

_DECLARATIONS = torch.library.Library("torchvision", "FRAGMENT")
_MISSING = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def torchvision() -> ModuleType:
    """The package torchvision, whatever torch it was built for."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for schema in _MISSING:
        _DECLARATIONS.define(schema)
    return importlib.import_module("torchvision")


@functools.cache
def timm() -> ModuleType:
    """The package timm, which imports torchvision."""
    torchvision()
    return importlib.import_module("timm")


def published_parameters(name: str) -> int:
    """How many parameters torchvision publishes for a model, beside its weights
    (docs.pytorch.org/vision/stable/models.html is made from it)."""
    count: int = torchvision().models.get_model_weights(name).DEFAULT.meta["num_params"]
    return count
