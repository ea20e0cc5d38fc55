"""The emulator itself: right kernels give right results, and each planted mistake is found."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.lanes.ptxas import find_nvcc

from . import emulator

PROGRAMS = emulator.FOLDER / "programs"

# The mistake, the lane that must find it, and what it must say. "plain" needs no sanitizer.
RACE = r"ThreadSanitizer: data race"
FAULTS = [
    ("missing_barrier", "thread", RACE),
    ("missing_barrier_before_reuse", "thread", RACE),
    ("missing_warp_sync", "thread", RACE),
    ("race_between_blocks", "thread", RACE),
    ("missing_fence", "thread", RACE),
    ("plain_read_of_atomic", "thread", RACE),
    ("missing_grid_sync", "thread", RACE),
    ("missing_cluster_sync", "thread", RACE),
    ("exit_before_cluster_sync", "thread", RACE),
    ("missing_barrier_after_wait", "thread", RACE),
    ("past_shared", "address", r"AddressSanitizer: heap-buffer-overflow"),
    ("past_array_in_shared", "address", r"index 32 out of bounds for type 'float \[32\]'"),
    ("past_global", "address", r"AddressSanitizer: heap-buffer-overflow"),
    ("misaligned_cast", "address", r"misaligned address .* which requires 16 byte alignment"),
    ("misaligned_load", "plain", r"misaligned_kernel, .* load of 16 bytes at .* misaligned"),
    ("null_load", "plain", r"load of 4 bytes at .* null address"),
    ("write_to_read_only", "plain", r"reads this by load_nc and writes it"),
    (
        "divergent_barrier",
        "plain",
        r"divergent block_sync: .* waits in the block_sync at faults.cpp",
    ),
    (
        "barrier_against_shuffle",
        "plain",
        r"deadlock in skipped_kernel: 16 threads of block \(0, 0, 0\) wait in the block_sync at "
        r"faults.cpp:\d+; 16 threads of block \(0, 0, 0\) wait in the shuffle at faults.cpp:\d+",
    ),
    ("exit_before_grid_sync", "plain", r"deadlock in grid_exit_kernel: 32 threads of block \(1,"),
    ("grid_sync_without_cooperation", "plain", r"grid_sync in a launch that is not cooperative"),
    ("shuffle_from_missing_lane", "plain", r"shuffle reads lane 20, which is not there"),
    ("spin", "plain", r"a loop of atomics waits for what never comes"),
    ("too_many_threads", "plain", r"more than 1024 threads .* block \(1025, 1, 1\)"),
    ("empty_grid", "plain", r"launch of reverse_kernel<0> failed: empty launch; grid \(0, 1, 1\)"),
    ("grid_too_large", "plain", r"grid too large; grid \(1, 65536, 1\)"),
    ("too_much_shared", "plain", r"more shared memory than 16384 bytes"),
    ("too_little_shared", "plain", r"shared struct has 256 bytes, the launch gave 252"),
    ("grid_not_resident", "plain", r"7 blocks at once, where 6 fit"),
    ("cluster_too_large", "plain", r"clusters of 16 blocks, where the device allows 8"),
    ("cluster_not_dividing", "plain", r"clusters of 2 blocks, .* must be a multiple"),
]
# These look at a value themselves, or must go well.
SELF_CHECKING = [
    "no_fault",
    "uninitialised_shared",
    "forgotten_wait",
    "wait_for_another_group",
    "launch_after_failure",
]


def program(name: str, lane: str, flags: tuple[str, ...] = ()) -> Path:
    reason = emulator.missing(lane)
    if reason is not None:
        pytest.skip(f"no lane {lane}: {reason}")
    return emulator.build(PROGRAMS / f"{name}.cpp", lane=lane, flags=flags)


@pytest.mark.parametrize("lane", emulator.LANES)
def test_right_kernels(lane: str) -> None:
    done = emulator.run(program("checks", lane), lane=lane)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("seed", range(1, 6))
def test_right_kernels_in_any_order(seed: int) -> None:
    done = emulator.run(program("checks", "plain"), RESOPS_SIMT_SEED=str(seed))
    assert done.returncode == 0, done.stdout


def test_right_kernels_do_not_see_the_poison() -> None:
    done = emulator.run(program("checks", "plain"), RESOPS_SIMT_POISON="0")
    assert done.returncode == 0, done.stdout


def test_right_kernels_without_assembly() -> None:
    """The switch between threads that other processors than x86-64 use."""
    done = emulator.run(program("checks", "plain", flags=("-DSIMT_UCONTEXT",)))
    assert done.returncode == 0, done.stdout


def test_every_fault_is_tested() -> None:
    listed = emulator.run(program("faults", "plain"), "--list").stdout.split()
    assert sorted(listed) == sorted([name for name, _, _ in FAULTS] + SELF_CHECKING)


@pytest.mark.parametrize(("name", "lane", "says"), FAULTS, ids=[name for name, _, _ in FAULTS])
def test_fault_is_found(name: str, lane: str, says: str) -> None:
    done = emulator.run(program("faults", lane), name, lane=lane)
    output = done.stdout + done.stderr
    # 66 is ThreadSanitizer's, 1 the others', 3 the emulator's own.
    assert done.returncode == {"thread": 66, "address": 1, "plain": 3}[lane], output
    assert re.search(says, output), output
    assert "faults.cpp" in output or "resops: launch of" in output, output


@pytest.mark.parametrize("name", ["missing_barrier", "missing_barrier_before_reuse"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_race_is_found_in_any_order(name: str, seed: int) -> None:
    binary = program("faults", "thread")
    done = emulator.run(binary, name, lane="thread", RESOPS_SIMT_SEED=str(seed))
    assert done.returncode == 66 and re.search(RACE, done.stderr), done.stdout + done.stderr


@pytest.mark.parametrize("lane", emulator.LANES)
@pytest.mark.parametrize("name", SELF_CHECKING)
def test_self_checking(name: str, lane: str) -> None:
    done = emulator.run(program("faults", lane), name, lane=lane)
    assert done.returncode == 0, done.stdout + done.stderr


def test_build_is_kept_until_a_header_changes(tmp_path: Path) -> None:
    header, source = tmp_path / "value.h", tmp_path / "value.cpp"
    header.write_text("constexpr int kValue = 0;\n")
    source.write_text('#include "value.h"\nint main() { return kValue; }\n')
    first = emulator.build(source)
    made = first.stat().st_mtime_ns
    assert emulator.run(first).returncode == 0
    assert emulator.build(source) == first and first.stat().st_mtime_ns == made
    header.write_text("constexpr int kValue = 7;\n")
    assert emulator.run(emulator.build(source)).returncode == 7
    source.write_text("int main() { return nothing; }\n")
    with pytest.raises(RuntimeError, match="nothing"):
        emulator.build(source)


def test_interface_compiles_for_a_gpu() -> None:
    """What portable.cuh promises to kernels exists on both sides."""
    source = PROGRAMS / "interface.cu"
    emulator.compile_only(source)
    if find_nvcc() is None:
        pytest.skip("no nvcc: the interface was compiled for the emulator only")
    compile_by_nvcc("--ptx", source, Path("/dev/null"))


def compile_by_nvcc(how: str, source: Path, output: Path) -> None:
    command = [find_nvcc() or "nvcc", "-std=c++20", "-arch=sm_90a", *how.split()]
    command += ["-I", str(emulator.ROOT / "csrc" / "cuda"), str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
def test_a_refused_launch_says_what_and_where(tmp_path: Path) -> None:
    """By a CUDA runtime that only refuses: kernel, grid and architecture, and what to do on a GPU
    that the build has no code for."""
    binary = tmp_path / "launch_failure"
    compile_by_nvcc("-cudart none", PROGRAMS / "launch_failure.cu", binary)

    def said(status: int, capability: int) -> str:
        command = [str(binary), str(status), str(capability)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    invalid_value, no_kernel_image = 1, 209  # cudaError_t
    launch = "resops: launch of fill_kernel failed: "
    where = (
        "; grid (7, 2, 1), block (256, 1, 1), 64 bytes of shared memory, on Some GPU (sm_{number})"
    )
    assert said(0, 90) == "launched"
    assert said(invalid_value, 90) == launch + "another reason" + where.format(number=90)
    older = launch + "no kernel image" + where.format(number=75)
    older += ". This build has no code for it: rebuild resops with TORCH_CUDA_ARCH_LIST=7.5"
    assert said(no_kernel_image, 75) == older
