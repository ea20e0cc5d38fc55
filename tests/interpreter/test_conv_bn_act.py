"""The Triton kernels of conv_bn_act, run by Triton's interpreter in a process of its own."""

from __future__ import annotations

import pytest
import torch

from tests.interpreter.kernels import import_kernels
from tests.subprocess_calls import Outcome

MODULE = "tests.interpreter.conv_bn_act_calls"
ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "gelu")
# kernel, stride, padding, dilation
GEOMETRIES = {
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1_stride_2": ((1, 1), (2, 2), (0, 0), (1, 1)),
    "1x1_padded": ((1, 1), (1, 1), (1, 0), (1, 1)),
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3_stride_2": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3_dilated": ((3, 3), (1, 1), (2, 2), (2, 2)),
    "3x2_uneven": ((3, 2), (2, 3), (2, 0), (2, 1)),
    "2x2_stride_3": ((2, 2), (3, 3), (0, 0), (1, 1)),
    "3x3_stride_2_dilated_2": ((3, 3), (2, 2), (2, 2), (2, 2)),
    "5x5": ((5, 5), (1, 1), (2, 2), (1, 1)),
    "7x7_stride_2": ((7, 7), (2, 2), (3, 3), (1, 1)),
}
NAMES = [
    *(f"geometry-{name}" for name in GEOMETRIES),
    *(f"prologue_and_epilogue-{activation}" for activation in ACTIVATIONS),
    "slices",
    "parts_of_wider_tensors",
    "every_layout",
    "offsets_beyond_2_31",
    "one_pixel_in_either_layout",
    "large_means",
    "many_tiles",
    "nan_and_infinity",
    "zero_and_nan_at_relu",
    "same_bits_every_time",
    "any_number_of_parts",
    "any_tile",
    "every_entry_of_the_table",
    "strides_without_zeros_between",
    "tuner",
    "tuner_in_16_bits",
    "empty",
    "refused",
]


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[name] == Outcome(None, "")


def test_cpu_tensor_without_the_interpreter() -> None:
    """One clear sentence, from the launcher itself."""
    pytest.importorskip("triton", reason="Triton is not installed")
    kernels = import_kernels("conv_bn_act")
    x, weight, ones = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1), [1, 1]
    with pytest.raises(
        NotImplementedError,
        match="conv_bn_act of triton has no kernel for cpu tensors, unless TRITON_INTERPRET=1 is "
        "set when Python starts",
    ):
        kernels.conv_bn_act_backward_weight(
            x, [x], None, None, "identity", 0.0, list(weight.shape), ones, [0, 0], ones
        )
