"""What every test shares: seeds, poisoned memory, and the choice of instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

CAPABILITIES = ("portable", "avx2", "avx512", "avx512_bf16")


def pytest_configure(config: pytest.Config) -> None:
    """Processes that share the tests (pytest -n) share the cores too: threads that wait for each
    other across processes would mostly wait."""
    workers = getattr(config, "workerinput", {}).get("workercount")
    if workers is not None:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory from torch.empty, in Python and in C++, holds NaN (255 for bytes), no lucky zeros."""
    settings: Any = torch.utils.deterministic  # its one attribute is a property of the module
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        assert torch.empty(1000).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


@pytest.fixture
def native() -> None:
    """The test is about the compiled kernels. Without them it fails: a suite that skips most of
    itself would look like one that passes."""
    from resops import _native

    if _native.error is not None:
        pytest.fail(f"no native kernels: {_native.error}")


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest, native: None) -> Iterator[str]:
    """Each instruction set in turn; the name of the one that the kernels now use."""
    from resops import _C

    if request.param not in _C.cpu_capabilities():
        pytest.skip(f"this processor or build has no {request.param}: {_C.cpu_capabilities()}")
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    try:
        assert _C.cpu_capability() == request.param
        yield request.param
    finally:
        _C.set_cpu_capability(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
