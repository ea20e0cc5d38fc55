"""Layers made of the fused ops, with the names and signatures of torch, torchvision and timm."""

from .batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .batch_norm_variants import BatchRenormAct2d, GhostBatchNormAct2d
from .bias_act import BiasAct
from .conv_bn_act import Conv2dNormActivation, Conv3dNormActivation
from .instance_norm import GroupNorm1Act, GroupNormAct, InstanceNormAct2d, InstanceNormAct3d
from .norm_layers import create_norm_act
from .population_statistics import monte_carlo_predictions, precise_statistics
from .random_residual import ResDrop, ShakeDrop, ShakeShake
from .residual_add import ResidualAdd
from .std_conv import StdConv2d
from .sync_batch_norm import SyncBatchNormAct

__all__ = [
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchRenormAct2d",
    "BiasAct",
    "Conv2dNormActivation",
    "Conv3dNormActivation",
    "GhostBatchNormAct2d",
    "GroupNorm1Act",
    "GroupNormAct",
    "InstanceNormAct2d",
    "InstanceNormAct3d",
    "ResDrop",
    "ResidualAdd",
    "ShakeDrop",
    "ShakeShake",
    "StdConv2d",
    "SyncBatchNormAct",
    "create_norm_act",
    "monte_carlo_predictions",
    "precise_statistics",
]
