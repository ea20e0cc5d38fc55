"""Options of residual branches and of norms, on small residual networks: the papers' formulas,
and the reference backend."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from resops.models import (
    CifarResNet,
    ConvNeXt,
    StackedHourglass,
    UNet3d,
    VNet,
    create_model,
)
from resops.models._residual import RESIDUALS, Join, ResidualBlock
from resops.nn import ResDrop, ResidualAdd, ShakeDrop, ShakeShake
from tests.dispatch import counted_calls, native_calls
from tests.models.twins import assert_evaluates_as_twin, assert_trains_as_twin

pytestmark = [pytest.mark.models, pytest.mark.usefixtures("one_thread")]

NORMS = ["ghost_batch", "batch_renorm", "group", "layer", "instance", "none"]


def small(**options: Any) -> Any:
    """Eight layers."""
    torch.manual_seed(1)
    return as_in_training(CifarResNet(8, num_classes=3, **{"act_layer": "silu", **options}))


def as_in_training(model: nn.Module) -> nn.Module:
    """No parameter is 0 or 1, as they are when training begins."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
            elif not p.any():
                nn.init.kaiming_normal_(p)
    return model


def assert_equals_twin(model: nn.Module) -> None:
    x = torch.randn(4, 3, 9, 8)
    assert_trains_as_twin(model, x, channels_last=True)
    # The errors of Winograd's algorithm are larger than those of the twin's convolutions.
    with resops.set_conv_precision("highest"):
        assert_evaluates_as_twin(model, x, channels_last=True)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_residuals_equal_their_twins(residual: str) -> None:
    assert_equals_twin(small(residual=residual, drop_path_rate=0.3))


# Of the other families; pre-activation networks have tests of their own.
FAMILIES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "residual_unet": (
        functools.partial(create_model, "residual_unet", in_chans=2, widths=(4, 8)),
        (3, 2, 5, 6),
    ),
    "unet3d": (functools.partial(UNet3d, in_chans=2, widths=(4, 8)), (3, 2, 3, 5, 4)),
    "vnet": (functools.partial(VNet, 2, 2, (4, 8), (1, 2)), (3, 2, 3, 5, 4)),
    "hourglass": (functools.partial(StackedHourglass, 3, 2, 2, 8, 1), (3, 2, 13, 15)),
    "convnext": (
        functools.partial(ConvNeXt, (1, 2), (4, 8), num_classes=3, layer_scale=0.5),
        (3, 3, 9, 10),
    ),
}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "unet3d"])  # as the U-Net
@pytest.mark.parametrize("residual", RESIDUALS)
def test_residuals_of_every_family_equal_their_twins(name: str, residual: str) -> None:
    if (name, residual) == ("convnext", "fixup"):
        pytest.skip("ConvNeXt has norms")
    make, size = FAMILIES[name]
    options = {} if name == "convnext" else {"act_layer": "silu"}
    rate = 0.05 if residual == "res_drop" else 0.3  # it drops whole batches, with their gradients
    model = as_in_training(make(residual=residual, drop_path_rate=rate, **options))
    kinds = {type(m) for m in model.modules()}
    found = {
        "sum": ResidualAdd,  # with the probability to be dropped
        "res_drop": ResDrop,
        "shake_shake": ShakeShake,
        "shake_drop": ShakeDrop,
    }
    assert found.get(residual, ResidualAdd) in kinds
    x = torch.randn(size)
    assert_trains_as_twin(model, x, channels_last=True)
    with resops.set_conv_precision("highest"):
        assert_evaluates_as_twin(model, x, channels_last=True)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "convnext"])
@torch.no_grad()
def test_blocks_of_every_family_begin_as_their_shortcuts(name: str) -> None:
    make, _ = FAMILIES[name]
    options = {"residual": True} if name == "unet3d" else {}
    for option in ({"residual": "fixup"}, {"residual": "skip_init"}, {"zero_init_residual": True}):
        model = make(act_layer="identity", **{**options, **option})
        blocks: list[Any] = [m for m in model.modules() if isinstance(m, ResidualBlock)]
        for block in blocks:
            first, last = block.chain()[0][0], block.chain()[-1][0]
            assert isinstance(block.join, Join) or "zero_init_residual" in option
            x = torch.randn(2, first.in_channels, *[4] * len(first.kernel_size))
            if name == "vnet":
                shortcut = torch.randn(2, last.out_channels, 4, 4, 4)
                assert torch.equal(block(x, shortcut), shortcut)
            else:
                expected = x if block.shortcut is None else block.shortcut(x)
                assert torch.equal(block(x), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_depths_of_stable_networks_count_every_block(name: str) -> None:
    """K of 1/sqrt(K), and the rates of stochastic depth end at the one that was asked for."""
    make, _ = FAMILIES[name]
    model = make(residual="stable", drop_path_rate=0.4)
    joins: list[Any] = [m.join.add for m in model.modules() if isinstance(m, ResidualBlock)]
    assert {join.alpha for join in joins} == {len(joins) ** -0.5}
    rates = [join.drop_prob for join in joins]
    last = len(joins) - 1
    assert sorted(rates) == pytest.approx([0.4 * k / last for k in range(last + 1)])


@pytest.mark.parametrize("norm_layer", NORMS)
def test_norms_equal_their_twins(norm_layer: str) -> None:
    assert_equals_twin(small(norm_layer=norm_layer))


def test_weight_standardisation_equals_its_twin() -> None:
    model = small(norm_layer="group", weight_standardization=True, shortcut="B")
    assert_equals_twin(model)
    # Any scale and shift of a filter is normalised away.
    model = model.double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(3).add_(1)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)  # but for eps


