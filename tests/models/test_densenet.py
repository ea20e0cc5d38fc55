"""The DenseNets against torchvision's: same state, same numbers, in evaluation and in training.

Most are made by torchvision's class with few layers and channels; of the networks of the paper the
state is compared. In float64 an activation changes its side by chance once in 1e15.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from bench.session import channels_last, saved_bytes
from resops.models import DenseNet, create_model, list_models
from tests.dispatch import counted_calls
from tests.models.twins import wild
from tests.torchvision_ops import torchvision

# One thread: on images this small a second one mostly waits.
pytestmark = [pytest.mark.models, pytest.mark.usefixtures("native", "one_thread")]

NAMES = ["densenet121", "densenet161", "densenet169", "densenet201"]
SMALL = (4, (2, 3, 2, 2), 8)  # growth, layers, channels of the stem
TRANSITIONS = 3
CONSUMERS = 2 + 3 + 2 + 2 + TRANSITIONS  # layers and transitions


def pair(**kwargs: Any) -> tuple[Any, Any]:
    """A small network of ours and torchvision's, the same state, statistics as after training."""
    torch.manual_seed(3)
    ours = wild(DenseNet(*SMALL, num_classes=5, **kwargs))
    theirs = torchvision().models.DenseNet(*SMALL, num_classes=5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def images(size: int = 64, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = create_model(name), getattr(torchvision().models, name)()
    own, stated = ours.state_dict(), theirs.state_dict()
    assert list(own) == list(stated)
    for key, value in stated.items():
        assert (own[key].dtype, own[key].shape) == (value.dtype, value.shape), key
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_initial_weights_are_torchvisions() -> None:
    torch.manual_seed(5)
    own = DenseNet(*SMALL, num_classes=5).state_dict()
    torch.manual_seed(5)
    for key, value in torchvision().models.DenseNet(*SMALL, num_classes=5).state_dict().items():
        assert torch.equal(own[key], value), key


def test_older_checkpoints_load() -> None:
    """Whose keys have a dot in the names of a layer's modules."""
    ours, _ = pair()
    layer = copy.deepcopy(ours.features.denseblock1.denselayer1)
    state = layer.state_dict()
    former = {
        key.replace("norm", "norm.", 1).replace("conv", "conv.", 1): value
        for key, value in state.items()
    }
    assert "norm.1.weight" in former and "conv.2.weight" in former
    for value in layer.parameters():
        nn.init.zeros_(value)
    layer.load_state_dict(former, strict=True)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("options", [{}, {"memory_efficient": False}], ids=str)
def test_training_steps_are_torchvisions(options: dict[str, Any]) -> None:
    """Loss, gradients, weights and running statistics of two steps, in float64."""
    models = pair(**options)
    x, target = images(), torch.tensor([3, 1])
    losses: list[list[Tensor]] = [[], []]
    for model, own in zip(models, losses, strict=True):
        model.double().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            own.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
    ours, theirs = models
    for (key, value), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-7, atol=1e-8, msg=key)


def test_every_block_is_one_op() -> None:
    ours, _ = pair()
    with counted_calls() as calls:
        y = ours(images(dtype=torch.float32))
        forward = dict(calls)
        y.sum().backward()
    # Of a layer's convolution the passes are part of a kernel.
    assert forward["dense_block_apply"] == calls["dense_block_accumulate"] == TRANSITIONS
    layers = CONSUMERS - TRANSITIONS
    narrow = forward["dense_block_narrow_forward"], calls["dense_block_narrow_backward"]
    assert narrow == (layers, layers)
    assert "aten::cat" not in calls


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@torch.no_grad()
def test_logits(memory_format: torch.memory_format) -> None:
    ours, theirs = (m.eval() for m in pair())
    x = images(dtype=torch.float32)
    exact = copy.deepcopy(theirs).double()(x.double())
    # nn.Module.to moves in place.
    ours, theirs = (m.to(memory_format=memory_format) for m in (ours, theirs))
    x = x.contiguous(memory_format=memory_format)
    errors = [float((m(x).double() - exact).norm() / exact.norm()) for m in (ours, theirs)]
    # Two honest orders of summation: both are within some 1e-7 of the truth.
    assert errors[0] <= 3 * errors[1] + 2e-7
    with counted_calls() as calls:
        ours(x)
    assert calls["dense_block_apply"] == CONSUMERS
    assert calls["aten::cat"] == 0


def test_plain_twin() -> None:
    """Inside backend("reference") the same network runs PyTorch's ops only."""
    ours, theirs = (m.double().eval() for m in pair())
    x = images()
    with resops.backend("reference"), counted_calls() as calls:
        y = ours(x)
    assert not [name for name in calls if "::" not in name]
    torch.testing.assert_close(y, theirs(x))


def test_frozen_norms() -> None:
    """All norms in evaluation, all weights trained: as in detection."""
    models = [m.double().train() for m in pair()]
    x = images()
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        model(x).square().sum().backward()
    ours, theirs = models
    for (name, p), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-7, atol=1e-8, msg=name)


