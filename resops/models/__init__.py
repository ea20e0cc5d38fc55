"""Networks made of the fused layers, with torchvision's and timm's names and ``state_dict`` keys
where they have the network."""

from __future__ import annotations

from ._registry import create_model, list_models, register_model
from .alexnet import AlexNet, alexnet
from .convnext import ConvNeXt, ConvNeXtBlock, convnext_tiny
from .fpn import FPN, FeaturePyramid, fpn
from .hourglass import StackedHourglass, heatmap_peaks, hourglass
from .overlap_tile import overlap_tile
from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from .unet import UNet, residual_unet, unet, unet_valid
from .unet3d import UNet3d, unet3d
from .unetplusplus import UNetPlusPlus, unetplusplus
from .vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn
from .vnet import VNet, vnet

__all__ = [
    "FPN",
    "VGG",
    "AlexNet",
    "ConvNeXt",
    "ConvNeXtBlock",
    "FeaturePyramid",
    "ResNet",
    "StackedHourglass",
    "UNet",
    "UNet3d",
    "UNetPlusPlus",
    "VNet",
    "alexnet",
    "convnext_tiny",
    "create_model",
    "fpn",
    "heatmap_peaks",
    "hourglass",
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
    "unet3d",
    "unet_valid",
    "unetplusplus",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "vnet",
]
