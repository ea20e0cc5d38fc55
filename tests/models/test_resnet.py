"""The ResNets against torchvision's: same state, same numbers, in evaluation and in training.

Whole networks are compared in float64, where one wrong element shows, or by their distance from
the float64 network in units of torchvision's own. Images are small: every layer still has its
number of channels.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import resops
from resops.models import ResNet, create_model, list_models
from resops.models.resnet import BasicBlock
from tests.dispatch import counted_calls
from tests.models.twins import distance, wild
from tests.torchvision_ops import published_parameters, torchvision

# One thread: on images this small a second one mostly waits.
pytestmark = [pytest.mark.models, pytest.mark.usefixtures("one_thread")]

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
CL = torch.channels_last


def pair(name: str, **kwargs: Any) -> tuple[Any, Any]:
    """Ours and torchvision's, with the same weights and with statistics as after some training."""
    ours = wild(create_model(name, **kwargs))
    theirs = getattr(torchvision().models, name)(**kwargs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@functools.lru_cache(maxsize=2)
def evaluated(name: str) -> tuple[Any, Any, Tensor, Tensor]:
    """A pair in evaluation, an image, and the logits in float64."""
    ours, theirs = pair(name, num_classes=10)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double().eval()(x.double())
    return ours.eval(), theirs.eval(), x, exact


@pytest.mark.parametrize("name", NAMES)
def test_state_initial_weights_and_logits_are_torchvisions(name: str) -> None:
    torch.manual_seed(5)
    ours = create_model(name)
    torch.manual_seed(5)
    theirs = getattr(torchvision().models, name)()
    own, stated = ours.state_dict(), theirs.state_dict()
    assert list(own) == list(stated)
    for key, value in stated.items():
        assert own[key].dtype == value.dtype and torch.equal(own[key], value), key
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.load_state_dict(stated, strict=True)
    theirs.load_state_dict(own, strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        y, expected = ours.eval()(x), theirs.eval()(x)
    # Rounding errors of 1e-7 a layer; a block that is left out moves the logits by some 10 %.
    assert distance(y, expected) <= 1e-5


@pytest.mark.parametrize("memory_format", [CL, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_logits(name: str, memory_format: torch.memory_format) -> None:
    """float32 in evaluation, folded; the float64 network says which of the two is nearer."""
    ours, theirs, x, exact = evaluated(name)
    # nn.Module.to moves in place.
    ours, theirs = (copy.deepcopy(m).to(memory_format=memory_format) for m in (ours, theirs))
    x = x.contiguous(memory_format=memory_format)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y, expected = ours(x), theirs(x)
        # Two honest orders of summation: both are within some 1e-7 of the truth.
        assert distance(y, exact) <= 3 * distance(expected, exact) + 2e-7
    y = ours(x)
    assert y.requires_grad  # not folded
    assert distance(y, exact) <= 3 * distance(expected, exact) + 2e-7


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
@torch.no_grad()
def test_logits_in_bfloat16(name: str, how: str) -> None:
    """Each of some 50 layers rounds its output to 8 bits: errors of 1 % either way. The factor is
    that of rule R for 16-bit data; the fold rounds weights where stock rounds an activation more.
    """
    ours, theirs, x, exact = evaluated(name)
    ours, theirs = (copy.deepcopy(m).to(memory_format=CL) for m in (ours, theirs))
    x = x.contiguous(memory_format=CL)
    if how == "weights":
        ours, theirs, x = ours.bfloat16(), theirs.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y, expected = ours(x), theirs(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert distance(y, exact) <= 3 * distance(expected, exact)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_convolutions_only(name: str, mode: Any) -> None:
    ours, _, x, _ = evaluated(name)
    ours = copy.deepcopy(ours).to(memory_format=CL)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in ours.modules())
    with mode():
        ours(x)
        with counted_calls() as calls:
            ours(x)
    winograd = calls["conv_bn_act_folded"]  # where an image has many tiles, or a layer few channels
    assert winograd > 0
    assert calls["mkldnn::_convolution_pointwise"] + winograd == convolutions
    for name in calls:
        assert "batch_norm" not in name and "relu" not in name and "add" not in name.split("::")[1:]
    assert (
        calls["aten::linalg_vector_norm"] <= convolutions // 5
    )  # what it costs to know that no NaN can arise


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training_is_convolutions_and_fused_norms(name: str, native: None) -> None:
    ours, _, x, _ = evaluated(name)
    ours = copy.deepcopy(ours).train()
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
    with counted_calls() as calls:
        y = ours(x)
        forward = dict(calls)
        y.sum().backward()
    assert forward["batch_norm_forward"] == calls["batch_norm_backward"] == norms
    assert not any("relu" in name or "threshold" in name for name in calls)
    assert "aten::add" not in forward


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training_equals_torchvisions(name: str) -> None:
    """Steps in float64: loss, gradients, weights and running statistics.

    The sign of a value that is 0 but for rounding decides about a gradient of relu; in float64
    there is no such value among some 1e5. The last stage has 8 values a channel: statistics of two
    or three would magnify every rounding error.
    """
    models = pair(name, num_classes=10)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    target = torch.tensor([3, 7])
    losses: list[list[Tensor]] = [[], []]
    for model, own_losses in zip(models, losses, strict=True):
        model.double().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own_losses.append(loss.detach())
    ours, theirs = models
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters())
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # A gradient that is 0 on paper has no relative error.
        assert float((p.grad - q.grad).abs().max()) <= 1e-6 * largest, key
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_parameter_gets_a_gradient(name: str, dtype: torch.dtype) -> None:
    model: Any = create_model(name, num_classes=10)
    x = torch.randn(2, 3, 48, 48).contiguous(memory_format=CL)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        F.cross_entropy(model.to(memory_format=CL)(x), torch.tensor([1, 2])).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32, key
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, key


@pytest.mark.parametrize("size", [(1, 3, 33, 47), (1, 3, 1, 1), (3, 3, 65, 32), (0, 3, 32, 32)])
@torch.no_grad()
def test_odd_sizes_in_evaluation(size: tuple[int, ...]) -> None:
    ours, theirs, _, _ = evaluated("resnet18")
    for memory_format in (CL, torch.contiguous_format):
        x = torch.randn(size).contiguous(memory_format=memory_format)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(x[..., ::2]), theirs(x[..., ::2]), rtol=1e-4, atol=1e-5)


def test_odd_sizes_in_training() -> None:
    for size in ((2, 3, 33, 47), (1, 3, 65, 63)):
        ours, theirs = pair("resnet18", num_classes=10)
        x = torch.randn(size, dtype=torch.float64)
        y, expected = ours.double()(x), theirs.double()(x)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ours(torch.randn(1, 3, 32, 32, dtype=torch.float64))


@torch.no_grad()
def test_nan_in_the_image_reaches_the_logits() -> None:
    ours, _, x, _ = evaluated("resnet18")
    ours = copy.deepcopy(ours).to(memory_format=CL)
    x = x.clone()
    ours(x)
    x[1, 2, 30, 30] = math.nan
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = ours(x)
        assert y[0].isfinite().all() and y[1].isnan().all()


def test_training_and_evaluation_in_turn() -> None:
    """Statistics and weights move; what was folded before is not used after."""
    ours, theirs = pair("resnet18", num_classes=10)
    twins = [(m, torch.optim.SGD(m.parameters(), lr=0.1)) for m in (ours.double(), theirs.double())]
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for _ in range(2):
        for model, optimizer in twins:
            model.train()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_copies_and_functional_call() -> None:
    ours, theirs, x, _ = evaluated("resnet18")
    y = ours(x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), y)
    state = {k: v * 1.01 for k, v in ours.state_dict().items() if v.is_floating_point()}
    changed = torch.func.functional_call(ours, state, (x,))
    expected = torch.func.functional_call(theirs, state, (x,))
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours(x), y)


