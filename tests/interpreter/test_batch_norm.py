"""The Triton kernels of batch_norm, run by Triton's interpreter in a process of its own."""

from __future__ import annotations

import pytest

from tests.subprocess_calls import Outcome

MODULE = "tests.interpreter.batch_norm_calls"
ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "gelu")
NAMES = [
    *(f"rule_R-{a}-{layout}" for a in ACTIVATIONS for layout in ("contiguous", "channels_last")),
    "phases",
    "every_layout",
    "offsets_beyond_2_31",
    "parameters",
    "exact_data",
    "constant_channels",
    "any_number_of_programs",
    "large_means",
    "gelu_far_below_zero",
    "nan_and_infinity",
    "zero_and_nan_at_relu",
    "mask_of_the_definition",
    "same_bits_every_time",
    "empty_and_one",
    "only_what_is_asked_for",
    "ragged_batches",
    "large_batch",
    "offsets_beyond_int32",
    "large_fp16_values_and_counts",
    "small_variances",
    "momenta",
    "weights_and_signs",
    "evaluation_in_both_layouts",
    "singletons",
    "refused",
]


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[name] == Outcome(None, "")
