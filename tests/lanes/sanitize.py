"""The sanitizer lane: the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/lanes/sanitize.py [address] [undefined]    # default: both in one build

A copy of the source tree in build/sanitize is built with RESOPS_SANITIZE and tested with the stock
torch wheel: the sanitizer's runtime library comes first through LD_PRELOAD, and libstdc++ with it,
whose symbols the runtime wants at its start. Leaks are not looked for (Python and torch keep memory
to the end on purpose). Before the tests the lane proves that it sees anything at all: a small
library with planted errors is called the same way, on memory of a torch tensor.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # started as a file: find the package `tests`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.lanes import source_copy

KINDS = ("address", "undefined")
RUNTIME = {"address": "libasan.so", "undefined": "libubsan.so"}
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:strict_init_order=1"},
    "undefined": {"UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"},
}

# Every kernel, in every layout, dtype and instruction set, at sizes around a vector; wrong calls.
# Out: files about what is above the kernels, and large cases that come in small as well.
OTHER_FILES = re.compile(
    r"test_(opinfo|property|conv_bn_act)|_(autograd|concurrency|dispatch|state)\.py$"
)
DESELECTED = "compile or large_batch or around_a_power or 147x147 or large_outputs"


def test_files() -> list[str]:
    tests = (source_copy.ROOT / "tests" / "ops").glob("test_*.py")
    return [f"tests/ops/{path.name}" for path in sorted(tests) if not OTHER_FILES.search(path.name)]


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def library(name: str) -> str:
    """Path of a library that comes with the compiler."""
    path = subprocess.run(
        [compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{compiler()} has no {name}; on Debian: apt-get install g++")
    return os.path.realpath(path)


def environment(kinds: Sequence[str]) -> dict[str, str]:
    """What a Python process needs to load a sanitized module."""
    preloaded = [*(RUNTIME[kind] for kind in kinds), "libstdc++.so.6"]
    settings = {"LD_PRELOAD": " ".join(map(library, preloaded)), "RESOPS_TEST_MARGIN": "0"}
    for kind in kinds:
        settings |= OPTIONS[kind]
    return os.environ | settings


SELF_CHECK = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
library.sum_of.restype = ctypes.c_float
values = torch.ones(100)
address = ctypes.c_void_p(values.data_ptr())
assert library.sum_of(address, ctypes.c_int64(100)) == 100
assert library.next_of(1) == 2
what = sys.argv[2]
if what == "read":
    library.sum_of(address, ctypes.c_int64(101))
elif what == "write":
    library.write_at(address, ctypes.c_int64(-1))
elif what == "overflow":
    library.next_of(2**31 - 1)
print("went on")
"""
PLANTED = {
    "address": {"read": "heap-buffer-overflow", "write": "heap-buffer-overflow"},
    "undefined": {"overflow": "signed integer overflow"},
}


def self_check(kind: str, folder: Path) -> None:
    """The lane sees planted errors, and no error where there is none.

    Raises:
        SystemExit: it does not: then a clean run of the tests would mean nothing.
    """
    product = folder / f"out_of_bounds_{kind}.so"
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("out_of_bounds.cpp")
    flags = [f"-fsanitize={kind}", "-fno-sanitize-recover=all", "-O1", "-g", "-shared", "-fPIC"]
    subprocess.run([compiler(), *flags, str(source), "-o", str(product)], check=True)

    def run(what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SELF_CHECK, str(product), what]
        return subprocess.run(command, env=environment([kind]), capture_output=True, text=True)

    clean = run("nothing")
    if clean.returncode != 0 or "went on" not in clean.stdout:
        raise SystemExit(f"{kind}: a program without an error does not run:\n{clean.stderr}")
    for what, report in PLANTED[kind].items():
        done = run(what)
        if done.returncode == 0 or "went on" in done.stdout or report not in done.stderr:
            raise SystemExit(f"{kind}: the planted error {what!r} was not seen:\n{done.stderr}")
    print(f"{kind}: the planted errors are seen: {', '.join(PLANTED[kind])}", flush=True)


CHECK_MODULE = """
import sys, torch, resops
from resops import _C
assert _C.__file__.startswith(sys.argv[1]), _C.__file__
assert _C.build_info()["sanitizer"] == sys.argv[2], _C.build_info()
print("instruction sets:", *_C.cpu_capabilities())
"""


def run_lane(kinds: Sequence[str]) -> int:
    """Build and test; pytest's exit status."""
    begin = time.monotonic()
    name = ",".join(kinds)
    folder = source_copy.ROOT / "build" / "sanitize"
    tree = folder / name.replace(",", "-")
    for kind in kinds:
        self_check(kind, folder)
    source_copy.renew(tree, {})
    source_copy.build(tree, RESOPS_SANITIZE=name)
    print(f"{name}: built ({time.monotonic() - begin:.0f} s)", flush=True)
    settings = {**environment(kinds), "PYTHONPATH": str(tree)}
    check = [sys.executable, "-c", CHECK_MODULE, str(tree), name]
    subprocess.run(check, cwd=tree, env=settings, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=10", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "-k", f"not ({DESELECTED})", *test_files()]
    # A thread ends the process after the timeout: a loop without end in a kernel runs no handler.
    command += ["-o", "timeout=180", "-o", "timeout_method=thread"]
    # faulthandler writes its own report on top of the sanitizer's.
    command += ["-p", "no:faulthandler", "--durations=15"]
    done = subprocess.run(command, cwd=tree, env=settings)
    verdict = "passed" if done.returncode == 0 else "failed"
    print(f"sanitizer lane ({name}): {verdict}, {time.monotonic() - begin:.0f} s", flush=True)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests the C++ kernels under sanitizers.")
    parser.add_argument("kinds", nargs="*", metavar="address|undefined", help="default: both")
    kinds = parser.parse_args().kinds or list(KINDS)
    unknown = set(kinds) - set(KINDS)
    if unknown:
        parser.error(
            f"there is no sanitizer {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}"
        )
    return run_lane([kind for kind in KINDS if kind in kinds])


if __name__ == "__main__":
    sys.exit(main())
