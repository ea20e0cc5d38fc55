"""resops.integrations beside the packages that they are for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.dispatch import counted_calls
from tests.torchvision_ops import timm


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
