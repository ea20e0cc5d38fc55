"""The backend "triton" from end to end, and what is said where it cannot run."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

from tests.subprocess_calls import Outcome, run_selected_calls

MODULE = "tests.interpreter.backend_calls"
BLOCKS = list(itertools.product(("basic_block", "bottleneck"), ("identity", "projection")))
NAMES = [
    "batch_norm_by_name",
    "residual_add_by_name",
    "residual_add_with_weights_of_backward",
    "backward_keeps_the_choice",
    "auto_leaves_the_interpreter_alone",
    "double_backward",
    "operators",
    "conv_operators",
    "conv_phases_compiled",
    "residual_block",
    "residual_block_compiled",
    "residual_block_compiled_dynamic",
    "refused",
    "direct_calls",
    *(f"near_to_float64-{op}-{shortcut}" for op, shortcut in BLOCKS),
    "compiled-basic_block",
    "compiled-bottleneck",
    "relu_and_its_mask",
    "dense_block",
    "slices",
    "slices_compiled",
    "slices_phase_by_phase",
    "slices_of_the_library",
    "unet",
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Outcome]:
    pytest.importorskip("triton", reason="Triton is not installed")
    return run_selected_calls(MODULE, request)


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[name] == Outcome(None, "")


REFUSED = """
import sys
{block}
import torch, resops
from resops.functional import batch_norm_act, residual_add
x = torch.randn(4, 3, 5)
with resops.backend("triton"):
    for call in (lambda: batch_norm_act(x, None, None, training=True), lambda: residual_add(x, x)):
        try:
            call()
        except resops.BackendError as error:
            print(error)
with resops.backend("auto"):
    batch_norm_act(x, None, None, training=True)
"""


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_without_triton(interpret: str) -> None:
    """One clear sentence; everything else works."""
    lines = refusals('sys.modules["triton"] = None', interpret)
    for op, line in zip(("batch_norm", "residual_add"), lines, strict=True):
        assert line == (
            f"backend 'triton' cannot compute {op}: Triton cannot be imported; to install it, run "
            "`pip install triton`"
        )


def test_cpu_tensors_without_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    for op, line in zip(("batch_norm", "residual_add"), refusals("", "0"), strict=True):
        assert line == (
            f"backend 'triton' cannot compute {op}: the triton {op} has no kernel for cpu tensors, "
            "unless TRITON_INTERPRET=1 is set when Python starts (slow, for tests)"
        )


def refusals(block: str, interpret: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED.format(block=block)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": interpret},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
