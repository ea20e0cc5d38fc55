"""That the gate for GPUs runs stages, keeps a row for each, goes on after a failure and later."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import environment, gpu_gate
from bench.gpu_gate import Gpu, Stage
from bench.ops import gpu_batch_norm

GPU = Gpu("Some GPU", "9.0", "1.2")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stage(name: str, program: str, seconds: float = 60) -> Stage:
    return Stage(name, f"runs {name}", seconds, lambda gpu: [[sys.executable, "-c", program]])


@pytest.mark.parametrize("job", gpu_gate.JOBS)
def test_without_a_gpu_it_says_what_was_not_run(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_gate, "find_gpu", lambda: None)
    assert gpu_gate.main([job]) == 0
    said = capsys.readouterr().out
    assert "no GPU" in said
    for s in gpu_gate.JOBS[job]:
        assert f"{job} {s.name}: " in said


def test_rows_failures_and_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.jsonl"
    stages = (
        stage("good", "print('fine')"),
        stage("bad", "print('why'); raise SystemExit(3)"),
        stage("slow", "import time; print('begun', flush=True); time.sleep(60)", 1.5),
        Stage("no tool", "", 10, lambda gpu: [["no-such-program"]]),
    )
    monkeypatch.setattr(gpu_gate, "find_gpu", lambda: GPU)
    monkeypatch.setattr(environment, "commit", lambda: {"hash": "abc", "changed": False})
    monkeypatch.setitem(gpu_gate.JOBS, "prove", stages)
    command = ["prove", "--output", str(output)]
    assert gpu_gate.main(command) == 1
    found = {row["stage"]: row for row in rows(output)}
    statuses = {name: row["status"] for name, row in found.items()}
    assert statuses == {
        "good": "passed",
        "bad": "failed",
        "slow": "out of time",
        "no tool": "failed",
    }
    assert found["bad"]["exit status"] == 3 and "why" in found["bad"]["output"]
    assert "begun" in found["slow"]["output"] and "no-such-program" in found["no tool"]["output"]
    assert found["good"]["gpu"] == "Some GPU" and found["good"]["commit"]["hash"] == "abc"
    assert "not passed: bad, slow, no tool" in capsys.readouterr().out

    monkeypatch.setitem(gpu_gate.JOBS, "prove", (stages[0], stage("bad", "print('mended')")))
    assert gpu_gate.main(command) == 0
    assert "good: passed before" in capsys.readouterr().out
    assert [row["stage"] for row in rows(output)].count("good") == 1
    assert gpu_gate.main([*command, "--stage", "good", "--again"]) == 0
    assert [row["stage"] for row in rows(output)].count("good") == 2


def test_commands_name_files_that_are_there() -> None:
    """Every stage's commands, for a GPU that is not there."""
    for stages in gpu_gate.JOBS.values():
        for s in stages:
            for command in s.commands(GPU):
                for word in command:
                    path = Path(word)
                    source = path.suffix in (".cu", ".cpp", ".py") or word.startswith("tests/")
                    assert not source or (gpu_gate.ROOT / path).exists(), word
                    if "-m" in command and command[0] == sys.executable:
                        module = command[command.index("-m") + 1]
                        assert importlib.util.find_spec(module) is not None, module
    ((_, _, described),) = gpu_gate.build_programs(GPU)
    compiled = re.findall(r"^build \S+: compile (\S+)$", Path(described).read_text(), re.MULTILINE)
    assert len(compiled) == len(set(compiled)) >= 2 * len(gpu_gate.PROGRAMS)
    assert all((gpu_gate.ROOT / source).exists() for source in compiled)
    names = {path.stem for path in (gpu_gate.ROOT / "tests/simt/kernels").glob("*.cpp")}
    assert set(gpu_gate.PROGRAMS) == names


def test_times_are_appended_and_not_taken_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The timing program itself, on a CPU, where its figures mean nothing."""
    output = tmp_path / "times.jsonl"
    command = ["--device", "cpu", "--batch", "1", "--shapes", "2", "--dtypes", "bf16"]
    command += ["--output", str(output)]
    assert gpu_batch_norm.main([*command, "--seconds", "0"]) == 1
    assert "no time for: 64x112x112 bn+relu bf16" in capsys.readouterr().out
    assert not output.exists()
    assert gpu_batch_norm.main(command) == 0
    first = output.read_text()
    found = rows(output)
    assert [row["shape"] for row in found] == ["64x112x112 bn+relu", "64x56x56 bn+relu"]
    for row in found:
        for provider in ("eager", "resops"):
            for direction in ("forward", "backward"):
                assert row[f"{provider} {direction}"]["us"] > 0
        assert row["resops forward"]["share of copy"] > 0 and row["copies"] >= 2
    assert gpu_batch_norm.main(command) == 0
    assert output.read_text() == first
    assert gpu_batch_norm.main([*command, "--layout", "contiguous", "--shapes", "1"]) == 0
    assert rows(output)[-1]["layout"] == "contiguous" and len(rows(output)) == 3


def test_nothing_begins_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_gate, "find_gpu", lambda: GPU)
    monkeypatch.setattr(gpu_gate, "JOB_SECONDS", 1.0)
    monkeypatch.setitem(gpu_gate.JOBS, "prove", (stage("good", "pass"),))
    output = tmp_path / "rows.jsonl"
    assert gpu_gate.main(["prove", "--output", str(output)]) == 1
    assert not output.exists()


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_gate.main(["models", "--stage", "nothing"])
    assert "has the stages triton, batch 32, batch 256" in capsys.readouterr().err