def block_parts(model: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the last block: what it returns, its branch and its shortcut, for one input."""
    block = model.layer3[0]
    entered = x if block.enter is None else block.enter(x)
    return block(x), block.branch(entered), block.downsample(entered)


@pytest.mark.parametrize("residual", ["rescale", "skip_init", "stable", "res_drop", "shake_drop"])
@torch.no_grad()
def test_formulas_in_evaluation(residual: str) -> None:
    model = small(residual=residual, drop_path_rate=0.4, shortcut="B").double().eval()
    y, branch, shortcut = block_parts(model, torch.randn(2, 32, 6, 6, dtype=torch.float64))
    sums = {
        "rescale": lambda: (branch + shortcut) / math.sqrt(2),
        "skip_init": lambda: model.layer3[0].join.add.alpha * branch + shortcut,
        "stable": lambda: branch / math.sqrt(3) + shortcut,
        "res_drop": lambda: 0.6 * branch + shortcut,
        "shake_drop": lambda: 0.6 * branch + shortcut,
    }
    torch.testing.assert_close(y, F.silu(sums[residual]()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", ["sum", "res_drop"])
def test_probabilities_rise_linearly(residual: str) -> None:
    model = CifarResNet(20, residual=residual, drop_path_rate=0.8)
    blocks = [b for i in (1, 2, 3) for b in getattr(model, f"layer{i}")]
    rates = [0.0 if b.join is None else b.join.add.drop_prob for b in blocks]
    K = len(blocks)
    expected = {
        "sum": [0.8 * k / (K - 1) for k in range(K)],
        "res_drop": [0.8 * k / K for k in range(1, K + 1)],
    }
    assert rates == pytest.approx(expected[residual])


@torch.no_grad()
def test_dropped_branches() -> None:
    """Stochastic depth drops branches sample by sample and scales what is left; ResDrop drops them
    for the whole batch."""
    x = torch.randn(64, 32, 2, 2, dtype=torch.float64)
    for residual, kept in (("sum", 1 / 0.5), ("res_drop", 1.0)):
        model = small(residual=residual, drop_path_rate=0.5, shortcut="B", norm_layer="layer")
        y, branch, shortcut = block_parts(model.double(), x)
        dropped = torch.isclose(y, F.silu(shortcut)).all(3).all(2).all(1)
        scaled = torch.isclose(y, F.silu(kept * branch + shortcut)).all(3).all(2).all(1)
        assert (dropped ^ scaled).all()
        assert 10 < dropped.sum() < 54 if residual == "sum" else dropped.sum() in (0, 64)


def test_skip_init_and_zero_gamma_begin_as_shortcuts() -> None:
    for options in ({"residual": "skip_init"}, {"zero_init_residual": True}):
        model: Any = CifarResNet(8, **options)
        x = torch.randn(2, 16, 4, 4)
        assert torch.equal(model.layer1[0](x), F.relu(x))


def test_fixup_begins_as_the_paper_has_it() -> None:
    """Zhang et al., 2019, section 3: last convolutions and classifier 0, the others of a branch of
    m = 2 convolutions scaled by K^(-1/2); no norm anywhere."""
    model: Any = CifarResNet(26, residual="fixup", shortcut="B")
    assert not any(
        "Norm" in type(m).__name__.replace("NormActivation", "") for m in model.modules()
    )
    assert not model.fc.weight.any() and not model.layer2[1].conv2.weight.any()
    weight = model.layer3[1].conv1.weight
    expected = math.sqrt(2 / (64 * 9)) * 12**-0.5
    assert float(weight.detach().std()) == pytest.approx(expected, rel=0.05)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(model.layer1[0](x), F.relu(x))
    # Every scalar is where the paper's Figure 1 has one: 4 biases and a multiplier a block.
    scalars = [p for p in model.layer1[0].parameters() if p.dim() == 1]
    assert [p.numel() for p in scalars] == [1] * 5


def test_shake_shake_mixes_two_branches() -> None:
    model = small(residual="shake_shake", shortcut="B").double().eval()
    block = model.layer3[0]
    x = torch.randn(2, 32, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = (block.branch(x) + block.second.branch(x)) / 2 + block.downsample(x)
        torch.testing.assert_close(block(x), F.silu(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "norm_layer", [nn.BatchNorm2d, lambda c: nn.GroupNorm(4, c), nn.InstanceNorm2d]
)
def test_norms_of_torch_keep_their_keys(norm_layer: Any) -> None:
    """They are the fused forms of the same norm."""
    model = CifarResNet(8, norm_layer=norm_layer)
    assert hasattr(model.bn1, "epilogue")
    keys = [key.split(".", 1)[1] for key in model.state_dict() if key.startswith("bn1.")]
    assert keys == list(norm_layer(16).state_dict())


def test_norms_and_activations_without_fused_form() -> None:
    """They run as they are, and so does the join, which is left to its own op."""
    model: Any = CifarResNet(8, norm_layer=lambda c: nn.LocalResponseNorm(2), act_layer="tanh")
    block = model.layer1[0].double()
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    norm = nn.LocalResponseNorm(2)
    inner = torch.tanh(norm(block.conv1(x)))
    torch.testing.assert_close(block(x), torch.tanh(norm(block.conv2(inner)) + x))


def test_explain_says_what_has_no_fused_form(native: None) -> None:
    x = torch.randn(2, 3, 8, 8)

    def paths(**options: Any) -> set[tuple[str, str, str]]:
        model = CifarResNet(8, **options)
        rows = resops.explain(model, x).paths
        assert [row.name for row in rows][:2] == ["bn1", "layer1.0.bn1"]
        assert not any(module._forward_pre_hooks for module in model.modules())
        return {(row.pattern, row.path, row.why) for row in rows}

    assert paths() == {("BatchNormAct2d+ReLU", "native", "")}
    after = "Tanh has no fused form and runs after it"
    assert ("BatchNormAct2d+Tanh", "native", after) in paths(act_layer="tanh")
    own = ("NormThenAct+ReLU", "its own forward", "LocalResponseNorm has no fused form")
    assert own in paths(norm_layer=lambda channels: nn.LocalResponseNorm(2))
    with torch.no_grad():
        assert ("GroupNormAct+ReLU", "native", "") in paths(norm_layer="group")
    row = ("torch", "group norm has kernels where no gradient is recorded")
    assert ("GroupNormAct+ReLU", *row) in paths(norm_layer="group")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block_op", [True, False])
def test_explain_takes_the_path_that_it_tells(block_op: bool, training: bool, native: None) -> None:
    """It makes the calls that the model makes: blocks as one op, folded convolutions."""
    model: Any = create_model("resnet50", num_classes=2, block_op=block_op).train(training)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(training):
        model(x)  # which folds
        with counted_calls() as calls:
            model(x)
        with counted_calls() as in_explain:
            told = {p.name: p for p in resops.explain(model, x).paths}
    assert "aten::native_batch_norm" not in in_explain
    assert native_calls(calls) == {name: in_explain[name] for name in native_calls(calls)}
    if not training:
        assert len(told) == 53
        assert {p.path for p in told.values()} == {"folded into the convolution"}
        return
    assert {p.path for p in told.values()} == {"native"}
    assert told["bn1"].pattern == "batch_norm_act_max_pool, relu"
    if block_op:
        assert len(told) == 1 + 16
        assert told["layer1.0"].pattern == "bottleneck, relu"
    else:
        assert len(told) == 53
        assert told["layer1.0.bn1"].pattern == "BatchNormAct2d+ReLU"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_options_of_the_large_networks(name: str) -> None:
    """The same code; a shallow look at each: every parameter is reached."""
    for residual in ("fixup", "shake_shake"):
        model: Any = create_model(name, num_classes=2, residual=residual, act_layer="silu")
        if residual == "fixup":
            nn.init.normal_(model.fc.weight)
            for block in (b for i in range(1, 5) for b in getattr(model, f"layer{i}")):
                nn.init.normal_(block.chain()[-1][0].weight, 0, 0.01)
        model(torch.randn(2, 3, 33, 33)).square().sum().backward()
        for key, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), key


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="residual must be one of sum, rescale"):
        create_model("resnet20", residual="skip")
    with pytest.raises(ValueError, match=r"drop_path_rate must be between 0 and 1, but got 1\.5"):
        create_model("resnet20", drop_path_rate=1.5)
    with pytest.raises(ValueError, match="residual='fixup' goes without norms"):
        create_model("resnet20", residual="fixup", norm_layer="group")
    with pytest.raises(ValueError, match="norm_layer must be None, a class or one of batch, ghost"):
        create_model("resnet20", norm_layer="batchnorm")
    with pytest.raises(ValueError, match="act_layer must be a module class or one of relu"):
        create_model("resnet20", act_layer="rel")
    with pytest.raises(
        ValueError, match="zero_init_residual needs a weight of norms, but NormThenAct"
    ):
        create_model("resnet20", norm_layer="none", zero_init_residual=True)
