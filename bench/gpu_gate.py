"""What is to be proven and timed on a machine with a GPU, in runs of at most ten minutes.

    python -m bench.gpu_gate JOB [--stage NAME ...] [--again] [--output FILE]

The jobs: ``prove``: build for the GPU present, the kernels alone and under compute-sanitizer, the
GPU tests, bandwidth against slab width, the time of every BatchNorm of ResNet-50 and DenseNet-121.
``models``: training step and inference. ``compile``: torch.compile of ResNet-50. ``convolutions``:
those of ResNet-50 and DenseNet-121, fused against cuDNN; ``convolutions-compiled``: against
torch.compile too (bench/gpu_convolutions.py, which makes the package's table of the rows in
build/gpu_gate/convolutions.jsonl). A job runs its stages in order and begins none that has no time
left; each stage appends a row of JSON to the output as it ends, a failed one too, and the next
begins. A stage that passed on the same GPU at the same commit is not run again: start the job again
to go on.

It takes torch with CUDA, numpy, triton, nvcc, cmake, ninja and pytest, and no network: nothing is
fetched, and pictures are noise.

Without a GPU nothing is run: the list of what was not, and exit status 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import environment, gpu_convolutions
from bench.convolution_shapes import NETWORKS
from bench.timing import Deadline
from tests.lanes.ptxas import FLAGS, find_nvcc

ROOT = environment.ROOT
BUILD = ROOT / "build" / "gpu_gate"
JOB_SECONDS = 530.0
TAIL = 4000  # characters of output that a row keeps
# The programs of tests/simt/kernels: the cases that are small and run every instance, and whose
# launchers theirs call.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "batch_norm": ("flags", "walks"),
    "batch_norm_slab": ("flags", "shapes"),
    "batch_norm_act_max_pool": ("flags", "shapes"),
    "conv_bn_act": ("flags", "windows", "statistics"),
    "dense_block": ("flags", "statistics"),
    "residual_add": ("flags", "wanted"),
}
ALSO = {
    "batch_norm": ["batch_norm_slab"],
    "batch_norm_slab": ["batch_norm"],
    "batch_norm_act_max_pool": ["batch_norm"],
    "dense_block": ["batch_norm"],
}


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: str  # 9.0
    driver: str


@dataclass(frozen=True)
class Stage:
    """Commands that run one after the other, until one fails."""

    name: str
    what: str
    seconds: float  # at most
    commands: Callable[[Gpu], list[list[str]]]
    variables: dict[str, str] = field(default_factory=dict)


def find_gpu() -> Gpu | None:
    """The first GPU that the driver names."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return Gpu(*(part.strip() for part in lines[0].split(","))) if lines else None


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def build_extension(gpu: Gpu) -> list[list[str]]:
    """First the build itself, in sight; then pip finds it done. Nothing is fetched."""
    setting = ["env", f"TORCH_CUDA_ARCH_LIST={gpu.capability}"]
    install = ("-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps")
    return [
        [*setting, *python("setup.py", "--quiet", "build_ext", "--inplace")],
        [*setting, *python(*install, "--editable", ".")],
    ]


def program(op: str) -> Path:
    """The checks of tests/simt/kernels, compiled for the GPU instead of the emulator."""
    return BUILD / op


def build_programs(gpu: Gpu) -> list[list[str]]:
    """By ninja: every file once, as many at a time as there are cores; started again, the rest."""
    architecture = f"-arch=sm_{gpu.capability.replace('.', '')}"
    # Before those of FLAGS: csrc has headers of the same names, for torch.
    includes = [f"-I{ROOT / folder}" for folder in ("csrc/cuda", "tests/simt")]
    nvcc = find_nvcc() or "nvcc"
    compiled = shlex.join([nvcc, *includes, *FLAGS, architecture, "-x", "cu"])
    folder = BUILD.relative_to(ROOT)  # ninja runs in ROOT
    rules = [
        f"builddir = {folder}",
        "rule compile",
        f"  command = {compiled} -MD -MT $out -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join([nvcc, architecture])} $in -o $out",
    ]
    objects: dict[str, str] = {}
    for op in PROGRAMS:
        sources = [f"tests/simt/kernels/{op}.cpp"]
        sources += [f"csrc/cuda/{launchers}.cu" for launchers in (op, *ALSO.get(op, []))]
        objects |= {source: f"{folder / Path(source).name}.o" for source in sources}
        inputs = " ".join(objects[source] for source in sources)
        rules.append(f"build {program(op).relative_to(ROOT)}: link {inputs}")
    rules += [f"build {made}: compile {source}" for source, made in objects.items()]
    BUILD.mkdir(parents=True, exist_ok=True)
    described = BUILD / f"programs-{architecture[1:].partition('=')[2]}.ninja"
    described.write_text("\n".join(rules) + "\n")
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return [[shutil.which("ninja", path=beside) or "ninja", "-f", str(described)]]


