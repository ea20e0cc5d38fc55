"""Calls that end in every way there is: a check of tests/subprocess_calls.py."""

from __future__ import annotations

import ctypes
import os


def _raises() -> None:
    raise ValueError("as it should")


CALLS = {
    "fine": lambda: None,
    "crash": lambda: ctypes.string_at(0),
    "raises": _raises,
    "exit": lambda: os._exit(0),
}
