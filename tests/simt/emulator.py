"""Compiles a program for the emulator and runs it, in one of three lanes.

``plain``    values, launch errors, deadlocks, traffic
``address``  AddressSanitizer and UndefinedBehaviorSanitizer
``thread``   ThreadSanitizer, which sees every CUDA thread as a thread

Object files lie in build/simt and are compiled again when a file that they include has changed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
BUILD = ROOT / "build" / "simt"

LANES = ("plain", "address", "thread")

_COMMON = [
    "-std=c++20",
    "-fno-strict-aliasing",  # kernels reinterpret memory as vectors, as CUDA allows
    "-ffp-contract=off",
    "-ftrivial-auto-var-init=pattern",  # a register that nobody wrote is no zero
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-DRESOPS_SIMT",
    f"-I{ROOT / 'csrc' / 'cuda'}",
    f"-I{FOLDER}",
]
_TRACES = ["-g1", "-fno-omit-frame-pointer"]  # where a sanitizer's report is from
_ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DSIMT_ASAN", *_TRACES]
# What the checks add to a kernel takes an optimiser longer than it saves.
_KERNEL = {
    "plain": ["-O1"],
    "address": ["-O0", *_ADDRESS],
    "thread": ["-O1", "-fsanitize=thread", "-DSIMT_TSAN", *_TRACES],
}
# ThreadSanitizer must not see the emulator itself. -O2 also inlines its small functions: the linker
# could otherwise take them from an instrumented file.
_ENGINE = {
    "plain": ["-O2"],
    "address": ["-O1", *_ADDRESS],
    "thread": ["-O2", "-DSIMT_TSAN", *_TRACES],
}
_LINK = {"plain": [], "address": _ADDRESS, "thread": ["-fsanitize=thread"]}
_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",  # a kernel that was stopped frees nothing
    "TSAN_OPTIONS": "halt_on_error=1 history_size=4",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def compiler() -> str | None:
    """``$CXX``, c++ or g++; None where there is none."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


@functools.cache
def missing(lane: str) -> str | None:
    """Why programs of this lane cannot be built or run here; None if they can."""
    cxx = compiler()
    if cxx is None:
        return "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text("#include <source_location>\nint main() {}\n")
        command = [cxx, "-std=c++20", *_LINK[lane], str(source), "-o", str(binary)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode != 0:
            return f"{cxx} cannot build it: {built.stderr.strip().splitlines()[-1]}"
        ran = subprocess.run(_command(binary, lane), capture_output=True, text=True, check=False)
        return None if ran.returncode == 0 else f"it does not run here: {ran.stderr.strip()}"


def build(program: Path, *others: Path, lane: str = "plain", flags: Sequence[str] = ()) -> Path:
    """The program, linked with the emulator and other sources. Returns the path of the binary.

    .cu files are compiled as C++. ``flags`` are added for the emulator. Raises ``RuntimeError``
    with the compiler's output.
    """
    engine = [FOLDER / "simt.cpp", FOLDER / "limits.cpp"]
    jobs = [(source, [*_ENGINE[lane], *flags]) for source in engine]
    jobs += [(source, _KERNEL[lane]) for source in (program, *others)]
    objects = compile_objects(jobs, lane)
    key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:8]
    binary = BUILD / lane / f"{program.stem}-{key}"
    newest = max(path.stat().st_mtime_ns for path in objects)
    if not binary.exists() or binary.stat().st_mtime_ns < newest:
        temporary = binary.with_suffix(f".{os.getpid()}")
        _compile([*_LINK[lane], *map(str, objects), "-o", str(temporary)])
        temporary.replace(binary)
    return binary


def compile_objects(jobs: Sequence[tuple[Path, Sequence[str]]], lane: str) -> list[Path]:
    """The object file of every (source, flags), as many at a time as there are cores (MAX_JOBS).

    Raises ``RuntimeError`` with the compiler's output.
    """
    workers = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda job: _object(job[0], job[1], lane), jobs))


def compile_only(source: Path) -> None:
    """Raises ``RuntimeError`` with the compiler's output where a source does not compile."""
    _object(source, _KERNEL["plain"], "plain")


def run(
    binary: Path, *arguments: str, lane: str = "plain", timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program of a lane; ``variables`` are added to the environment."""
    return subprocess.run(
        [*_command(binary, lane), *arguments],
        env={**os.environ, **_ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _command(binary: Path, lane: str) -> list[str]:
    # ThreadSanitizer's shadow memory needs addresses that are not randomised too far.
    setarch = shutil.which("setarch") if lane == "thread" else None
    return [setarch, "--addr-no-randomize", str(binary)] if setarch else [str(binary)]


def _object(source: Path, flags: Sequence[str], lane: str) -> Path:
    command = [*_COMMON, *flags, "-x", "c++", "-c", str(source)]
    key = hashlib.sha256(" ".join([str(compiler()), *command]).encode()).hexdigest()[:8]
    made = BUILD / lane / f"{source.stem}-{key}.o"
    if not _up_to_date(made):
        made.parent.mkdir(parents=True, exist_ok=True)
        temporary = made.with_suffix(f".{os.getpid()}")
        depends = temporary.with_suffix(temporary.suffix + "d")
        _compile([*command, "-MMD", "-MF", str(depends), "-o", str(temporary)])
        depends.replace(made.with_suffix(".d"))
        temporary.replace(made)
    return made


def _up_to_date(made: Path) -> bool:
    depends = made.with_suffix(".d")
    if not made.exists() or not depends.exists():
        return False
    files = depends.read_text().partition(":")[2].replace("\\\n", " ").split()
    time = made.stat().st_mtime_ns
    return all(Path(f).exists() and Path(f).stat().st_mtime_ns <= time for f in files)


def _compile(arguments: Sequence[str]) -> None:
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler was found: install g++ or set CXX")
    done = subprocess.run([cxx, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{cxx} {' '.join(arguments)}\n{done.stderr}")
