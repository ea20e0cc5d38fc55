"""Highway networks: the formula, published sizes, and the reference backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resops
from resops.models import HighwayConvNetwork, HighwayNetwork, create_model
from resops.models.highway import Highway
from tests.dispatch import counted_calls
from tests.models.twins import distance, parameter_count

pytestmark = [pytest.mark.models, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize(("width", "thousands"), [(16, 39), (32, 151)])
def test_parameters_are_as_many_as_published(width: int, thousands: int) -> None:
    """Srivastava et al., 2015, Table 1: convolutional networks of 10 layers for MNIST."""
    with torch.device("meta"):
        model = create_model("highway_conv", width=width)
    assert round(parameter_count(model) / 1e3) == thousands


@pytest.mark.parametrize("kind", ["connected", "convolutional"])
def test_a_layer_is_the_formula(kind: str) -> None:
    if kind == "connected":
        transform: Any = nn.Linear(5, 5)
        gate: Any = nn.Linear(5, 5)
        x = torch.randn(4, 5)
    else:
        transform, gate = (nn.Conv2d(5, 5, 3, padding=1) for _ in range(2))
        x = torch.randn(2, 5, 4, 3)
    layer = Highway(transform, gate, "relu", -2.0)
    t = torch.sigmoid(gate(x))
    torch.testing.assert_close(layer(x), t * F.relu(transform(x)) + (1 - t) * x)
    assert (gate.bias == -2).all()


def test_closed_gates_carry() -> None:
    model: Any = HighwayNetwork(gate_bias=-200.0)
    x = torch.randn(3, 50)
    assert torch.equal(model.layers(x), x)


@pytest.mark.parametrize("name", ["highway", "highway_conv"])
def test_equals_its_twin(name: str) -> None:
    """Logits and gradients in float64, and logits in float32 and by autocast."""
    model: Any = create_model(name, width=8, depth=6, act_layer="silu").double()
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    found = []
    for backend in ("auto", "reference"):
        model.zero_grad()
        with resops.backend(backend), counted_calls() as calls:
            y = model(x)
            y.square().sum().backward()
        assert calls["residual_add_forward"] == (4 if backend == "auto" else 0)
        found.append([y.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert a.any()
    exact, model = found[0][0], model.float()
    assert distance(model(x.float()), exact) <= 1e-6  # six layers of rounding errors of 1e-7
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(model(x.float()), exact) <= 0.05  # and of 4e-3


def test_images_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="expected images of 1x28x28, but got 3x28x28"):
        create_model("highway")(torch.randn(2, 3, 28, 28))
    with pytest.raises(ValueError, match="the image is too small for the network: 7x30"):
        create_model("highway_conv")(torch.randn(2, 1, 7, 30))
    with pytest.raises(ValueError, match="depth must be at least 3, but got 2"):
        HighwayConvNetwork(depth=2)
    model: Any = create_model("highway_conv", in_chans=2, num_classes=3)
    assert model(torch.randn(2, 2, 9, 31)).shape == (2, 3)