@torch.no_grad()
def test_the_reference_backend_is_torchvisions_network() -> None:
    ours, theirs, x, _ = evaluated("resnet50")
    with resops.backend("reference"):
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_without_graph_breaks(backend: str, training: bool) -> None:
    """One block in each stage: one with an identity shortcut, three with a projection."""
    models = torchvision().models
    ours = wild(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10))
    theirs = models.ResNet(models.resnet.BasicBlock, [1] * 4, num_classes=10)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.double().train(training), theirs.double().train(training)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-7, atol=1e-7)
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7, msg=key)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"zero_init_residual": True}),
        ("resnet50", {"zero_init_residual": True}),
        ("resnet50", {"groups": 32, "width_per_group": 4}),
    ],
)
def test_options_of_torchvision(name: str, kwargs: dict[str, Any]) -> None:
    torch.manual_seed(5)
    ours = create_model(name, num_classes=3, **kwargs)
    torch.manual_seed(5)
    theirs = getattr(torchvision().models, name)(num_classes=3, **kwargs)
    for (key, a), (other, b) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert key == other and torch.equal(a, b)
    x = torch.randn(1, 3, 32, 32)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_image_channels_and_classes() -> None:
    model: Any = create_model("resnet18", in_chans=1, num_classes=7)
    assert model(torch.randn(2, 1, 33, 33)).shape == (2, 7)
    assert model.conv1.weight.shape == (64, 1, 7, 7)
    assert model.forward_features(torch.randn(2, 1, 64, 64)).shape == (2, 512, 2, 2)
    with pytest.raises(ValueError, match="BasicBlock only supports groups=1"):
        create_model("resnet18", groups=2)