def run_programs(gpu: Gpu) -> list[list[str]]:
    return [[str(program(op))] for op in PROGRAMS]


def slab_bandwidth(gpu: Gpu) -> list[list[str]]:
    """The experiment of bench/slab_bandwidth.cu, whose table is the row's output."""
    binary = str(BUILD / "slab_bandwidth")
    architecture = gpu.capability.replace(".", "")
    command = [find_nvcc() or "nvcc", *FLAGS, f"-arch=sm_{architecture}"]
    command += [str(ROOT / "bench/slab_bandwidth.cu"), "-o", binary]
    return [["mkdir", "-p", str(BUILD)], command, [binary]]


def compile_triton(gpu: Gpu) -> list[list[str]]:
    return [python("-m", "bench.compile_triton", gpu.capability.replace(".", ""))]


# Before everything that launches such kernels: a job may come to a machine of its own.
TRITON = Stage("triton", "compile Triton kernels in a process pool", 300, compile_triton)


def time_ops(layout: str) -> Callable[[Gpu], list[list[str]]]:
    """Rows of their own, appended as they are found: a second run goes on where the first ended."""
    rows = ("--output", str(BUILD / "batch_norm_times.jsonl"))
    which = ("--layout", layout, "--seconds", "470")
    return lambda gpu: [python("-m", "bench.ops.gpu_batch_norm", *which, *rows)]


def sanitize(tool: str) -> Callable[[Gpu], list[list[str]]]:
    """All instances at small sizes under a tool of compute-sanitizer."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    return lambda gpu: [
        [*command, str(program(op)), case] for op, cases in PROGRAMS.items() for case in cases
    ]


def pytest(*arguments: str) -> list[str]:
    """The slow tests too; without pyproject's --strict-config, which asks for pytest-timeout."""
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *arguments)


def bench(*arguments: str) -> Callable[[Gpu], list[list[str]]]:
    output = str(BUILD / "results")
    # The photographs come with packages that such a machine may not have.
    command = python("-m", "bench", *arguments, "--noise", "--device", "cuda", "--output", output)
    return lambda gpu: [command]


def convolutions(*more: str) -> tuple[Stage, ...]:
    """The kernels, then a stage per network, batch size and phase; each goes on where it was
    stopped."""

    def stage(network: str, batch: int, phase: str) -> Stage:
        which = ("--network", network, "--batch", str(batch), "--phase", phase)
        rows = ("--output", str(BUILD / "convolutions.jsonl"))
        command = python("-m", "bench.gpu_convolutions", "measure", *which, *rows, *more)
        what = f"{phase} of every convolution of {network} at batch {batch}, against cuDNN"
        return Stage(f"{network} {batch} {phase}", what, 500, lambda gpu: [command])

    which = itertools.product(NETWORKS, gpu_convolutions.BATCHES, gpu_convolutions.PHASES)
    return (TRITON, *(stage(*names) for names in which))


_BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1"}  # the programs read results right after a launch
_NATIVE = {"RESOPS_BACKEND": "native"}  # on a GPU ``auto`` does not take these kernels yet
JOBS: dict[str, tuple[Stage, ...]] = {
    "prove": (
        Stage("build", "the extension, for this GPU", 300, build_extension, {"RESOPS_CUDA": "1"}),
        TRITON,
        Stage("programs", "compile torch-free programs that run every kernel", 300, build_programs),
        Stage("kernels", "every kernel against float64, rule R", 300, run_programs, _BLOCKING),
        *(
            Stage(tool, f"every kernel under {tool}", 300, sanitize(tool), _BLOCKING)
            for tool in ("memcheck", "racecheck", "initcheck")
        ),
        Stage(
            "values",
            "the ops in every layout and dtype, rule R",
            400,
            lambda gpu: [pytest("tests/simt/test_bindings.py", "-k", "cuda")],
        ),
        Stage(
            "surroundings",
            "opcheck, torch.compile, CUDA graphs, streams, more than 2^31 elements",
            400,
            lambda gpu: [pytest("tests/gpu")],
        ),
        Stage("slab bandwidth", "GB/s against the width of a slab", 200, slab_bandwidth),
        Stage(
            "times",
            "every BatchNorm of ResNet-50 and DenseNet-121 against eager and torch.compile, bf16 "
            "and fp16: microseconds, GB/s, share of a copy's",
            500,
            time_ops("channels-last"),
        ),
        Stage(
            "contiguous times",
            "every BatchNorm of ResNet-50 and one of large images, contiguous, in the same way",
            500,
            time_ops("contiguous"),
        ),
        Stage(
            "convolutions",
            "every convolution of ResNet-50 with prologue, epilogue and statistics against cuDNN",
            500,
            lambda gpu: [python("-m", "bench.ops.conv_bn_act_gpu")],
        ),
    ),
    "models": (
        TRITON,
        *(
            Stage(
                f"batch {batch}",
                f"training step and inference of ResNets at batch {batch}, bf16 and fp16",
                500,
                bench("models", "--batch", str(batch), "--dtypes", "bf16,fp16"),
                _NATIVE,
            )
            for batch in (32, 256)
        ),
        *(
            Stage(
                f"densenet121 {backend}",
                "training step and inference of DenseNet-121 at batch 128, bf16 and fp16, the "
                f"kernels of its blocks {backend}; bytes moved and saved",
                500,
                bench("densenet", "--batch", "128", "--dtypes", "bf16,fp16"),
                {"RESOPS_BACKEND": backend},
            )
            for backend in ("native", "triton")
        ),
    ),
    "compile": (
        Stage(
            "torch.compile",
            "ResNet-50 against torch.compile's max-autotune at batch 256, bf16",
            500,
            bench(
                "models",
                *("--models", "resnet50", "--compile", "max-autotune"),
                *("--batch", "256", "--dtypes", "bf16"),
            ),
            _NATIVE,
        ),
        Stage(
            "densenet121",
            "DenseNet-121 against torch.compile's max-autotune at batch 128, bf16",
            500,
            bench(
                "densenet",
                *("--compile", "max-autotune"),
                *("--batch", "128", "--dtypes", "bf16"),
            ),
            _NATIVE,
        ),
    ),
    "convolutions": convolutions(),
    "convolutions-compiled": convolutions("--compile"),
}


