"""What the tests of interpreted kernels share."""

from __future__ import annotations

import pytest

from tests.subprocess_calls import Outcome, run_selected_calls


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """Of the calls of the test file's MODULE, by Triton's interpreter in a process of its own:
    TRITON_INTERPRET counts when Triton is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return run_selected_calls(request.module.MODULE, request)
