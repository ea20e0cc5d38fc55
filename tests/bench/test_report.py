from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench import figure, report, table
from bench.report import Report, ResultsError, write_atomically

SUMMARY = {"median": 2.0, "p20": 1.5, "p80": 2.5, "least": 1.0, "rounds": 5}
ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "device": "a processor",
    "cores": 2,
    "caches": {"L2": "1M"},
    "load_average": 0.5,
    "versions": {"torch": "2", "resops": "0"},
    "torch_capability": "AVX2",
    "resops_capability": "avx2",
    "commit": {"hash": None, "changed": False},
}


def timed(suite: str = "batch_norm", **more: Any) -> report.Row:
    return {
        "suite": suite,
        "case": "64x56x56 bn+relu",
        "metric": "time",
        "unit": "ms",
        "threads": 1,
        "batch": 8,
        "dtype": "fp32",
        "direction": "forward",
        "checked": True,
        "providers": {"eager": SUMMARY, "resops": SUMMARY},
        "ratio": SUMMARY,
        "gb_per_s": 12.0,
        **more,
    }


ROWS: list[report.Row] = [
    {
        "suite": "check",
        "group": "ops",
        "case": "one that passed",
        "metric": "error",
        "passed": True,
        "share": 0.5,
        "detail": "",
    },
    {
        "suite": "check",
        "group": "ops",
        "case": "a broken one",
        "metric": "error",
        "passed": False,
        "detail": "far off",
    },
    timed(),
    timed(limit_share=SUMMARY),
    timed("models", case="resnet18"),
    timed("residual_add"),
    {
        "suite": "batch_norm",
        "case": "64x56x56 bn+add+relu",
        "metric": "saved",
        "dtype": "fp32",
        "batch": 8,
        "elements": 1000,
        "element_bytes": 4,
        "providers": {"eager": 8000, "resops": 4125},
    },
    {
        "suite": "bandwidth",
        "case": "read",
        "metric": "bandwidth",
        "threads": 1,
        "way": "a way",
        "providers": {"best": {"median": 20.0}},
    },
    {
        "suite": "digits",
        "case": "digits",
        "metric": "curves",
        "curves": {
            name: {"training": [[1.0, 0.1]], "loss": [[1.1, 0.2]], "accuracy": [[0.5, 0.97]]}
            for name in ("eager", "resops")
        },
    },
    {"suite": "job", "case": "something late", "metric": "skipped"},
]


def new(folder: Path) -> Report:
    path = report.results_path(folder, ENVIRONMENT["date"], "a-processor", "main")
    return Report(path, "main", ENVIRONMENT, {})


def test_an_interrupted_run_leaves_its_rows(tmp_path: Path) -> None:
    results = new(tmp_path)
    for count, row in enumerate(ROWS, start=1):
        results.add(row)
        found = report.load(results.path)
        assert found["rows"] == ROWS[:count]
        assert found["complete"] is False
    results.finish()
    assert report.load(results.path)["complete"] is True
    assert os.listdir(tmp_path) == ["20260102T030405-a-processor-main.json"]


def test_the_file_is_there_before_the_first_row(tmp_path: Path) -> None:
    results = new(tmp_path / "made" / "on the way")
    assert json.loads(results.path.read_text())["environment"] == ENVIRONMENT


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_bad_folder_is_one_sentence_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    results = new(tmp_path)
    results.add(ROWS[0])

    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(ResultsError) as caught:
        results.add(ROWS[1])
    message = str(caught.value)
    assert os.strerror(code) in message and str(tmp_path) in message and "\n" not in message
    assert report.load(results.path)["rows"] == ROWS[:1]
    assert len(os.listdir(tmp_path)) == 1
    assert results.rows == ROWS[:2]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ResultsError, match="taken"):
        new(tmp_path / "taken")


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_text("old")

    def write(target: Path) -> None:
        target.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["picture.png"]


def test_newest_is_the_last_complete_one(tmp_path: Path) -> None:
    for hour in ("01", "02", "03"):
        path = report.results_path(tmp_path, f"2026-01-02T{hour}:00:00+00:00", "cpu", "main")
        results = Report(path, "main", ENVIRONMENT, {})
        if hour != "03":
            results.finish()
    (tmp_path / "20260109T000000-cpu-main.json").write_text("{broken")
    found = report.newest(tmp_path)
    assert found is not None and found.name == "20260102T020000-cpu-main.json"
    assert report.newest(tmp_path, "ops") is None


def test_load_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="not a results file"):
        report.load(tmp_path / "x.json")


def test_the_text_has_every_table(tmp_path: Path) -> None:
    results = new(tmp_path)
    for row in ROWS:
        results.add(row)
    text = table.render(results.as_dict())
    for part in (
        "1 of 2",
        "a broken one",
        "2.00x (2.00 / 2.00)",
        "200 %",
        "resnet18 forward fp32, batch 8",
        "1.00\n",
        "not run: something late",
        "cut short",
        "0.9700",
    ):
        assert part in text, part
    assert "nan" not in text
    assert len(table.sections(results.as_dict())) == 8
    assert all(len(set(map(len, section))) == 1 for section in table.sections(results.as_dict())), (
        "a table has lines of different length"
    )


def test_the_tables_of_no_rows(tmp_path: Path) -> None:
    assert table.sections(new(tmp_path).as_dict()) == []


def test_markdown() -> None:
    assert table.markdown([["a", "b"], ["c", "1"]]) == "| a | b |\n| --- | ---: |\n| c | 1 |"


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = new(tmp_path)
    with pytest.raises(figure.NoFigure, match="no row"):
        figure.draw(results.as_dict(), results.picture)
    for row in ROWS:
        results.add(row)
    figure.draw(results.as_dict(), results.picture)
    assert results.picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == [results.path.name, results.picture.name]
