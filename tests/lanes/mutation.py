"""The mutation lane: every planted bug must be caught by the tests that are named beside it.

    python tests/lanes/mutation.py [--list] [--only TEXT]

All bugs of mutants.py and triton_mutants.py are planted at once into a copy of the source tree,
each behind a switch (``RESOPS_MUTANT == k ? mutated : original``), so that one build serves them
all. The copy is built for the portable instruction set only: the kernels are one source for all of
them. Without a bug the named tests must pass; then a forked process per bug switches it on and runs
its tests, of which one must fail.

A pattern that no longer occurs exactly once in the source stops the lane: adapt mutants.py.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The copy; where this file runs from the copy, ROOT is the copy itself.
IN_COPY = "RESOPS_MUTATION_TREE"
TREE = Path(os.environ.get(IN_COPY, ROOT / "build" / "mutation" / "tree"))
TIMEOUT = 120  # seconds for the tests of one bug; a bug that hangs is a bug that is seen

if __name__ == "__main__":  # started as a file: find the package `tests`
    sys.path.insert(0, str(ROOT))

from tests.lanes import mutants as native_mutants  # noqa: E402
from tests.lanes import source_copy, triton_mutants  # noqa: E402
from tests.lanes.mutants import Edit, Mutant  # noqa: E402

MUTANTS = [*native_mutants.MUTANTS, *triton_mutants.MUTANTS]

CPP_SWITCH = """
// Planted by tests/lanes/mutation.py: the number of the bug that is active, 0 for none.
extern "C" __attribute__((visibility("default"))) int resops_mutant;
"""
CPP_VARIABLE = """
#include <cstdlib>
__attribute__((visibility("default"))) int resops_mutant =
    std::getenv("RESOPS_MUTANT") ? std::atoi(std::getenv("RESOPS_MUTANT")) : 0;
"""
PY_SWITCH = '''"""Planted by tests/lanes/mutation.py."""
import os


def on(number: int) -> bool:
    return os.environ.get("RESOPS_MUTANT", "0") == str(number)
'''


class PatternError(Exception):
    """A pattern of the lists of bugs does not fit the source."""


# ---- planting -----------------------------------------------------------------------------------


def switched(edit: Edit, active: Sequence[tuple[int, str]]) -> str:
    """Text for the place of ``edit.original``: the bugs that go there behind their switches."""
    if edit.file.endswith(".py"):
        call = '__import__("resops._mutant", fromlist=["on"]).on'
        text = f"({edit.original})"
        for number, mutated in active:
            text = f"(({mutated}) if {call}({number}) else {text})"
        return text
    if edit.statement:
        text = f"{{ {edit.original} }}"
        for number, mutated in active:
            text = f"if (resops_mutant == {number}) {{ {mutated} }} else {text}"
        return text
    text = f"({edit.original})"
    for number, mutated in active:
        text = f"(resops_mutant == {number} ? ({mutated}) : {text})"
    return text


def plant(mutants: Sequence[Mutant], root: Path) -> dict[str, str]:
    """The text of every file that has bugs, with all of them behind their switches.

    Raises:
        PatternError: an original text does not occur exactly once, or two of them overlap.
    """
    places: dict[tuple[str, str], list[tuple[int, Edit]]] = defaultdict(list)
    for number, mutant in enumerate(mutants, 1):
        for edit in mutant.edits:
            places[edit.file, edit.original].append((number, edit))
    errors: list[str] = []
    cuts: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for (file, original), edits in places.items():
        text = (root / file).read_text()
        found = text.count(original)
        if found != 1:
            names = ", ".join(repr(mutants[number - 1].name) for number, _ in edits)
            errors.append(f"{file} has {found} times {original!r} (of {names})")
            continue
        start = text.index(original)
        new = switched(edits[0][1], [(number, edit.mutated) for number, edit in edits])
        cuts[file].append((start, start + len(original), new))
    planted: dict[str, str] = {}
    for file, ranges in cuts.items():
        text = (root / file).read_text()
        ranges.sort()
        for (_, end, _), (start, _, _) in pairwise(ranges):
            if start < end:
                errors.append(f"{file}: two patterns overlap at {text[start:end]!r}")
        for start, end, new in reversed(ranges):
            text = text[:start] + new + text[end:]
        planted[file] = text
    if errors:
        raise PatternError("the planted bugs no longer fit the source:\n  " + "\n  ".join(errors))
    return planted


def prepare_tree(mutants: Sequence[Mutant]) -> None:
    """Make or renew the copy of the source tree, with the bugs in it."""
    variable = "csrc/cpu/capability.cpp"
    planted = {variable: (ROOT / variable).read_text()} | plant(mutants, ROOT)
    for file in planted:
        if file.startswith("csrc/"):
            planted[file] = CPP_SWITCH + planted[file]
    planted[variable] += CPP_VARIABLE
    planted["resops/_mutant.py"] = PY_SWITCH
    source_copy.renew(TREE, planted)


# ---- running, in the copy -----------------------------------------------------------------------


@dataclass
class Run:
    mutant: Mutant
    number: int
    log: Path
    start: float
    pid: int = 0


def run_tests(number: int, tests: Sequence[str], log: Path, stop_early: bool) -> int:
    """Run tests in this (forked) process with a bug switched on; pytest's exit status."""
    import pytest
    import torch

    from resops import _C

    torch.set_num_threads(1)  # before anything else in a forked child
    os.environ["RESOPS_MUTANT"] = str(number)
    ctypes.c_int.in_dll(ctypes.CDLL(_C.__file__), "resops_mutant").value = number
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        # Only what the copy was built for: the portable instruction set.
        options = ["-q", "-k", "not avx", "-m", "not slow", "-p", "no:cacheprovider", "--tb=short"]
        return int(pytest.main([*tests, *options, *(["-x"] if stop_early else [])]))


