"""Battery I: wrong arguments of the phases of a convolution, each called in a subprocess: an
exception, never a signal. Those of the public function are in test_conv_bn_act.py.
"""

from __future__ import annotations

import re

import pytest

from tests.ops.conv_bn_act_bad_calls import BAD, GOOD, call
from tests.subprocess_calls import Outcome, run_selected_calls

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Outcome]:
    return run_selected_calls("tests.ops.conv_bn_act_bad_calls", request)


@pytest.mark.parametrize("name", BAD)
def test_wrong_call_raises(name: str, outcomes: dict[str, Outcome]) -> None:
    """I: the class of torch's own error, and a message that names the argument."""
    bad, outcome = BAD[name], outcomes[name]
    assert outcome.error != "signal", f"the process died: {outcome.message}"
    assert outcome.error is not None, "the call returned"
    assert outcome.error == bad.error.__name__, outcome
    assert re.search(bad.message, outcome.message), outcome.message


@pytest.mark.parametrize("phase", GOOD)
def test_good_calls_of_the_table_are_good(phase: str) -> None:
    """The unchanged arguments are right, so each call fails for its own reason."""
    call(phase, {})
