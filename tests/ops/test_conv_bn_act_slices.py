"""The convolution of tensors side by side along the channels, which nobody concatenates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from bench.session import saved_bytes
from resops.models import UNet
from resops.nn import BatchNormAct2d
from resops.nn.conv_bn_act import conv_norm_act
from resops.ops.conv_bn_act_slices import convolution_of_slices
from tests.dispatch import counted_calls

pytestmark = pytest.mark.usefixtures("native", "one_thread")

CL = torch.channels_last
GEOMETRY = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}


@pytest.fixture
def winograd() -> Iterator[None]:
    """Winograd's algorithm for every call that it can compute, also the smallest."""
    from resops import _C

    before = _C.conv_algorithm()
    _C.set_conv_algorithm("winograd")
    try:
        yield
    finally:
        _C.set_conv_algorithm(before)


def operands(channels: tuple[int, ...] = (16, 8, 3)) -> tuple[list[Tensor], Tensor, Tensor]:
    """Slices, of which one is contiguous and one is a part of a wider tensor; weight and bias."""
    slices = [torch.randn(2, c, 7, 9).contiguous(memory_format=CL) for c in channels]
    slices[1] = slices[1].contiguous()
    slices[2] = torch.randn(2, 10, 7, 9).contiguous(memory_format=CL)[:, 2 : 2 + channels[2]]
    weight = torch.randn(16, sum(channels), 3, 3).contiguous(memory_format=CL)
    tensors = [t.detach().requires_grad_() for t in (*slices, weight, torch.randn(16))]
    return tensors[:3], tensors[3], tensors[4]


def near(a: Tensor, b: Tensor) -> bool:
    """Within the documented error of Winograd's algorithm, relative to the largest value."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= 5e-5 * float(b.abs().max())


def test_equals_the_convolution_of_the_concatenation(winograd: None) -> None:
    slices, weight, bias = operands()
    with counted_calls() as calls:
        y = convolution_of_slices(slices, weight, bias, **GEOMETRY)
        grads = torch.autograd.grad(y, [*slices, weight, bias], torch.ones_like(y).cos())
    assert calls["conv_bn_act_forward"] == calls["conv_bn_act_backward_data"] == 1
    assert calls["conv_bn_act_backward_weight"] == 1 and calls["aten::cat"] == 0
    z = F.conv2d(torch.cat(slices, 1), weight, bias, padding=1)
    expected = torch.autograd.grad(z, [*slices, weight, bias], torch.ones_like(z).cos())
    assert near(y, z)
    assert all(near(a, b) for a, b in zip(grads, expected, strict=True))


def test_second_derivatives(winograd: None) -> None:
    slices, weight, bias = operands()

    def penalty(y: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(y.square().sum(), [slices[1], weight], create_graph=True)
        total = sum((g.square().sum() for g in grads), torch.zeros(()))
        return list(torch.autograd.grad(total, [*slices, weight]))

    found = penalty(convolution_of_slices(slices, weight, bias, **GEOMETRY))
    expected = penalty(F.conv2d(torch.cat(slices, 1), weight, bias, padding=1))
    assert all(near(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (2,), (3,), (4,), (1, 3)])
def test_only_the_gradients_that_are_asked_for(wanted: tuple[int, ...], winograd: None) -> None:
    slices, weight, bias = operands()
    tensors = [*slices, weight, bias]
    for i, t in enumerate(tensors):
        t.requires_grad_(i in wanted)
    convolution_of_slices(slices, weight, bias, **GEOMETRY).sum().backward()
    assert [i for i, t in enumerate(tensors) if t.grad is not None] == list(wanted)


def test_others_are_concatenated(winograd: None) -> None:
    """float64, another kernel, another backend, an odd dtype among them: the library's words."""
    slices, weight, bias = operands()
    doubles = [t.double() for t in slices]
    y = convolution_of_slices(doubles, weight.double(), bias.double(), **GEOMETRY)
    exact = F.conv2d(torch.cat(doubles, 1), weight.double(), bias.double(), padding=1)
    torch.testing.assert_close(y, exact)
    one = weight[..., :1, :1].detach().contiguous(memory_format=CL)
    y = convolution_of_slices(slices, one, bias, **{**GEOMETRY, "padding": 0})
    assert near(y, F.conv2d(torch.cat(slices, 1), one, bias))
    with resops.backend("reference"), counted_calls() as calls:
        convolution_of_slices(slices, weight, bias, **GEOMETRY)
    assert calls["aten::cat"] == 1 and calls["conv_bn_act_forward"] == 0
    with pytest.raises(RuntimeError, match=r"Sizes of tensors must match|should have the size"):
        convolution_of_slices([slices[0], slices[1][..., 1:]], weight, bias, **GEOMETRY)
    with pytest.raises(RuntimeError, match="expected input"):
        convolution_of_slices(slices[:2], weight, bias, **GEOMETRY)


def test_a_layer_takes_slices() -> None:
    """In training as slices, in evaluation concatenated and folded."""
    slices, weight, _ = operands()
    conv, norm = nn.Conv2d(27, 16, 3, padding=1, bias=False), BatchNormAct2d(16)
    conv.weight = nn.Parameter(weight.detach())
    for training in (True, False):
        norm.train(training)
        with torch.set_grad_enabled(training):
            y = conv_norm_act(conv, norm, slices)
            z = conv_norm_act(conv, norm, torch.cat(slices, 1))
        assert near(y, z)


def test_a_unet_keeps_no_concatenation(winograd: None) -> None:
    """A training step of the U-Net, whose skip connections are slices: what it keeps is less by
    exactly the concatenated tensors, and the loss is the same."""
    torch.manual_seed(1)
    model = UNet(2, 16, (16, 32)).to(memory_format=CL)  # type: ignore[call-overload]
    x = torch.randn(2, 16, 12, 12).contiguous(memory_format=CL)

    def step() -> Tensor:
        return model(x).square().mean()

    with counted_calls() as calls:
        loss = step()
    assert calls["aten::cat"] == 0
    there = [x, *model.parameters(), *model.buffers()]
    kept = saved_bytes(step, iter(there))
    up = model.up1.conv.double_conv
    up.forward = lambda slices: type(up).forward(up, torch.cat(slices, 1))
    concatenated = saved_bytes(step, iter(there))
    assert torch.allclose(loss, step(), rtol=1e-4)
    # The upsampled half is kept in place of the whole. Of the other one only its place in the
    # graph, one number, is kept beside what its own block keeps anyway.
    assert concatenated - kept == 2 * 16 * 12 * 12 * 4 - 4
