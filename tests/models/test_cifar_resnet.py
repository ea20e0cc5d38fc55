"""ResNets for CIFAR and their plain twins: published sizes, shortcuts, the reference backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resops.models import CifarResNet, create_model
from tests.models.twins import (
    assert_evaluates_as_twin,
    assert_trains_as_twin,
    parameter_count,
)

pytestmark = [pytest.mark.models, pytest.mark.usefixtures("one_thread")]

# He et al., "Deep Residual Learning for Image Recognition", 2015, Table 6, in millions.
PUBLISHED = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}
SHORTCUTS = ["A", "B", "pool", "conv2", None]


@pytest.mark.parametrize("depth", PUBLISHED)
def test_parameters_are_as_many_as_published(depth: int) -> None:
    with torch.device("meta"):
        model = create_model(f"resnet{depth}")
        plain = create_model(f"plain{depth}") if depth < 1202 else model
    millions = parameter_count(model) / 1e6
    assert round(millions, 1 if depth >= 110 else 2) == PUBLISHED[depth]
    assert parameter_count(plain) == parameter_count(model)  # option A has no parameters
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_equals_its_twin(shortcut: str | None, native: None) -> None:
    model = CifarResNet(14, shortcut=shortcut, act_layer="silu")
    x = torch.randn(3, 3, 13, 10)
    for channels_last in (True, False):
        assert_trains_as_twin(model, x, channels_last)
    assert_evaluates_as_twin(model, x, True)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_and_autocast(layout: torch.memory_format, dtype: torch.dtype) -> None:
    model: Any = create_model("resnet20")
    model = model.to(memory_format=layout)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=layout)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = model(x)
        F.cross_entropy(y, torch.tensor([1, 2])).backward()
    assert y.shape == (2, 10) and y.dtype == dtype
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, key


def test_shortcut_without_parameters_is_the_papers() -> None:
    """Figure 3: every second pixel, and zeros for the channels that are new."""
    model: Any = CifarResNet(8)
    block = model.layer2[0]
    x = torch.randn(2, 16, 6, 7)
    y = block.downsample(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2]) and not y[:, 16:].any()
    assert y.shape == (2, 32, 3, 4)


def test_a_plain_network_has_no_shortcuts() -> None:
    """A block whose branch is 0 is 0, and not its input."""
    model: Any = CifarResNet(8, shortcut=None)
    block = model.layer1[0].eval()
    nn.init.zeros_(block.bn2.weight)
    with torch.no_grad():
        assert not block(torch.randn(2, 16, 4, 4)).any()


def test_feature_maps() -> None:
    model: Any = CifarResNet(8, features_only=True, out_indices=(0, 3))
    maps = model(torch.randn(2, 3, 12, 12))
    assert [m.shape[1:] for m in maps] == [(16, 12, 12), (64, 3, 3)]
    assert [(info.channels, info.reduction) for info in model.feature_info] == [(16, 1), (64, 4)]


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2, such as 20, but got 21"):
        CifarResNet(21)
    with pytest.raises(ValueError, match="shortcut must be one of A, B, pool, conv2, but got 'C'"):
        create_model("resnet20", shortcut="C")
    with pytest.raises(ValueError, match="a plain network takes no residual"):
        create_model("plain20", residual="rescale")
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 1 channels"):
        create_model("resnet20")(torch.randn(2, 1, 8, 8))
    state = create_model("resnet20").state_dict()
    state["extra"] = state.pop("fc.bias")
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*fc\.bias.*Unexpected key.*extra"):
        create_model("resnet20").load_state_dict(state)
