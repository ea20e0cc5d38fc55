"""The Triton kernels of residual_add, run by Triton's interpreter in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.subprocess_calls import Outcome

MODULE = "tests.interpreter.residual_add_calls"
WEIGHTINGS_IN_RULE_R = ("plain", "scalars", "per_sample_complement", "gate_per_sample", "carry")
ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "gelu")
NAMES = [
    *(f"rule_R-{w}-{a}" for w in WEIGHTINGS_IN_RULE_R for a in ACTIVATIONS),
    "rule_R-gate_complement-relu",
    "exact_sums",
    "offsets_beyond_2_31",
    "same_bits_every_time",
    "nan_and_zero",
    "empty_and_one",
    "only_what_is_asked_for",
    "refused",
]


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[name] == Outcome(None, "")


def test_package_without_triton() -> None:
    """It imports, and says what is missing; the kernels themselves need Triton."""
    folder = Path(__file__).resolve().parents[2] / "triton_kernels"
    script = f"""
import importlib.util, sys
sys.modules["triton"] = None
spec = importlib.util.spec_from_file_location(
    "kernels", {str(folder / "__init__.py")!r}, submodule_search_locations=[{str(folder)!r}]
)
sys.modules["kernels"] = kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
assert "Triton cannot be imported" in kernels.error and "pip install triton" in kernels.error
try:
    import kernels.residual_add
except ImportError:
    print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