WIDE = ["resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"]
# Multiplications with an addition of an image of 224x224, in 1e9: He et al., 2015, Table 1.
FLOPS = {"resnet18": 1.8, "resnet34": 3.6, "resnet50": 3.8, "resnet101": 7.6, "resnet152": 11.3}


@pytest.mark.parametrize("name", [*FLOPS, *WIDE])
def test_parameters_are_as_many_as_published(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
        theirs = getattr(torchvision().models, name)()
    assert sum(p.numel() for p in model.parameters()) == published_parameters(name)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", FLOPS)
def test_operations_are_as_many_as_published(name: str) -> None:
    """With the stride of the paper. It gives two digits, and seems to cut some off; its shortcuts
    without parameters in ResNet-34 are 0.5 % less."""
    with torch.device("meta"):
        model = create_model(name, stride_in_1x1=True).eval()
        x = torch.empty(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(FLOPS[name], rel=0.02)


def test_resnext_is_torchvisions() -> None:
    """Initial weights and logits in evaluation; the others are the same code in other sizes."""
    torch.manual_seed(5)
    ours: Any = create_model("resnext50_32x4d", num_classes=3).eval()
    torch.manual_seed(5)
    theirs = torchvision().models.resnext50_32x4d(num_classes=3).eval()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        x = torch.randn(1, 3, 33, 33)
        assert distance(ours(x), theirs(x)) <= 1e-5


def test_stride_of_the_paper() -> None:
    """In the first 1x1 of a bottleneck: the same state, and another network."""
    strides = {}
    for first in (True, False):
        with torch.device("meta"):
            model: Any = create_model("resnet50", stride_in_1x1=first)
        strides[first] = [model.layer2[0].conv1.stride[0], model.layer2[0].conv2.stride[0]]
        assert [model.layer1[0].conv1.stride[0], model.layer2[1].conv1.stride[0]] == [1, 1]
    assert strides == {True: [2, 1], False: [1, 2]}


def test_list_models() -> None:
    assert {*NAMES, *WIDE} <= set(list_models())
    assert list_models("resnet1?") == ["resnet18"]
    assert list_models("none of them*") == []


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"no model is called 'resnet5'; did you mean .*resnet50"):
        create_model("resnet5")
    with pytest.raises(ValueError, match=r"no model is called 'zzz'; resops\.models\.list_models"):
        create_model("zzz")
