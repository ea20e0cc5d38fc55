"""Every CUDA kernel, run by the emulator: each program of kernels/ compares its op, forward and
backward, with the definition in float64 by rule R, on odd shapes, in three lanes."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import pytest

from bench.gpu_gate import ALSO

from . import emulator

SOURCES = emulator.ROOT / "csrc" / "cuda"
PROGRAMS = sorted(path.stem for path in (emulator.FOLDER / "kernels").glob("*.cpp"))
CASES = {
    "batch_norm": [
        "shapes",
        "flags",
        "large_batch",
        "parameters",
        "walks",
        "means",
        "tails",
        "exact_statistics",
        "outliers",
        "corners",
        "special_values",
    ],
    "conv_bn_act": ["shapes", "windows", "flags", "statistics", "repeats", "special_values"],
    "batch_norm_slab": ["flags", "shapes", "means", "choice", "determinism"],
    "batch_norm_act_max_pool": ["shapes", "flags", "special_values"],
    "residual_add": ["shapes", "flags", "large_batch", "half_weights", "wanted"],
}


def program(name: str, lane: str) -> Path:
    reason = emulator.missing(lane)
    if reason is not None:
        pytest.skip(f"no lane {lane}: {reason}")
    source = emulator.FOLDER / "kernels" / f"{name}.cpp"
    launchers = [SOURCES / f"{op}.cu" for op in (name, *ALSO.get(name, []))]
    return emulator.build(source, *launchers, lane=lane)


@functools.cache
def plain_run(name: str, case: str) -> subprocess.CompletedProcess[str]:
    """Of a case in the plain lane, which several tests look at."""
    return emulator.run(program(name, "plain"), case, timeout=600)


def test_every_program_is_listed() -> None:
    assert sorted(CASES) == PROGRAMS


@pytest.mark.parametrize(
    "lane",
    # The sanitizers' builds and runs take minutes.
    [pytest.param(lane, marks=[pytest.mark.slow] * (lane != "plain")) for lane in emulator.LANES],
)
@pytest.mark.parametrize(("name", "case"), [(n, c) for n, cases in CASES.items() for c in cases])
def test_kernels(name: str, case: str, lane: str) -> None:
    if lane == "plain":
        done = plain_run(name, case)
    else:
        done = emulator.run(program(name, lane), case, lane=lane, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_order_of_threads_and_poison_change_nothing(name: str) -> None:
    """Both are other ones than in test_kernels."""
    for case in CASES[name]:
        if case in ("large_batch", "repeats") or (name, case) == ("conv_bn_act", "shapes"):
            continue  # sizes; others have their instructions
        variables = {"RESOPS_SIMT_SEED": "7", "RESOPS_SIMT_POISON": "0"}
        done = emulator.run(program(name, "plain"), case, timeout=600, **variables)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_traffic(name: str) -> None:
    """32-byte sectors of each pass: at most 1.05 of what its tensors take."""
    done = emulator.run(program(name, "plain"), "traffic")
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("traffic ") >= 10, done.stdout


def test_every_kernel_runs() -> None:
    """Each __global__ function of csrc/cuda is launched by the programs."""
    launched = ""
    for name in PROGRAMS:
        for case in {"flags", "parameters", "statistics", "wanted"} & set(CASES[name]):
            launched += plain_run(name, case).stdout
    defined = {
        kernel
        for path in SOURCES.rglob("*.cu*")
        for kernel in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", path.read_text())
    }
    assert len(defined) >= 10
    assert defined == set(re.findall(r"launched \(?(\w+_kernel)", launched))
