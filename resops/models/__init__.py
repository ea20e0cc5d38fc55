"""Networks made of the fused layers, with torchvision's and timm's names and ``state_dict`` keys
where they have the network."""

from __future__ import annotations

from ._registry import create_model, list_models, register_model
from .overlap_tile import overlap_tile
from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from .unet import UNet, residual_unet, unet, unet_valid

__all__ = [
    "ResNet",
    "UNet",
    "create_model",
    "list_models",
    "overlap_tile",
    "register_model",
    "residual_unet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "unet",
    "unet_valid",
]
