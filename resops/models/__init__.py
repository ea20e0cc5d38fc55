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
from .highway import HighwayConvNetwork, HighwayNetwork, highway, highway_conv
from .hourglass import StackedHourglass, heatmap_peaks, hourglass
from .overlap_tile import overlap_tile
from .preact_resnet import (
    PreActResNet,
    preact_resnet110,
    preact_resnet164,
    preact_resnet1001,
    resnetv2_18,
    resnetv2_34,
    resnetv2_50,
    resnetv2_101,
    resnetv2_152,
    resnetv2_200,
)
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
from .wide_resnet import WideResNet, wrn_16_4, wrn_16_8, wrn_22_8, wrn_28_10, wrn_40_4

__all__ = [
    "FPN",
    "VGG",
    "AlexNet",
    "CifarResNet",
    "ConvNeXt",
    "ConvNeXtBlock",
    "FeaturePyramid",
    "HighwayConvNetwork",
    "HighwayNetwork",
    "PreActResNet",
    "ResNet",
    "StackedHourglass",
    "UNet",
    "UNet3d",
    "UNetPlusPlus",
    "VNet",
    "WideResNet",
    "alexnet",
    "convnext_tiny",
    "create_model",
    "fpn",
    "heatmap_peaks",
    "highway",
    "highway_conv",
    "hourglass",
    "list_models",
    "overlap_tile",
    "plain20",
    "plain32",
    "plain44",
    "plain56",
    "plain110",
    "preact_resnet110",
    "preact_resnet164",
    "preact_resnet1001",
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
    "resnetv2_18",
    "resnetv2_34",
    "resnetv2_50",
    "resnetv2_101",
    "resnetv2_152",
    "resnetv2_200",
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
    "wrn_16_4",
    "wrn_16_8",
    "wrn_22_8",
    "wrn_28_10",
    "wrn_40_4",
]
