"""Pre-activation and wide ResNets: timm's state and numbers, published sizes, the reference
backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resops.models import PreActResNet, WideResNet, create_model
from resops.models._residual import RESIDUALS
from resops.models.preact_resnet import PreActBasic, PreActBottleneck
from tests.dispatch import counted_calls
from tests.models.twins import (
    assert_evaluates_as_twin,
    assert_trains_as_twin,
    parameter_count,
    wild,
)
from tests.torchvision_ops import timm

pytestmark = [pytest.mark.models, pytest.mark.usefixtures("one_thread")]

TIMM = ["resnetv2_18", "resnetv2_34", "resnetv2_50", "resnetv2_101", "resnetv2_152"]

NORM = nn.BatchNorm2d
# In millions.
PUBLISHED = {
    # He et al., "Identity Mappings in Deep Residual Networks", 2016, Table 4: without norms.
    "preact_resnet110": 1.7,
    "preact_resnet164": 1.7,
    "preact_resnet1001": 10.2,
    # Zagoruyko and Komodakis, "Wide Residual Networks", 2016, Tables 4 and 5.
    "wrn_40_4": 8.9,
    "wrn_16_8": 11.0,
    "wrn_22_8": 17.2,
    "wrn_28_10": 36.5,
    # timm's table of results: https://github.com/huggingface/pytorch-image-models
    "resnetv2_50": 25.5,
    "resnetv2_101": 44.5,
}


def small(block: Any, **kwargs: Any) -> PreActResNet:
    channels = [8 * block.expansion, 16 * block.expansion]
    options = {"stem_chs": 8, "act_layer": "silu", **kwargs}
    return PreActResNet(block, [2, 1], channels, num_classes=3, **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    parameters = parameter_count(model)
    if name.startswith("preact"):
        parameters -= sum(parameter_count(m) for m in model.modules() if isinstance(m, NORM))
    assert parameters / 1e6 == pytest.approx(PUBLISHED[name], abs=0.06)


@pytest.mark.parametrize("name", TIMM)
def test_state_is_timms(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = create_model(name), timm().create_model(name)
    own, stated = ours.state_dict(), theirs.state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in stated.items()}
    if name == "resnetv2_18":
        ours, theirs = create_model(name), timm().create_model(name)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["resnetv2_18", "resnetv2_50"])
def test_numbers_are_timms(name: str) -> None:
    """Logits and feature maps in evaluation, and logits, gradients and statistics of a step."""
    ours = wild(create_model(name, num_classes=5, act_layer="silu"))
    theirs = timm().create_model(name, num_classes=5, act_layer="silu")
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    ours.double(), theirs.double()
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-9)
    y.square().sum().backward()
    expected.square().sum().backward()
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert float((p.grad - q.grad).abs().max()) <= 1e-7 * largest, key
    state = theirs.state_dict()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-8, atol=1e-9, msg=key)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-8, atol=1e-9)
        _, maps = theirs.forward_intermediates(x)
        found = ours.forward_intermediates(x, range(5))
        for a, b, info in zip(found, maps, ours.feature_info, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
            assert a.size(1) == info.channels


@pytest.mark.parametrize("block", [PreActBasic, PreActBottleneck])
@pytest.mark.parametrize("small_images", [True, False], ids=["small images", "large images"])
def test_equals_its_twin(block: Any, small_images: bool) -> None:
    model = small(block, small_images=small_images)
    x = torch.randn(3, 3, 18, 13)
    for channels_last in (True, False):
        assert_trains_as_twin(model, x, channels_last)
    assert_evaluates_as_twin(model, x, True)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_residuals_equal_their_twins(residual: str) -> None:
    model = small(PreActBasic, residual=residual, drop_path_rate=0.2, small_images=True)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():  # multipliers and last convolutions that begin at 0
                p.normal_(0, 0.3)
    assert_trains_as_twin(model, torch.randn(4, 3, 6, 6), True)


def test_nothing_follows_the_sum() -> None:
    """Figure 1b: where branches return 0 the last block returns the first one's input."""
    model: Any = small(PreActBottleneck, small_images=True, zero_init_residual=True)
    block = model.stages[0].blocks[1]
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(block(x), x)


def test_dropout_of_wide_networks() -> None:
    model: Any = WideResNet(10, 1, drop_rate=0.5)
    blocks = [m for m in model.modules() if isinstance(m, PreActBasic)]
    assert [b.dropout.p for b in blocks] == [0.5] * 3
    x = torch.randn(2, 3, 8, 8)
    dropped: list[Tensor] = []
    blocks[0].conv2.register_forward_pre_hook(lambda _, args: dropped.append(args[0]))
    model(x)
    model.eval()(x)
    shares = [float((y == 0).float().mean()) for y in dropped]
    assert shares[0] > shares[1] + 0.15  # relu's zeros are there without dropout


def test_evaluation_folds_every_norm_after_a_convolution() -> None:
    model = small(PreActBasic, small_images=True, act_layer="relu").eval()
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        model(x)
        with counted_calls() as calls:
            model(x)
    blocks = sum(isinstance(m, PreActBasic) for m in model.modules())
    assert calls["batch_norm_forward"] == blocks + 1  # norm1 of each block, and the last norm


def test_feature_maps() -> None:
    model: Any = small(PreActBasic, features_only=True, out_indices=(0, 1))
    whole = small(PreActBasic)
    assert not model.load_state_dict(whole.state_dict(), strict=False).missing_keys
    maps = model(torch.randn(2, 3, 16, 16))
    assert [m.shape[1:] for m in maps] == [(8, 8, 8), (8, 4, 4)]
    assert len(model.stages) == 1 and not hasattr(model, "head")


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 4, such as 28, but got 20"):
        WideResNet(20, 2)
    with pytest.raises(ValueError, match="widen_factor must be positive, but got 0"):
        WideResNet(10, 0)
    with pytest.raises(ValueError, match="a bottleneck has no dropout, but got drop_rate"):
        small(PreActBottleneck, drop_rate=0.1)
    with pytest.raises(ValueError, match=r"did you mean .*preact_resnet"):
        create_model("preact_resnet100")


def test_weights_of_the_classifier_are_small() -> None:
    model: Any = small(PreActBasic)
    assert float(model.head.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.3)
    assert not model.head.fc.bias.any()
