"""U-Net++, the 3-D networks, the stacked hourglass and the pyramid against their twins, and against
the numbers of their papers. Networks are narrow and images small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resops.models import (
    FPN,
    FeaturePyramid,
    StackedHourglass,
    UNet3d,
    UNetPlusPlus,
    VNet,
    create_model,
    heatmap_peaks,
    list_models,
    overlap_tile,
)
from resops.models.unet import UNet
from tests.models.twins import (
    assert_evaluates_as_twin,
    assert_trains_as_twin,
    assert_trains_in_bfloat16,
    outputs,
    parameter_count,
    wild,
)
from tests.torchvision_ops import torchvision

pytestmark = pytest.mark.usefixtures("native", "one_thread")

NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "unetplusplus": (
        lambda **kwargs: UNetPlusPlus(2, 2, (4, 8, 16), **kwargs),
        (2, 2, 9, 11),
    ),
    "unetplusplus, deeply supervised, bilinear": (
        lambda **kwargs: UNetPlusPlus(
            2, 2, (4, 8, 16), bilinear=True, deep_supervision=True, **kwargs
        ),
        (2, 2, 9, 11),
    ),
    "unet3d": (lambda **kwargs: UNet3d(2, 2, (8, 16), **kwargs), (2, 2, 3, 5, 4)),
    "unet3d, residual, trilinear": (
        lambda **kwargs: UNet3d(2, 2, (8, 16), residual=True, trilinear=True, **kwargs),
        (2, 2, 3, 5, 4),
    ),
    "unet3d, instance norm": (
        lambda **kwargs: UNet3d(2, 2, (8, 16), norm_layer="instance", **kwargs),
        (2, 2, 5, 7, 6),
    ),
    "vnet": (lambda **kwargs: VNet(2, 2, (4, 8), (1, 2), **kwargs), (2, 2, 3, 5, 4)),
    "hourglass": (
        lambda **kwargs: StackedHourglass(3, 2, 2, 16, 1, **kwargs),
        (2, 2, 13, 15),
    ),
}
LAYOUTS = pytest.mark.parametrize(
    "channels_last", [False, True], ids=["contiguous", "channels_last"]
)
EVERY = pytest.mark.parametrize("name", NETWORKS)


@LAYOUTS
@EVERY
def test_training_equals_the_twins(name: str, channels_last: bool) -> None:
    make, size = NETWORKS[name]
    assert_trains_as_twin(make(act_layer="silu"), torch.randn(size), channels_last)


@LAYOUTS
@EVERY
def test_evaluation_equals_the_twins(name: str, channels_last: bool) -> None:
    make, size = NETWORKS[name]
    assert_evaluates_as_twin(make(), torch.randn(size), channels_last)


@EVERY
def test_bfloat16(name: str) -> None:
    make, size = NETWORKS[name]
    assert_trains_in_bfloat16(make(), torch.randn(size))


@pytest.mark.parametrize(
    ("make", "count"),
    [
        # "Total params" in the authors' own code of both, github.com/MrGiovanni/UNetPlusPlus
        (lambda: UNetPlusPlus(1, 1, norm_layer="none"), 9_041_601),
        (lambda: UNet(1, 1, (32, 64, 128, 256, 512), norm_layer="none"), 7_759_521),
        # Çiçek et al., 2016, section 2: "19069955 parameters in total", which are those of the
        # convolutions, with biases
        (lambda: create_model("unet3d", norm_layer="none"), 19_069_955),
    ],
    ids=["unetplusplus", "unet", "unet3d"],
)
def test_published_parameter_counts(make: Any, count: int) -> None:
    with torch.device("meta"):
        assert parameter_count(make()) == count


def test_hourglass_of_the_paper() -> None:
    """Sun et al., "Deep High-Resolution Representation Learning for Human Pose Estimation", 2019,
    Table 1: 25.1 M for eight stacks, of which it is not said what is counted; biases and norms are
    the 1 % that we have more."""
    with torch.device("meta"):
        model = create_model("hourglass", num_classes=17)
    assert abs(parameter_count(model) / 25.1e6 - 1) < 0.02
    narrow = StackedHourglass(num_stacks=2, width=4)
    assert [tuple(y.shape) for y in narrow(torch.randn(1, 3, 256, 256))] == [(1, 16, 64, 64)] * 2


def test_receptive_fields_of_vnet() -> None:
    """Milletari et al., 2016, Table 1: what a value of each stage sees of the volume."""
    with torch.device("meta"):
        model: Any = create_model("vnet")
    field, step, found = 1, 1, []

    def stage(module: Any) -> None:
        nonlocal field
        for conv in module.convs:
            if isinstance(conv, nn.Conv3d):
                field += (conv.kernel_size[0] - 1) * step
        found.append(field)

    stage(model.inc)
    for down, after in zip(model.down_convs, model.downs, strict=True):
        field, step = field + (down.conv.kernel_size[0] - 1) * step, step * down.conv.stride[0]
        stage(after)
    for up, after in zip(model.up_convs, model.ups, strict=True):
        step //= up.conv.stride[0]
        field += step
        stage(after)
    assert found == [5, 22, 72, 172, 372, 476, 528, 546, 551]


def test_names() -> None:
    names = {"unet", "unet_valid", "residual_unet", "unetplusplus", "unet3d", "vnet"}
    assert names | {"hourglass", "fpn"} <= set(list_models())


def test_deep_supervision() -> None:
    """A list in training, the mean in evaluation; each head sees its own diagonal."""
    model = UNetPlusPlus(2, 1, (4, 8, 16), deep_supervision=True)
    x = torch.randn(1, 1, 8, 8)
    logits = model(x)
    assert [tuple(y.shape) for y in logits] == [(1, 2, 8, 8)] * 2
    model.eval()
    parts = []
    for name in model.heads:
        model.get_submodule(name).register_forward_hook(lambda m, x, y: parts.append(y))
    torch.testing.assert_close(model(x), torch.stack(parts).mean(0))
    plain = UNetPlusPlus(2, 1, (4, 8, 16))
    assert isinstance(plain(x), Tensor)


def test_tiles_of_volumes() -> None:
    model = wild(UNet3d(2, 1, (4, 8))).double().eval()
    x = torch.randn(1, 1, 5, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(overlap_tile(model, x, 4), overlap_tile(model, x, 8))


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (lambda: UNetPlusPlus(2, 1, (4, 8, 16)), (1, 1, 3, 8), "3x8, and it takes at least 4x4"),
        (lambda: UNet3d(2, 1, (4, 8)), (1, 1, 1, 8, 8), "1x8x8, .* at least 2x2x2"),
        (lambda: UNet3d(2, 1, (4, 8)), (1, 8, 8, 8), r"\(N, C, D, H, W\), but got 1x8x8x8"),
        (lambda: VNet(2, 1, (4, 8), (1, 1)), (1, 2, 8, 8, 8), "1 channels, but got 2"),
        (lambda: StackedHourglass(3, 1, 1, 16, 1), (1, 1, 6, 9), "6x9, .* at least 7x7"),
    ],
)
def test_images_that_do_not_fit(make: Any, size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(size))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="in_chans must divide the 16 of widths, but got 3"):
        VNet(in_chans=3)
    with pytest.raises(ValueError, match="widths and depths must be as many"):
        VNet(widths=(4, 8), depths=(1,))
    with pytest.raises(ValueError, match="num_stacks, depth and blocks must be at least 1"):
        StackedHourglass(num_stacks=0)
    with pytest.raises(ValueError, match="widths must be two"):
        UNet3d(widths=(4,))
    with pytest.raises(ValueError, match="widths must be two"):
        UNetPlusPlus(widths=(4,))


# ---- heatmaps ----------------------------------------------------------------------------------


def test_peaks_of_heatmaps() -> None:
    heatmaps = torch.zeros(2, 2, 5, 7)
    heatmaps[0, 0, 2, 3] = 1.0
    heatmaps[0, 0, 2, 4] = 0.5  # to the right
    heatmaps[0, 0, 1, 3] = 0.2  # upwards
    heatmaps[0, 1, 0, 6] = 2.0  # in a corner: not moved
    heatmaps[1, 0, 4, 2], heatmaps[1, 0, 4, 1] = 1.0, 0.1
    heatmaps[1, 1, 3, 5] = -1.0  # all others are 0: the first pixel
    peaks, scores = heatmap_peaks(heatmaps, stride=4)
    expected = [[[3.75, 2.25], [6.5, 0.5]], [[2.25, 4.5], [0.5, 0.5]]]
    assert torch.equal(peaks, 4 * torch.tensor(expected))
    assert torch.equal(scores, torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
    wide = torch.zeros(1, 1, 1, 1025, dtype=torch.bfloat16)  # of a size that it cannot count to
    wide[..., 1000] = 1
    assert heatmap_peaks(wide, 1)[0].tolist() == [[[1000.5, 0.5]]]
    with pytest.raises(ValueError, match=r"\(N, K, H, W\)"):
        heatmap_peaks(heatmaps[0])


def test_heatmaps_go_into_the_next_stack() -> None:
    """Intermediate supervision: the loss of the second stack has a gradient in the first head."""
    model: Any = StackedHourglass(3, 1, 2, 16, 1)
    first, second = model(torch.randn(2, 1, 16, 16))
    assert first.shape == second.shape == (2, 3, 4, 4)
    second.sum().backward()
    grad = model.heads[0].weight.grad
    assert grad is not None and float(grad.abs().max()) > 0


# ---- pyramid -----------------------------------------------------------------------------------


@pytest.mark.models
def test_pyramid_is_torchvisions() -> None:
    torch.manual_seed(3)
    ours = FeaturePyramid((4, 8, 16), 6, extra_levels=1)
    torch.manual_seed(3)
    ops = torchvision().ops
    extra = ops.feature_pyramid_network.LastLevelMaxPool()
    theirs = ops.FeaturePyramidNetwork([4, 8, 16], 6, extra_blocks=extra)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    maps = [torch.randn(2, c, *s) for c, s in zip((4, 8, 16), ((11, 9), (6, 5), (3, 3)))]  # noqa: B905
    expected = list(theirs(dict(enumerate(maps))).values())
    for y, z in zip(ours(maps), expected, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)


@LAYOUTS
def test_fpn_over_a_resnet(channels_last: bool) -> None:
    model = FPN("resnet18", out_channels=16)
    x = torch.randn(2, 3, 65, 70)
    sizes = [(17, 18), (9, 9), (5, 5), (3, 3), (2, 2)]
    with torch.no_grad():
        assert [tuple(y.shape[2:]) for y in outputs(model(x))] == sizes
    assert {y.size(1) for y in outputs(model(x))} == {16}
    assert_evaluates_as_twin(model, x, channels_last)


def test_fpn_trains() -> None:
    assert_trains_in_bfloat16(FPN("resnet18", out_channels=16), torch.randn(2, 3, 65, 70))
