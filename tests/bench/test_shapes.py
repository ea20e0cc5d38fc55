from __future__ import annotations

import pytest
import torch

import resops
from bench.models.stock_resnet import CONFIGURATIONS, create_stock_model
from bench.shapes import (
    BANDWIDTH_SHAPES,
    DENSENET121,
    RESNET50,
    VARIANTS,
    BatchNormShape,
    trace_batch_norms,
)
from tests.torchvision_ops import torchvision


def test_resnet50_has_the_shapes_that_its_stock_model_shows() -> None:
    with torch.device("meta"):
        model = create_stock_model("resnet50")
    assert dict(trace_batch_norms(model)) == RESNET50
    assert sum(RESNET50.values()) == 53
    assert set(BANDWIDTH_SHAPES) <= set(RESNET50) <= set(VARIANTS)
    assert len(VARIANTS) == 12 * 2 + 4  # twelve sizes, four of which also come without a ReLU


def test_densenet121_has_the_shapes_that_torchvisions_shows() -> None:
    """Its last ReLU is a function that works in place, which the trace takes for a sum."""
    with torch.device("meta"):
        model = torchvision().models.densenet121()
    found = trace_batch_norms(model)
    last = found.pop(BatchNormShape(1024, 7, 7, True, False))
    found[BatchNormShape(1024, 7, 7, False, True)] += last
    assert found == DENSENET121
    assert sum(DENSENET121.values()) == 121


def test_the_trace_tells_plain_norms_from_those_with_a_sum() -> None:
    with torch.device("meta"):
        found = trace_batch_norms(create_stock_model("resnet18"))
    assert sum(found.values()) == 20
    assert found[BatchNormShape(64, 56, 56, True, True)] == 2
    assert found[BatchNormShape(64, 56, 56, False, True)] == 2
    assert found[BatchNormShape(512, 7, 7, False, False)] == 1


def test_labels() -> None:
    labels = [shape.label for shape in RESNET50]
    assert len(set(labels)) == len(labels)
    assert labels[:4] == [
        "64x112x112 bn+relu",
        "64x56x56 bn+relu",
        "256x56x56 bn+add+relu",
        "256x56x56 bn",
    ]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_stock_and_resops_states_load_into_each_other(name: str) -> None:
    with torch.device("meta"):
        stock = create_stock_model(name, num_classes=10)
        ours = resops.models.create_model(name, num_classes=10)
    assert list(stock.state_dict()) == list(ours.state_dict())
    stock.load_state_dict(ours.state_dict(), strict=True, assign=True)
    ours.load_state_dict(stock.state_dict(), strict=True, assign=True)


def test_an_unknown_stock_model_is_named() -> None:
    with pytest.raises(ValueError, match="resnet1'"):
        create_stock_model("resnet1")


def test_parameter_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in create_stock_model(name).parameters())
            for name in ("resnet18", "resnet50", "resnet152")
        }
    assert counts == {"resnet18": 11_689_512, "resnet50": 25_557_032, "resnet152": 60_192_808}
