"""Layers made of the fused ops, with the names and signatures of torch, torchvision and timm."""

from .batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .conv_bn_act import Conv2dNormActivation, Conv3dNormActivation
from .instance_norm import GroupNormAct, InstanceNormAct2d, InstanceNormAct3d
from .residual_add import ResidualAdd
from .sync_batch_norm import SyncBatchNormAct

__all__ = [
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "Conv2dNormActivation",
    "Conv3dNormActivation",
    "GroupNormAct",
    "InstanceNormAct2d",
    "InstanceNormAct3d",
    "ResidualAdd",
    "SyncBatchNormAct",
]