def run_stage(stage: Stage, gpu: Gpu, seconds: float) -> dict[str, Any]:
    """A row: ``status`` is "passed", "failed" or "out of time"."""
    begin = time.monotonic()
    status, code, output, command = "passed", 0, "", []
    for command in stage.commands(gpu):
        left = seconds - (time.monotonic() - begin)
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **stage.variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=max(left, 1.0),
            )
            code, text = done.returncode, done.stdout
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired as late:
            text = late.stdout.decode(errors="replace") if late.stdout else ""
            status = "out of time"
        except OSError as error:  # the tool is not there
            text, status = str(error), "failed"
        output += text
        if status != "passed":
            break
    row: dict[str, Any] = {"stage": stage.name, "status": status}
    row["seconds"] = round(time.monotonic() - begin, 1)
    if status != "passed":
        row |= {"command": command, "exit status": code}
    return row | {"output": output[-TAIL:]}


def passed_before(output: Path, job: str, facts: dict[str, Any]) -> set[str]:
    """Stages of the job that passed on this GPU at this commit, by the rows in ``output``."""
    if not output.exists() or facts["commit"]["changed"]:
        return set()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return {
        row["stage"]
        for row in rows
        if row["job"] == job
        and row["status"] == "passed"
        and (row["gpu"], row["commit"]) == (facts["gpu"], facts["commit"])
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_gate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--stage", action="append", help="only this one; may be given again")
    parser.add_argument("--again", action="store_true", help="stages that passed before too")
    parser.add_argument("--output", type=Path, default=BUILD / "rows.jsonl")
    options = parser.parse_args(arguments)
    names = [stage.name for stage in JOBS[options.job]]
    if unknown := set(options.stage or ()) - set(names):
        parser.error(f"{options.job} has the stages {', '.join(names)}, not {', '.join(unknown)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 where all stages passed, or where there is no GPU; else 1."""
    options = parse(arguments)
    stages = [s for s in JOBS[options.job] if not options.stage or s.name in options.stage]
    gpu = find_gpu()
    if gpu is None:
        print("There is no GPU here. Not run:")
        for stage in stages:
            print(f"  {options.job} {stage.name}: {stage.what}")
        return 0
    deadline = Deadline(JOB_SECONDS)
    facts = {"gpu": gpu.name, "driver": gpu.driver, "commit": environment.commit()}
    done = set() if options.again else passed_before(options.output, options.job, facts)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    missing = []
    for stage in stages:
        if stage.name in done:
            print(f"{stage.name}: passed before", flush=True)
            continue
        if deadline.left() < 30:
            missing.append(stage.name)
            continue
        row = run_stage(stage, gpu, min(stage.seconds, deadline.left()))
        with options.output.open("a") as file:
            file.write(json.dumps({"job": options.job, **facts, **row}) + "\n")
        print(f"{stage.name}: {row['status']} in {row['seconds']} s", flush=True)
        if row["status"] != "passed":
            print(row["output"], flush=True)
            missing.append(stage.name)
    if missing:
        print(f"not passed: {', '.join(missing)}; start it again to run these")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