def start(run: Run) -> None:
    """Fork a process for the run; its exit status is pytest's."""
    sys.stdout.flush()
    run.start = time.monotonic()
    run.pid = os.fork()
    if run.pid == 0:
        status = 70
        try:
            status = run_tests(run.number, run.mutant.tests, run.log, stop_early=run.number > 0)
        finally:
            os._exit(status)


def wait_for_one(running: dict[int, Run]) -> tuple[Run, int]:
    """The next run to end, taken out of ``running``, and its wait status.

    One that takes too long is killed from here: a loop without end in a kernel lets no handler run.
    """
    while True:
        for pid, run in running.items():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[pid]
                return run, status
            if time.monotonic() - run.start > TIMEOUT:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def verdict(status: int) -> str:
    """What became of a bug, from the wait status of its process."""
    if os.WIFSIGNALED(status):
        killer = os.WTERMSIG(status)
        return "caught (hang)" if killer == signal.SIGKILL else f"caught (signal {killer})"
    code = os.WEXITSTATUS(status)
    return {0: "SURVIVED", 1: "caught"}.get(code, f"BROKEN RUN (pytest status {code})")


def run_all(mutants: Sequence[Mutant], numbers: Sequence[int]) -> int:
    """In the copy: the tests without a bug, then every bug. The number of failures."""
    import pytest

    import resops
    from resops import _C, triton_kernels

    for module in (resops, _C, triton_kernels):
        assert Path(module.__file__ or "").is_relative_to(TREE), f"{module} is not the copy"
    logs = TREE / "logs"
    logs.mkdir(exist_ok=True)
    chosen = [(number, mutants[number - 1]) for number in numbers]
    tests = tuple(sorted({test for _, mutant in chosen for test in mutant.tests}))
    # Imports all test modules once, for every process that is forked from this one.
    with contextlib.redirect_stdout(io.StringIO()) as collected:
        status = pytest.main([*tests, "--collect-only", "-qq", "-p", "no:cacheprovider"])
    if status != 0:
        print(collected.getvalue()[-2000:])
        raise SystemExit("mutants.py names tests that cannot be collected")

    clean = Run(Mutant("no bug", (), tests), 0, logs / "clean.log", 0.0)
    start(clean)
    _, status = wait_for_one({clean.pid: clean})
    if verdict(status) != "SURVIVED":
        print(clean.log.read_text()[-4000:])
        print("the named tests must pass without a bug")
        return 1
    print(f"without a bug: the named tests pass ({time.monotonic() - clean.start:.0f} s)")

    waiting = [Run(m, n, logs / f"{n:02}.log", 0.0) for n, m in chosen]
    running: dict[int, Run] = {}
    survivors = 0
    while waiting or running:
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            run = waiting.pop(0)
            start(run)
            running[run.pid] = run
        run, status = wait_for_one(running)
        outcome = verdict(status)
        text = run.log.read_text() if run.log.is_file() else ""
        failed = next((line for line in text.splitlines() if line.startswith("FAILED")), "")
        by = failed.removeprefix("FAILED tests/").partition(" - ")[0]
        seconds = time.monotonic() - run.start
        print(f"{run.number:3}  {outcome:14}  {run.mutant.name:60}  {seconds:4.1f} s  {by}")
        if not outcome.startswith("caught"):
            survivors += 1
            print(text[-1500:])
    print(f"{len(chosen) - survivors} of {len(chosen)} planted bugs were caught")
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description="Plants bugs that the tests must catch.")
    parser.add_argument("--list", action="store_true", help="only check and list the bugs")
    parser.add_argument("--only", default="", metavar="TEXT", help="bugs whose name has TEXT")
    options = parser.parse_args()
    numbers = [n for n, m in enumerate(MUTANTS, 1) if options.only in m.name]
    if os.environ.get(IN_COPY):
        return int(run_all(MUTANTS, numbers) > 0)
    try:
        if options.list:
            plant(MUTANTS, ROOT)
            for number in numbers:
                print(f"{number:3}  {MUTANTS[number - 1].name}")
            return 0
        begin = time.monotonic()
        prepare_tree(MUTANTS)
    except PatternError as error:
        print(error, file=sys.stderr)
        return 2
    shutil.rmtree(TREE / "logs", ignore_errors=True)
    # For the portable instruction set only: a processor that CMake does not know.
    source_copy.build(TREE, CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=generic")
    print(f"built with {len(MUTANTS)} planted bugs ({time.monotonic() - begin:.0f} s)", flush=True)
    # Again from the copy, whose packages `tests` and `resops` are then the ones that are imported.
    script = str(TREE / "tests" / "lanes" / "mutation.py")
    environment = {
        **os.environ,
        IN_COPY: str(TREE),
        "PYTHONPATH": str(TREE),
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["--only", options.only] if options.only else []
    done = subprocess.run([sys.executable, script, *arguments], cwd=TREE, env=environment)
    print(f"mutation lane: {time.monotonic() - begin:.0f} s")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
