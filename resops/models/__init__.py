"""Networks made of the fused layers, with torchvision's and timm's names and ``state_dict`` keys
where they have the network."""

from __future__ import annotations

from ._registry import create_model, list_models, register_model
from .densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet_bc_40,
    densenet_bc_100,
)
from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152

__all__ = [
    "DenseNet",
    "ResNet",
    "create_model",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet_bc_40",
    "densenet_bc_100",
    "list_models",
    "register_model",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
