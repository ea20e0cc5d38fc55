"""resops.integrations, and resops.fuse on networks, beside the packages that they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import resops
from tests.dispatch import counted_calls
from tests.fusion.blocks import assert_near, pair
from tests.fusion.test_families import assert_report_is_complete
from tests.torchvision_ops import timm

# Which part of the norms is fused at least; what is left has nothing beside it.
FUSED = {
    "UNet": 1.0,
    "UNet, residual, 3-D": 1.0,
    "UNet, batch": 1.0,
    "BasicUNet": 1.0,
    "SegResNet": 1.0,
    "DynUNet": 1.0,
    "smp Unet": 1.0,
    "smp FPN": 1.0,
}
SLOW = {"DynUNet", "smp Unet", "smp FPN"}  # a second and more each


@pytest.mark.models
def test_timms_layer() -> None:
    timm()
    from resops.integrations.timm import BatchNormAct2d

    layer = BatchNormAct2d(4, act_layer=nn.SiLU)
    theirs = timm().layers.BatchNormAct2d(4, act_layer=nn.SiLU)
    assert isinstance(layer, timm().layers.BatchNormAct2d)
    theirs.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, 4, 5, 5)
    with counted_calls() as calls:
        y = layer(x)
    assert calls["batch_norm_forward"] == 1
    torch.testing.assert_close(y, theirs(x))


@pytest.mark.models
def test_monais_norm() -> None:
    from monai.networks.blocks.convolutions import Convolution

    from resops.integrations.monai import NAME

    for dim in (1, 2, 3):
        block = Convolution(dim, 3, 4, norm=NAME, act="RELU")
        twin = Convolution(dim, 3, 4, norm="BATCH", act="RELU")
        twin.load_state_dict(block.state_dict(), strict=True)
        x = torch.randn(2, 3, *[5] * dim)
        with counted_calls() as calls:
            y = block(x)
        assert calls["batch_norm_forward"] == 1
        torch.testing.assert_close(y, twin(x))


def networks() -> dict[str, Any]:
    """U-Nets of MONAI and segmentation_models_pytorch, with input size and norms that are left."""
    timm()  # which segmentation_models_pytorch imports
    import segmentation_models_pytorch as smp
    from monai.networks import nets

    plain = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    unet = {**plain, "channels": (4, 8, 16), "strides": (2, 2)}
    return {
        "UNet": lambda: nets.UNet(**unet),
        "UNet, residual, 3-D": lambda: nets.UNet(**(unet | {"spatial_dims": 3}), num_res_units=2),
        "UNet, batch": lambda: nets.UNet(**unet, norm="batch", act="relu", num_res_units=1),
        "BasicUNet": lambda: nets.BasicUNet(**plain, features=(4, 4, 8, 8, 8, 4)),
        "SegResNet": lambda: nets.SegResNet(
            **plain, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)
        ),
        "DynUNet": lambda: nets.DynUNet(
            **plain, kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2)
        ),
        "smp Unet": lambda: smp.Unet("resnet18", encoder_weights=None, in_channels=1),
        "smp FPN": lambda: smp.FPN("mobilenet_v2", encoder_weights=None, in_channels=1),
    }


@pytest.mark.models
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FUSED],
)
def test_networks(name: str) -> None:
    """Numbers in float64, keys, and a report in which every norm stands once."""
    torch.manual_seed(0)
    fused, plain = pair(networks()[name]())
    done = assert_report_is_complete(fused)
    total = done + sum(len(entry.modules) for entry in resops.fuse_report(fused).skipped)
    assert done >= FUSED[name] * total > 0
    dims = 3 if "3-D" in name else 2
    x = torch.randn(2, 1, *[64 if "smp" in name else 32 // dims // 4 * 8] * dims)
    x = x.double()
    fused.eval(), plain.eval()
    with torch.no_grad():
        assert_near(fused(x), plain(x))
    plain.load_state_dict(fused.state_dict(), strict=True)
    fused.load_state_dict(plain.state_dict(), strict=True)
    # Gradients in evaluation mode: of a whole network in training one ReLU that changes its sign
    # would move them (tests/fusion/test_families.py smooths it).
    for model in (fused, plain):
        model(x).square().sum().backward()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            assert a.grad is not None
            assert_near(a.grad, b.grad, 1e-7)
