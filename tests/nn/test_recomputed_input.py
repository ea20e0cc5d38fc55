"""Layers of torch behind a double convolution: the same as alone, and its output is not kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.session import saved_bytes
from resops.functional import double_conv
from resops.nn import recomputed_input
from tests.ops.residual_block_cases import layer

pytestmark = pytest.mark.usefixtures("native", "one_thread")

F64 = torch.float64
LAYERS: dict[str, Any] = {
    "max_pool": lambda: nn.MaxPool2d(2),
    "overlapping": lambda: nn.MaxPool2d((3, 2), (2, 1), (1, 0), dilation=1, ceil_mode=True),
    "max_pool_3d": lambda: nn.MaxPool3d(2, 1),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 2, 2),
    "no_bias": lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2, bias=False),
    "transposed_3d": lambda: nn.ConvTranspose3d(6, 2, 2, 2),
    "conv": lambda: nn.Conv2d(6, 3, 3, 2, 1),
    "conv_1x1": lambda: nn.Conv2d(6, 2, 1),
}
# What takes the output as it is.
OTHERS: dict[str, Any] = {
    "indices": lambda: nn.MaxPool2d(2, return_indices=True),
    "circular": lambda: nn.Conv2d(6, 3, 3, padding=1, padding_mode="circular"),
    "same": lambda: nn.Conv2d(6, 3, 3, padding="same"),
    "average": lambda: nn.AvgPool2d(2),
    "upsample": lambda: nn.Upsample(scale_factor=2),
}


def image(dimensions: int = 2) -> tuple[Tensor, list[Any]]:
    x = torch.randn(2, 4, *(8, 7, 5)[:dimensions], dtype=F64)
    layers = [layer(c, 6, 3, F64, dimensions=dimensions) for c in (4, 6)]
    return x.requires_grad_(), layers


def outcome(module: Any, x: Tensor, layers: list[Any], ours: bool) -> list[Tensor]:
    y = double_conv(x, *layers)
    z = recomputed_input.call(module, y) if ours else module(y)
    z = z[0] if isinstance(z, tuple) else z
    parameters = [x, layers[0].conv_weight, layers[1].bias, *module.parameters()]
    grad_z = torch.cos(3 * torch.arange(z.numel(), dtype=F64)).view(z.shape)
    return [z, *torch.autograd.grad(z, parameters, grad_z, create_graph=True)]


@pytest.mark.parametrize("name", [*LAYERS, *OTHERS])
def test_equal_to_the_layer_alone(name: str) -> None:
    """Outputs, gradients, and gradients of those."""
    module = {**LAYERS, **OTHERS}[name]().double()
    x, layers = image(3 if name.endswith("3d") else 2)
    found = []
    for ours in (True, False):
        values = outcome(module, x, layers, ours)
        penalty = torch.stack([t.square().sum() for t in values]).sum()
        found.append([*values, *torch.autograd.grad(penalty, [x, layers[1].conv_weight])])
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_without_a_graph_of_the_backward_pass(name: str) -> None:
    module = LAYERS[name]().double()
    x, layers = image(3 if name.endswith("3d") else 2)
    grads = []
    for ours in (True, False):
        y = double_conv(x, *layers)
        z = recomputed_input.call(module, y) if ours else module(y)
        parameters = [x, layers[1].conv_weight, *module.parameters()]
        grads.append(torch.autograd.grad(z, parameters, torch.ones_like(z)))
        assert ("Function" in type(z.grad_fn).__name__) == ours
    for mine, its in zip(*grads, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_saved(name: str) -> None:
    """Nothing but the number at its place in the graph, beside what the block keeps."""
    module = LAYERS[name]().double()
    x, layers = image(3 if name.endswith("3d") else 2)
    there = [x, *(t for conv in layers for t in conv[:6] if t is not None), *module.parameters()]

    def kept(ours: bool) -> int:
        def forward() -> Tensor:
            y = double_conv(x, *layers)
            return recomputed_input.call(module, y) if ours else y

        return saved_bytes(forward, iter(there))

    assert kept(True) == kept(False) + 8


def test_hooks() -> None:
    """Which a user has put on a layer are called."""
    module, seen = nn.MaxPool2d(2), []
    module.register_forward_hook(lambda module, args, y: seen.append(y))
    x, layers = image()
    z = recomputed_input.call(module, double_conv(x, *layers))
    assert seen[0] is z and "Function" not in type(z.grad_fn).__name__


def test_frozen_weights_and_autocast() -> None:
    module = nn.Conv2d(6, 3, 1).requires_grad_(False)
    x, layers = image()
    x = x.detach().float().requires_grad_()
    layers = [layer(c, 6, 3, torch.float32) for c in (4, 6)]
    with torch.autocast("cpu", torch.bfloat16):
        z = recomputed_input.call(module, double_conv(x, *layers))
    assert z.dtype == torch.bfloat16
    z.float().square().sum().backward()
    assert x.grad is not None
    assert [p.grad for p in module.parameters()] == [None, None]
    module.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z = recomputed_input.call(module, double_conv(x, *layers))
    z.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())
