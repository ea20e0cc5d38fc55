"""Compiles every C++ file that sees torch against the headers of the oldest torch for resops.

    python tests/lanes/torch_headers.py [--torch 2.11.0+cpu] [--wheel FILE]

pip fetches the wheel, without what it depends on; its headers are unpacked, and nothing of it is
imported or linked. The compiler only checks: no object files. Where the package index has no such
wheel that is said, and the exit status is 0: nothing was found to be wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "torch_headers"
INDEXES: tuple[list[str], ...] = ([], ["--index-url", "https://download.pytorch.org/whl/cpu"])


def oldest_torch() -> str:
    """What pyproject.toml says: torch>=2.11 stands for 2.11.0."""
    found = re.search(r'"torch>=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None, "pyproject.toml names no oldest torch"
    return f"{found[1]}.0+cpu"


def download(version: str) -> Path | None:
    """The wheel of that torch, fetched once; None where no index has it."""
    folder = BUILD / version
    folder.mkdir(parents=True, exist_ok=True)
    if kept := next(folder.glob("torch-*.whl"), None):
        return kept
    # Where no index has the CPU's wheel, the one for CUDA has the same headers, in half a gigabyte.
    wanted = [(version, index) for index in INDEXES]
    wanted.append((version.partition("+")[0], INDEXES[0]))
    for spelling, index in wanted:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1"]
        command += ["--no-deps", "--dest", str(folder), *index, f"torch=={spelling}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return next(folder.glob("torch-*.whl"), None)
        print(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip failed")
    return None


def unpack(wheel: Path) -> Path:
    """The folder torch/include of the wheel."""
    folder = BUILD / wheel.stem
    include = folder / "torch" / "include"
    if not include.exists():
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("torch/include/")]
            archive.extractall(folder, names)
    return include


def sources() -> list[Path]:
    """The files that see torch: all but the kernels."""
    found = [
        path
        for folder in ("csrc", "csrc/autograd", "csrc/cpu", "csrc/cuda/bindings")
        for path in sorted((ROOT / folder).glob("*.cpp"))
    ]
    return [path for path in found if not path.name.endswith("_kernels.cpp")]


def check(source: Path, include: Path) -> str | None:
    """What the compiler says against a file; None if nothing."""
    folders = [include, include / "torch/csrc/api/include", pybind11.get_include()]
    command = [os.environ.get("CXX") or "c++", "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{BUILD}", "-DRESOPS_HAVE_X86_ISA"]
    for folder in [*folders, sysconfig.get_path("include")]:
        command += ["-isystem", str(folder)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr[-4000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", default=oldest_torch(), help="version, as pip takes it")
    parser.add_argument("--wheel", type=Path, help="a wheel that is there already")
    options = parser.parse_args()
    wheel = options.wheel or download(options.torch)
    if wheel is None:
        print(f"NOT CHECKED: the package index has no torch {options.torch}")
        return 0
    include = unpack(wheel)
    facts = (ROOT / "csrc/build_facts.h.in").read_text()  # which CMake fills in when it builds
    (BUILD / "build_facts.h").write_text(facts.replace("@RESOPS_FACT_ROWS@", '    {"", ""},\n'))
    workers = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool:
        said = list(pool.map(lambda source: (source, check(source, include)), sources()))
    for source, errors in said:
        print(f"{source.relative_to(ROOT)}: {'compiles' if errors is None else errors}")
    wrong = [source for source, errors in said if errors is not None]
    print(f"{len(said) - len(wrong)} of {len(said)} files compile with {wheel.name}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
