"""The Triton kernels of dense_block, run by Triton's interpreter in a process of its own."""

from __future__ import annotations

import itertools

import pytest

from tests.subprocess_calls import Outcome

MODULE = "tests.interpreter.dense_block_calls"
DTYPES = ("float32", "bfloat16", "float16")
# Of sums of roundings: the interpreter truncates to bfloat16, which a GPU does not.
ROUNDED = ("float32", "float16")
CHANNELS = (1, 12, 37, 64)
NAMES = [
    *(f"definition-{dtype}-{channels}" for dtype, channels in itertools.product(DTYPES, CHANNELS)),
    *(f"many_consumers-{dtype}" for dtype in ROUNDED),
    *(f"running_statistics-{dtype}" for dtype in DTYPES),
    "any_number_of_programs",
    "other_layouts",
    "nan_and_zero",
    "empty",
    "operators",
    "refused",
]


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[name] == Outcome(None, "")
