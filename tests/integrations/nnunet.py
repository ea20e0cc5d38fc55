"""nnU-Net, with stand-ins for the packages with which it reads, writes and draws images.

They stand for names only: what is called of them raises. The networks, the trainer and its training
step are nnU-Net's own. Packages that are installed are used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# What nnunetv2, acvl_utils and batchgenerators import and requirements/models.txt does not have.
_PACKAGES = (
    "SimpleITK",
    "blosc2",
    "cc3d",
    "fft_conv_pytorch",
    "graphviz",
    "imagecodecs",
    "nibabel",
    "pandas",
    "requests",
    "seaborn",
    "unittest2",
    "yacs",
)


class _Missing(type):
    """A class that can be named, in annotations too, and never called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{cls.__name__} is a stand-in: the package is not here")


class StandIn(ModuleType):
    """A module of which every name can be imported and nothing can be called."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_Missing(self.__name__, (), {}), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self) -> None:
        self.names = {name for name in _PACKAGES if importlib.util.find_spec(name) is None}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@functools.cache
def trainers() -> tuple[Any, Any]:
    """nnU-Net's trainer, and the one of resops.integrations."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        theirs = importlib.import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
        ours = importlib.import_module("resops.integrations.nnunet")
    finally:
        sys.meta_path.remove(finder)
        # Others that look for these packages must not find a stand-in.
        for name in [n for n in sys.modules if n.split(".")[0] in finder.names]:
            del sys.modules[name]
    return theirs.nnUNetTrainer, ours.nnUNetTrainerResops


def plans(dims: int) -> dict[str, Any]:
    """What nnU-Net's planner writes, for a small network in ``dims`` dimensions."""
    nd = f"{dims}d"
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 8],
            "conv_op": f"torch.nn.modules.conv.Conv{nd}",
            "kernel_sizes": [[3] * dims] * 3,
            "strides": [[1] * dims, [2] * dims, [2] * dims],
            "n_conv_per_stage": [2, 2, 2],
            "n_conv_per_stage_decoder": [2, 2],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{nd}",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": "nnUNetPlans_small",
        "batch_size": 2,
        "batch_dice": False,
        "patch_size": [16] * dims,
        "spacing": [1.0] * dims,
        "architecture": architecture,
    }
    return {
        "dataset_name": "Dataset001_Small",
        "plans_name": "nnUNetPlans",
        "configurations": {"small": configuration},
        "label_manager": "LabelManager",
        "continue_training": False,
    }


DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "organ": 1, "tumour": 2},
    "file_ending": ".nii.gz",
}
