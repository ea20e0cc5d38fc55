"""``resops.fold`` of the layers of resops.nn and of the networks made of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import resops
from resops.nn.batch_norm import BatchNormAct
from tests.fusion.blocks import assert_near
from tests.models.twins import outputs, wild

FOLDED: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "resnet20": ({"norm_layer": "ghost_batch"}, (2, 3, 9, 8)),
    "resnet32": ({"norm_layer": "batch_renorm", "shortcut": "B"}, (2, 3, 9, 8)),
    "resnet50": ({}, (2, 3, 33, 33)),
    "preact_resnet110": ({}, (2, 3, 9, 8)),
    "densenet_bc_40": ({}, (2, 3, 9, 8)),
    "residual_unet": ({"widths": (4, 8)}, (2, 3, 9, 8)),
    "vnet": ({"widths": (4, 8), "depths": (1, 2)}, (2, 1, 3, 5, 4)),
    "hourglass": ({"num_stacks": 1, "width": 8, "depth": 1}, (2, 3, 13, 15)),
    "vgg11_bn": ({"widths": (4, 4, 4, 4, 4)}, (2, 3, 33, 33)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_fold_of_our_own_networks(name: str) -> None:
    """No norm is left behind a convolution; float64, since folding reorders sums."""
    options, size = FOLDED[name]
    model = wild(resops.models.create_model(name, **options)).double().eval()
    folded = resops.fold(model)
    x = torch.randn(size, dtype=torch.float64)
    with torch.no_grad():
        with resops.backend("reference"):
            expected = outputs(model(x))
        for y, z in zip(outputs(folded(x)), expected, strict=True):
            torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-9)
    norms = [m for m in model.modules() if isinstance(m, BatchNormAct)]
    left = [m for m in folded.modules() if isinstance(m, BatchNormAct)]
    # What no convolution comes before, and V-Net's behind a transposed one.
    before = {"preact_resnet110": 55, "densenet_bc_40": 18 + 2 + 1, "hourglass": 8, "vnet": 1}
    assert len(left) == before.get(name, 0) < len(norms)


def test_fold_leaves_shared_and_hooked_layers() -> None:
    conv, norm = nn.Conv2d(3, 3, 1).double(), resops.nn.BatchNormAct2d(3).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    shared = nn.Sequential(nn.Sequential(conv, norm), nn.Sequential(conv, norm)).eval()
    hooked = copy.deepcopy(nn.Sequential(conv, norm)).eval()
    hooked[0].register_forward_hook(lambda *args: None)
    plain = copy.deepcopy(nn.Sequential(conv, norm)).eval()
    for model, left in ((shared, 1), (hooked, 1), (plain, 0)):
        folded = resops.fold(model)
        assert sum(isinstance(m, BatchNormAct) for m in folded.modules()) == left
        assert_near(folded(x), model(x))
