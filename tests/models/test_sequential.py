"""The sequential baselines and ConvNeXt against torchvision's: same state, same numbers.

Whole classifiers are compared on the meta device only, where a parameter has a size and no memory:
two of them would take a gigabyte."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import resops
from resops.models import VGG, AlexNet, ConvNeXt, ConvNeXtBlock, create_model
from tests.dispatch import counted_calls
from tests.models.twins import (
    assert_evaluates_as_twin,
    assert_trains_as_twin,
    assert_trains_in_bfloat16,
    parameter_count,
)
from tests.torchvision_ops import published_parameters, torchvision

pytestmark = [pytest.mark.models, pytest.mark.usefixtures("native", "one_thread")]

VGGS = [f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")]


@pytest.mark.parametrize("name", ["alexnet", *VGGS, "convnext_tiny"])
def test_state_and_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        ours: Any = create_model(name)
        theirs = getattr(torchvision().models, name)()
    own, stated = ours.state_dict(), theirs.state_dict()
    assert [(k, tuple(v.shape)) for k, v in own.items()] == [
        (k, tuple(v.shape)) for k, v in stated.items()
    ]
    assert parameter_count(ours) == published_parameters(name)


def narrow_vgg(**kwargs: Any) -> VGG:
    """Its features: the classifier has nothing of ours."""
    return VGG((1, 1, 2), 5, 2, widths=(4, 8, 16), features_only=True, **kwargs)


def narrow_convnext(**kwargs: Any) -> ConvNeXt:
    return ConvNeXt((1, 2), (8, 16), 5, 2, **kwargs)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg_features_are_torchvisions(batch_norm: bool) -> None:
    name = "vgg11_bn" if batch_norm else "vgg11"
    features: list[Any] = []
    for make in (create_model, lambda name: getattr(torchvision().models, name)()):
        with torch.device("meta"):
            model: Any = make(name)
        features.append(model.features.to_empty(device="cpu"))
    ours, theirs = features
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.rand(t.shape, generator=generator) * 0.1 if t.is_floating_point() else t * 0
        for key, t in theirs.state_dict().items()
    }
    ours.load_state_dict(state, strict=True), theirs.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 33, 35)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4 * expected.max())


def test_convnext_is_torchvisions() -> None:
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.convnext import ConvNeXt as Theirs

    torch.manual_seed(3)
    ours = ConvNeXt((1, 2), (8, 16), 5, layer_scale=0.5)
    torch.manual_seed(3)
    settings = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]
    theirs = Theirs(settings, layer_scale=0.5, num_classes=5)
    for (key, a), (other, b) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert key == other and torch.equal(a, b), key
    x = torch.randn(2, 3, 17, 19)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_alexnet_features_are_torchvisions() -> None:
    with torch.device("meta"):
        ours = AlexNet().features.to_empty(device="cpu")
        theirs = torchvision().models.alexnet().features.to_empty(device="cpu")
    state = {key: torch.randn_like(t) * 0.02 for key, t in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=True), theirs.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 63, 80)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["vgg", "vgg_bn", "convnext"])
def test_twins(name: str, channels_last: bool) -> None:
    x = torch.randn(2, 2, 18, 21)
    model = narrow_convnext() if name == "convnext" else narrow_vgg(batch_norm=name == "vgg_bn")
    assert_evaluates_as_twin(model, x, channels_last)
    if name == "vgg_bn":
        # Their relu stays: float64 has no value near enough to 0 among these few.
        assert_trains_as_twin(model, x, channels_last)


@pytest.mark.parametrize("make", [narrow_convnext, narrow_vgg], ids=["convnext", "vgg"])
def test_bfloat16(make: Any) -> None:
    assert_trains_in_bfloat16(make(), torch.randn(2, 2, 16, 16))


def test_feature_maps() -> None:
    x = torch.randn(1, 2, 18, 21)
    maps = narrow_vgg()(x)
    assert [tuple(y.shape) for y in maps] == [(1, 4, 9, 10), (1, 8, 4, 5), (1, 16, 2, 2)]
    maps = narrow_convnext(features_only=True, out_indices=(1, 0))(x)
    assert [tuple(y.shape) for y in maps] == [(1, 16, 2, 2), (1, 8, 4, 5)]
    alexnet: Any = create_model("alexnet", features_only=True, out_indices=(0, 2))
    assert [y.size(1) for y in alexnet(torch.randn(1, 3, 63, 63))] == [64, 384]
    assert len(alexnet.features) == 8


def test_dropping_branches() -> None:
    """In training the branch of some samples; evaluation keeps all."""
    block = ConvNeXtBlock(4, layer_scale=1.0, drop_path_rate=0.5)
    x = torch.randn(1, 4, 5, 5).expand(64, -1, -1, -1).contiguous()
    kept = (block(x) != x).flatten(1).any(1)
    assert 8 < int(kept.sum()) < 56  # p < 1e-9 outside
    block.eval()
    assert (block(x) != x).flatten(1).any(1).all()
    model = ConvNeXt((2, 3), (4, 8), drop_path_rate=0.4)
    rates = [m.join.add.drop_prob for m in model.modules() if isinstance(m, ConvNeXtBlock)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_convolution_of_vgg_is_folded_with_its_norm() -> None:
    model = narrow_vgg(batch_norm=True).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(1, 2, 16, 16)
    with torch.no_grad():
        model(x)
        with counted_calls() as calls:
            model(x)
    assert not any("batch_norm" in name for name in calls)


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (narrow_vgg, (1, 2, 7, 9), "7x9, and it takes at least 8x8"),
        (narrow_vgg, (1, 3, 9, 9), "2 channels, but got 3"),
        (narrow_convnext, (1, 2, 7, 9), "7x9, .* at least 8x8"),
        (
            lambda: create_model("alexnet", features_only=True, out_indices=(0,)),
            (1, 3, 62, 99),
            "62x99, .* at least 63x63",
        ),
    ],
)
def test_images_that_do_not_fit(make: Any, size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(size))


def test_reference_backend_takes_them() -> None:
    x = torch.randn(1, 2, 16, 16)
    with resops.backend("reference"), torch.no_grad():
        assert len(narrow_vgg(batch_norm=True)(x)) == 3


@pytest.mark.parametrize("batch", [1, 2])
def test_an_activation_in_place_follows_a_convolution_of_ours(batch: int) -> None:
    """A training step in channels-last float32, in which our kernels compute 3x3 convolutions."""
    torch.manual_seed(0)
    model = VGG((2, 1), 5, 16, widths=(32, 16), features_only=True)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    twin = copy.deepcopy(model)
    x = torch.randn(batch, 16, 16, 16).contiguous(memory_format=torch.channels_last)
    with counted_calls() as calls:
        model(x)
    assert calls["conv_bn_act_forward"] == 3
    y = model(x)[-1]  # the counter changes which tensors are views
    with resops.backend("reference"):
        expected = twin(x)[-1]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for a, b in ((model, y), (twin, expected)):
        b.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in a.parameters())
