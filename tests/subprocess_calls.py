"""Runs calls that might crash in another process, and reports how each of them ended.

A module with a table CALLS of functions without arguments is run as
``python -m tests.subprocess_calls <module> <name>...``; it prints one line of JSON before and one
after every call. Where the process dies, the call that it had begun is the culprit, and a new
process goes on behind it: many calls share a process, each has its own result.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Outcome:
    """What a call did: ``error`` is the class of its exception, None if it returned, "signal" if
    the process died."""

    error: str | None
    message: str


def run_calls(module: str, names: Sequence[str], timeout: float = 540.0) -> dict[str, Outcome]:
    """The outcome of every named call of ``module``.

    Args:
        timeout: in seconds, for all of them; against hanging only, since other work may have the
            processors.
    """
    outcomes: dict[str, Outcome] = {}
    waiting = list(names)
    while waiting:
        command = [sys.executable, "-m", "tests.subprocess_calls", module, *waiting]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        begun: str | None = None
        for line in done.stdout.splitlines():
            report: dict[str, Any] = json.loads(line)
            if "begin" in report:
                begun = report["begin"]
            else:
                outcomes[report["end"]] = Outcome(report["error"], report["message"])
                begun = None
        if begun is not None:
            detail = f"exit status {done.returncode}: {done.stderr[-2000:]}"
            outcomes[begun] = Outcome("signal", detail)
        elif done.returncode != 0:
            raise RuntimeError(f"{' '.join(command[:4])} failed outside any call: {done.stderr}")
        waiting = [name for name in waiting if name not in outcomes]
    return outcomes


def run_selected_calls(module: str, request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """The same for the tests that pytest will run of the requesting file, by their parameter
    ``name``: one test alone costs one call."""
    selected = [
        item.callspec.params.get("name")
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.module is request.module
        and hasattr(item, "callspec")
    ]
    return run_calls(module, [name for name in selected if isinstance(name, str)])


def main(module: str, names: Iterable[str]) -> None:
    calls = importlib.import_module(module).CALLS

    def say(**report: object) -> None:
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()

    for name in names:
        say(begin=name)
        torch.manual_seed(0)  # as tests/conftest.py does for every test
        try:
            calls[name]()
        except Exception as error:
            say(end=name, error=type(error).__name__, message=str(error))
        else:
            say(end=name, error=None, message="")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
