"""The counter of bytes: views and memory that is not touched cost nothing, slices what they are."""

from __future__ import annotations

import torch

from bench.traffic import count
from resops.functional import dense_block
from tests.ops.dense_block_cases import block


def test_operators() -> None:
    x, y = torch.ones(10, 4), torch.ones(1, 4)

    def call() -> None:
        torch.empty(1000)
        (x.t() + y.expand(10, 4).t()).relu_()

    assert count(call) == {"aten::add": 4 * (40 + 4 + 40), "aten::relu_": 2 * 160}


def test_consumers_of_a_buffer(native: None) -> None:
    args = block(torch.float32, layers=2, transition=False, channels=6, growth=4, size=(2, 3, 5))
    pixel = 2 * 3 * 5 * 4

    def call() -> None:
        dense_block(*args).backward(torch.ones(2, 14, 3, 5))

    counted = count(call)
    # Mean and variance, and the running ones of both consumers, there and back.
    update = "resops::dense_block_update_running"
    assert counted.pop(update) == 4 * (2 * 10 + 2 * 2 * (6 + 10))
    bytes_of = {name: n / pixel for name, n in counted.items() if "dense_block" in name}
    assert bytes_of == {
        "resops::dense_block_apply": 2 * 2 * (6 + 10),  # both consumers, there and back
        "resops::dense_block_accumulate": (2 + 1) * 10 + (2 + 2) * 6,
        # The last 4 channels have no consumer: the buffer, dy and the gradient; the others a sum.
        "resops::dense_block_gradient": 3 * 4 + 4 * 4 + 4 * 6,
    }


def test_consumers_with_their_convolutions(native: None) -> None:
    """Layers of 16 outputs, each one kernel there and one back."""
    args = block(torch.float32, layers=2, transition=False, channels=6, growth=8, size=(2, 3, 5))
    pixels = 2 * 3 * 5

    def call() -> None:
        dense_block(*args).backward(torch.ones(2, 22, 3, 5))

    counted = count(call)
    weights = 16 * (6 + 14)
    forward = pixels * (6 + 14 + 2 * 16) + weights
    assert counted["resops::dense_block_narrow_forward"] == 4 * forward
    # The buffer and the narrow gradient once, the sum written and then read and written.
    backward = pixels * ((1 + 1) * 14 + (1 + 2) * 6 + 2 * 16) + 2 * weights
    vectors = 2 * (6 + 14)
    assert counted["resops::dense_block_narrow_backward"] == 4 * (backward + vectors)
    assert "resops::dense_block_apply" not in counted
