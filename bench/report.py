"""Results on disk: one JSON file per run, whole at any moment.

Every row is saved when it is measured: the file is written under another name and renamed, so an
interrupted benchmark leaves what it had, and nobody ever reads half a file.

The file: ``schema``, ``kind`` (main, ops, ...), ``complete`` (false where the run was cut short),
``environment`` (bench/environment.py), ``notes`` (how it was measured) and ``rows``. A row has

    suite, case          what was measured; models, batch_norm, check, digits, bandwidth, ...
    metric, unit         time in ms, saved activations in bytes, ...
    threads, batch, dtype, direction        where they apply
    checked              true where the output was held to the float64 value in this run
    providers            name to {median, p20, p80, least, rounds} (or to one number)
    ratio                the same of eager / resops, of paired rounds; above 1
                         resops is faster
    limit_share          the same for limit / resops: the share of the bandwidth limit reached
    passed, detail       of a check
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA = 1
Row = dict[str, Any]


class ResultsError(RuntimeError):
    """Results cannot be written; the message is one sentence for the user."""

    def __init__(self, path: Path, error: OSError) -> None:
        reason = error.strerror or str(error)
        super().__init__(
            f"The benchmark cannot write its results to {path}: {reason}; free some space there or "
            f"name another folder with --output."
        )


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file beside ``path``, then give it the name ``path``.

    Raises:
        ResultsError: the file could not be written; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ResultsError(path.parent, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class Report:
    """The rows of one run. Making one writes the file, so that a bad folder is known at once.

    Args:
        path: the JSON file; :attr:`picture` is the PNG beside it.

    Raises:
        ResultsError: also by :meth:`add` and :meth:`finish`; the rows in memory stay.
    """

    def __init__(
        self, path: Path, kind: str, environment: dict[str, Any], notes: dict[str, Any]
    ) -> None:
        self.path = path
        self.picture = path.with_suffix(".png")
        self.complete = False
        self.rows: list[Row] = []
        self._head = {"schema": SCHEMA, "kind": kind}
        self._tail = {"environment": environment, "notes": notes}
        self.save()

    def add(self, row: Row) -> None:
        """Append a row and save all."""
        self.rows.append(row)
        self.save()

    def finish(self) -> None:
        """Say that nothing is missing."""
        self.complete = True
        self.save()

    def as_dict(self) -> dict[str, Any]:
        return {**self._head, "complete": self.complete, **self._tail, "rows": self.rows}

    def save(self) -> None:
        """Write the file; :meth:`add` and :meth:`finish` do so."""
        # Rows on a line each: a diff of two results can be read.
        head = {k: v for k, v in self.as_dict().items() if k != "rows"}
        text = json.dumps(head, indent=1, sort_keys=False)[:-2] + ',\n "rows": ['
        text += ",".join("\n  " + json.dumps(row) for row in self.rows) + "\n ]\n}\n"
        write_atomically(self.path, lambda path: _write_text(path, text))

    def failed_checks(self) -> list[Row]:
        return [row for row in self.rows if row["suite"] == "check" and not row["passed"]]


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def results_path(folder: Path, date: str, device: str, kind: str) -> Path:
    """``<folder>/<date and time>-<device>-<kind>.json``; ``date`` is ISO 8601, UTC."""
    stamp = date[:19].replace("-", "").replace(":", "")
    return folder / f"{stamp}-{device}-{kind}.json"


def newest(folder: Path, kind: str = "main") -> Path | None:
    """The newest complete results of a kind; the names sort by date."""
    for path in sorted(folder.glob(f"*-{kind}.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError):
            if load(path)["complete"]:
                return path
    return None


def load(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        OSError, ValueError: it is not there, or not a results file.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a results file of schema {SCHEMA}")
    return results
