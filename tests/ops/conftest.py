from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _poison(poisoned_memory: None) -> None:
    """Every op test allocates from poisoned memory."""
