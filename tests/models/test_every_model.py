"""Every name of list_models, as it is: both layouts, float32 and autocast to bfloat16, evaluation
and training, a batch of one and of three, and images with an odd number of rows and columns.

The families' own tests have the same of narrow networks; here the widths and depths are the real
ones, and the images about as small as the networks take them.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import resops
from resops.models import create_model, list_models
from tests.models.twins import (
    assert_evaluates_as_twin,
    assert_trains_in_bfloat16,
    outputs,
    parameter_count,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("native", "one_thread")]

# (channels, *spatial) of the image; the others take 3x33x35
SIZES = {
    "highway": (1, 28, 28),  # fully connected: no other size
    "highway_conv": (1, 9, 11),
    "alexnet": (3, 67, 71),
    "unet_valid": (1, 188, 190),
    "unet3d": (3, 9, 11, 8),
    "vnet": (1, 17, 16, 18),
    "hourglass": (3, 65, 67),
}
CIFAR = re.compile(r"(resnet|plain)(20|32|44|56|110|1202)|preact_.*|wrn_.*|densenet_bc_.*")
MOST_FOR_TRAINING = 90_000_000  # parameters: gradients of more take too much memory
DEEPEST = ("resnet1202", "preact_resnet1001")


def image_of(name: str, batch: int) -> Tensor:
    size = (3, 9, 11) if CIFAR.fullmatch(name) else (3, 33, 35)
    return torch.randn(batch, *SIZES.get(name, size))


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Networks refer to themselves: without this they would pile up."""
    yield
    gc.collect()


@pytest.mark.parametrize("name", list_models())
def test_evaluation(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name)
    # The errors of Winograd's algorithm are larger than those of the twin's convolutions.
    with resops.set_conv_precision("highest"):
        for batch, channels_last in ((1, True), (3, False)):
            x = image_of(name, batch)
            assert_evaluates_as_twin(model, x, channels_last, statistics=name in DEEPEST)


@pytest.mark.parametrize("name", list_models())
def test_training(name: str) -> None:
    """Every parameter gets a finite gradient; also with float32, contiguous and two images."""
    with torch.device("meta"):
        if parameter_count(create_model(name)) > MOST_FOR_TRAINING:
            pytest.skip("gradients of so many parameters take gigabytes")
    torch.manual_seed(0)
    model = create_model(name)
    x = image_of(name, 3)
    assert_trains_in_bfloat16(model, x)
    loss = torch.stack([y.square().mean() for y in outputs(model(x[:2]))]).sum()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
