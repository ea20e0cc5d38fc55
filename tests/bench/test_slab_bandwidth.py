"""The experiment on slab widths: that each of its reads reads every element once."""

from __future__ import annotations

import re

import pytest

from tests.simt import emulator


def test_every_width_reads_everything_once() -> None:
    """Under the emulator; the program itself compares sums. The times mean nothing."""
    reason = emulator.missing("plain")
    if reason is not None:
        pytest.skip(reason)
    done = emulator.run(emulator.build(emulator.ROOT / "bench" / "slab_bandwidth.cu"), "1")
    assert done.returncode == 0, done.stdout
    rows = re.findall(r"^ +(\d+) +(\d+|whole) +[\d.]+$", done.stdout, re.MULTILINE)
    assert ("128", "32") in rows and ("4096", "whole") in rows
    assert len(rows) == sum(range(3, 9))  # from 32 bytes to the whole row, for six lengths of a row
