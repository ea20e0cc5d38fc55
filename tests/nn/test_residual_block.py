"""residual_block: the modules of a block as one op, and when they are called one by one."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from resops.models.resnet import BasicBlock, Bottleneck
from resops.nn import BatchNormAct2d, Conv2dNormActivation
from tests.dispatch import counted_calls

pytestmark = pytest.mark.usefixtures("native", "one_thread")

F64 = torch.float64
both = pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])


def make(kind: type[Any], projection: bool = True) -> Any:
    """A block as one op, in float64."""
    channels = 4
    wide = channels * kind.expansion
    downsample = None
    if projection:
        downsample = Conv2dNormActivation(8, wide, 1, 2, activation_layer=None)
    block = kind(8 if projection else wide, channels, 2 if projection else 1, downsample).to(F64)
    block.block_op = True
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, BatchNormAct2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return block


def image(block: Any) -> Tensor:
    return torch.randn(3, block.conv1.in_channels, 9, 7, dtype=F64, requires_grad=True)


def is_one_op(y: Tensor) -> bool:
    name = type(y.grad_fn).__name__
    return name in ("BasicBlockFunctionBackward", "BottleneckFunctionBackward")


def outcome(block: Any, x: Tensor) -> dict[str, Any]:
    """y, gradients and buffers after one training step."""
    block.zero_grad()
    y = block(x)
    found = {"y": y, "x": torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0]}
    y.square().sum().backward()
    found |= {name: p.grad for name, p in block.named_parameters()}
    return found | {name: b.clone() for name, b in block.named_buffers()}


@both
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_equal_to_the_layers(
    kind: type[Any], projection: bool, recompute: bool, momentum: float | None
) -> None:
    block = make(kind, projection)
    for module in block.modules():
        if isinstance(module, BatchNormAct2d):
            module.momentum = momentum
    block.recompute = recompute
    layers = copy.deepcopy(block)
    layers.block_op = False
    x = image(block)
    for _ in range(2):  # the second with another weight of the batch where momentum is None
        mine, its = outcome(block, x), outcome(layers, x)
        assert is_one_op(mine["y"]) and not is_one_op(its["y"])
        assert mine.keys() == its.keys()
        for name, t in mine.items():
            torch.testing.assert_close(t, its[name], rtol=1e-9, atol=1e-9, msg=name)


def with_hook(block: Any) -> None:
    block.bn1.register_forward_hook(lambda module, args, y: y * 2)


def with_activation_hook(block: Any) -> None:
    block.bn1.act.register_forward_hook(lambda module, args, y: y * y)


def with_shortcut_hook(block: Any) -> None:
    block.downsample.register_forward_hook(lambda module, args, y: y * 3)


def with_parametrization(block: Any) -> None:
    parametrizations.weight_norm(block.conv2)


def with_another_norm(block: Any) -> None:
    norm = nn.BatchNorm2d(block.bn1.num_features).to(F64)

    class Unfused(nn.Module):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            return torch.tanh(norm(x))

    block.bn1 = Unfused()


def with_another_activation(block: Any) -> None:
    block.bn1.act = nn.Tanh()


def with_two_activations(block: Any) -> None:
    block.bn1.act = nn.SiLU()


def with_an_active_shortcut(block: Any) -> None:
    block.downsample[1].act = nn.ReLU()


def with_dropout(block: Any) -> None:
    block.bn1.drop = nn.Dropout(1.0)


def with_patched_forward(block: Any) -> None:
    forward = block.conv2.forward
    block.conv2.forward = lambda x: forward(x) * 2


def with_reflections(block: Any) -> None:
    block.conv2.padding_mode = "circular"


def with_longer_shortcut(block: Any) -> None:
    block.downsample = nn.Sequential(*block.downsample, nn.Hardtanh())


CHANGES = [v for k, v in list(globals().items()) if k.startswith("with_")]


@both
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_modules_run_one_by_one(kind: type[Any], change: Any) -> None:
    """And what was changed has its effect."""
    block = make(kind)
    x = image(block)
    assert is_one_op(block(x))
    before = block(x)
    change(block)
    y = block(x)
    assert not is_one_op(y)
    if change is not with_parametrization:  # which leaves the weight as it was
        assert not torch.allclose(y, before)
    block.block_op = False
    torch.testing.assert_close(y, block(x))


def test_hooks_that_are_removed() -> None:
    block = make(BasicBlock)
    x, seen = image(block), []
    handle = block.conv2.register_forward_hook(lambda module, args, y: seen.append(y))
    block(x).sum().backward()
    assert len(seen) == 1
    handle.remove()
    assert is_one_op(block(x)) and len(seen) == 1


def test_hooks_on_the_block_itself() -> None:
    block = make(Bottleneck)
    seen: list[Any] = []
    block.register_forward_hook(lambda module, args, y: seen.append(y))
    y = block(image(block))
    assert is_one_op(y) and seen[0] is y


@both
def test_activations_of_all_kinds(kind: type[Any]) -> None:
    for act in (nn.SiLU, nn.GELU, functools.partial(nn.LeakyReLU, 0.2)):
        block = make(kind)
        for name in ("bn1", "bn2", "bn3"):
            if hasattr(block, name):
                getattr(block, name).act = act()
        x = image(block)
        y = block(x)
        assert is_one_op(y)
        block.block_op = False
        torch.testing.assert_close(y, block(x))


def test_evaluation_uses_the_folded_convolutions_that_are_kept() -> None:
    block = make(BasicBlock).float().eval()
    x = image(block).detach().float()
    with torch.no_grad():
        block(x)
        with counted_calls() as calls:
            y = block(x)
    assert calls["mkldnn::_convolution_pointwise"] == 3 and block.bn1._folded is not None
    assert not any("batch_norm" in name for name in calls)
    assert is_one_op(block(x))  # gradients of the parameters
    torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-5)


def test_frozen_norms_in_training() -> None:
    block = make(BasicBlock)
    block.bn1.eval()
    before = block.bn1.running_mean.clone(), block.bn2.running_mean.clone()
    x = image(block)
    y = block(x)
    assert is_one_op(y)
    assert torch.equal(block.bn1.running_mean, before[0]) and block.bn1.num_batches_tracked == 0
    assert not torch.equal(block.bn2.running_mean, before[1])
    assert block.bn2.num_batches_tracked == 1