def test_layers_that_were_changed_run_one_by_one() -> None:
    ours, theirs = (m.double().eval() for m in pair())
    layer = ours.features.denseblock2.denselayer3
    seen: list[Any] = []
    layer.conv2.register_forward_hook(lambda *_: seen.append(1))
    with counted_calls() as calls:
        y = ours(images())
    assert seen
    assert calls["dense_block_apply"] == CONSUMERS - 3 - 1  # without that block, and its transition
    torch.manual_seed(3)
    layer.conv2._forward_hooks.clear()
    layer.norm1 = nn.Identity()
    theirs.features.denseblock2.denselayer3.norm1 = nn.Identity()
    theirs.features.denseblock2.denselayer3.relu1 = nn.Identity()
    x = images()
    torch.testing.assert_close(ours(x), theirs(x))
    assert y.shape == (2, 5)


def test_explain_names_the_op() -> None:
    """One row per block, and why one of them is not computed as the op."""
    model: Any = DenseNet(*SMALL, num_classes=5)
    x = images(dtype=torch.float32)
    told = {p.name: p for p in resops.explain(model, x).paths}
    assert list(told) == [
        "features.norm0",
        *(f"features.denseblock{i}" for i in (1, 2, 3, 4)),
        "features.norm5",
    ]
    patterns = [told[f"features.denseblock{i}"].pattern for i in (1, 2, 3, 4)]
    assert patterns == [*["dense_block+transition"] * 3, "dense_block"]
    assert {p.path for p in told.values()} == {"native"}
    with resops.backend("reference"):
        told = {p.name: p for p in resops.explain(model, x).paths}
    block = told["features.denseblock1"]
    assert (block.path, block.why) == ("layer by layer, reference", "the backend is the reference")
    model.features.denseblock2.denselayer1.norm1.eps = 1e-3
    model.features.denseblock3.denselayer1.norm1.register_forward_hook(lambda *args: None)
    told = {p.name: p for p in resops.explain(model, x).paths}
    assert told["features.denseblock2"].path == "layer by layer, native"
    assert "eps differs" in told["features.denseblock2"].why
    assert told["features.denseblock3.denselayer1.norm1"].path == "native"
    assert "features.denseblock3" not in told


def test_dropout() -> None:
    ours, _ = pair(drop_rate=0.5)
    x = images(dtype=torch.float32)
    torch.manual_seed(0)
    first = ours.train()(x)
    assert not torch.equal(first, ours(x))
    torch.manual_seed(0)
    assert torch.equal(first, ours(x))
    assert torch.equal(ours.eval()(x), ours(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_features_only(training: bool) -> None:
    ours, _ = pair()
    pyramid, part = (
        DenseNet(*SMALL, features_only=True),
        DenseNet(*SMALL, features_only=True, out_indices=(2, 0)),
    )
    for model in (pyramid, part):
        missing, _ = model.load_state_dict(ours.state_dict(), strict=False)
        assert not missing
    for model in (ours, pyramid, part):
        model.double().train(training)
    x = images()
    found = pyramid(x)
    sizes = [(i.channels, 64 // i.reduction) for i in pyramid.feature_info]
    assert [(t.size(1), t.size(2)) for t in found] == sizes
    assert [i.reduction for i in pyramid.feature_info] == [2, 4, 8, 16, 32]
    torch.testing.assert_close(found[-1], ours.forward_features(x))
    for mine, t in zip(part(x), (found[2], found[0]), strict=True):
        torch.testing.assert_close(mine, t)


@pytest.mark.parametrize(
    ("name", "parameters"), [("densenet_bc_40", 0.18), ("densenet_bc_100", 0.77)]
)
def test_networks_for_small_images(name: str, parameters: float) -> None:
    """As many parameters as the paper's Table 2 has (0.8M for L = 100), in millions."""
    model = create_model(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, 2) == parameters
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    y = model(x)
    assert y.shape == (2, 10)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_saved_activations() -> None:
    """At most 0.3 of what PyTorch keeps, for the layers of DenseNet-121 at their channels."""
    kept = []
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    models = create_model("densenet121"), torchvision().models.densenet121()
    for model in models:
        channels_last(model, x.device)
        there = [x, *model.parameters(), *model.buffers()]
        kept.append(saved_bytes(lambda model=model: model(x), iter(there)))
    assert kept[0] <= 0.3 * kept[1]


def test_compiled() -> None:
    """Blocks, their transitions and the last norm in one graph; the op's own test has more."""
    ours = DenseNet(4, (1, 1), 8, num_classes=5)
    x = images(32, torch.float32)
    eager = copy.deepcopy(ours)
    torch._dynamo.reset()
    y = torch.compile(ours, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, eager(x))
    for (name, mine), other in zip(ours.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, other, msg=name)


def test_names() -> None:
    assert set(NAMES) <= set(list_models("densenet*"))
    assert list_models("densenet_bc*") == ["densenet_bc_40", "densenet_bc_100"]


def test_synchronised_norms_and_many_blocks() -> None:
    model = DenseNet(4, (1,) * 9, 8, small_images=True, num_classes=3)
    x = torch.randn(2, 3, 256, 256)
    assert model.eval()(x).shape == (2, 3)
    # Outside a process group a synchronised norm is a plain one.
    small = DenseNet(4, (1, 1), 8, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = small(x)
    torch.testing.assert_close(resops.convert_sync_batchnorm(small)(x), expected)
