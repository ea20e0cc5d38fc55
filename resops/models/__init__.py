"""Networks made of the fused layers, with torchvision's and timm's names and ``state_dict`` keys
where they have the network."""

from __future__ import annotations

from ._registry import create_model, list_models, register_model
from .alexnet import AlexNet, alexnet
from .cifar_resnet import (
    CifarResNet,
    plain20,
    plain32,
    plain44,
    plain56,
    plain110,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    resnet1202,
)
from .convnext import ConvNeXt, ConvNeXtBlock, convnext_tiny
from .fpn import FPN, FeaturePyramid, fpn
from .hourglass import StackedHourglass, heatmap_peaks, hourglass
from .overlap_tile import overlap_tile
from .resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .unet import UNet, residual_unet, unet, unet_valid
from .unet3d import UNet3d, unet3d
from .unetplusplus import UNetPlusPlus, unetplusplus
from .vgg import VGG, vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn
from .vnet import VNet, vnet

__all__ = [
    "FPN",
    "VGG",
    "AlexNet",
    "CifarResNet",
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
    "plain20",
    "plain32",
    "plain44",
    "plain56",
    "plain110",
    "register_model",
    "residual_unet",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet1202",
    "resnext50_32x4d",
    "resnext101_32x8d",
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
    "wide_resnet50_2",
    "wide_resnet101_2",
]
