"""The compile check of the CUDA kernels: registers, stack and spills, per architecture.

    python tests/lanes/ptxas.py [--all] [--release] [--built LIBRARY] [ARCHITECTURE ...]

compiles every file of csrc/cuda, and the CUDA programs of bench, with nvcc for each architecture
(80, 90a and 120) and prints what ptxas says, one row per kernel, or with ``--all`` per instance.
``--built`` is an extension that was built with CUDA: what it has is read from it, not compiled
again. The lane fails where a kernel that walks over tensors spills, uses the stack, or has more
registers than leave room for two blocks on a multiprocessor; and, where cuobjdump is (that of the
CUDA toolkit or of the package triton), where the machine code of one that is compiled for vectors
has no 16-byte loads or stores, or that of a convolution does not multiply on tensor cores.
``--release`` adds the other architectures of a release, for which two files are compiled, the
convolution and ``residual_add``; the others take too long for a lane, but what differs there from
the three is not in our source. No GPU is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path for folder in ("csrc/cuda", "bench") for path in sorted((ROOT / folder).glob("*.cu"))
]
ARCHITECTURES = ("80", "90a", "120")
# The others that a release has code for (docs/architecture.md), and what is compiled for them: one
# file that is quick, and the one that is short of registers.
RELEASE = ("86", "89", "100")
RELEASE_SOURCES = [ROOT / "csrc" / "cuda" / f"{op}.cu" for op in ("residual_add", "conv_bn_act")]
BUILD = ROOT / "build" / "ptxas"
# As in CMakeLists.txt.
FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-fmad=false"]
FLAGS += [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/cuda")]
MOST_REGISTERS = 128  # 65536 of a multiprocessor, for two blocks of 256 threads


@dataclass(frozen=True)
class Kernel:
    """One instance of a __global__ function for one architecture; bytes but for registers."""

    architecture: str
    name: str
    arguments: str  # of the template
    registers: int
    stack: int
    spill_stores: int  # bytes; of a built library, instructions
    spill_loads: int
    wide_loads: int | None  # instructions that load 16 bytes; None: there is no cuobjdump
    wide_stores: int | None
    matrix_products: int | None  # instructions of tensor cores

    @property
    def is_hot(self) -> bool:
        """It walks over tensors, not over a few numbers per channel."""
        return not self.name.endswith(("_finish_kernel", "_frozen_kernel"))

    @property
    def spilled(self) -> int:
        return self.spill_stores + self.spill_loads

    @property
    def vector(self) -> int:
        """Elements of an access, the first number among the arguments; 0 where it is not hot."""
        numbers = re.findall(r", (\d+)", self.arguments)
        return int(numbers[0]) if self.is_hot and numbers else 0

    @property
    def is_for_wide_accesses(self) -> bool:
        """Of its type, the first argument. Fewer bytes are for rows that are not whole vectors."""
        size = 4 if self.arguments.startswith("float,") else 2
        return self.vector > 1 and self.vector * size >= 16

    @property
    def is_narrow(self) -> bool:
        if not self.is_for_wide_accesses:
            return False
        writes = not self.name.endswith(("_statistics_kernel", "_reduce_kernel"))
        return self.wide_loads == 0 or (writes and self.wide_stores == 0)

    @property
    def is_without_tensor_cores(self) -> bool:
        return self.name.startswith("conv_") and self.matrix_products == 0

    @property
    def is_bad(self) -> bool:
        too_large = self.spilled > 0 or self.stack > 0 or self.registers > MOST_REGISTERS
        return self.is_hot and (too_large or self.is_narrow or self.is_without_tensor_cores)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    paths = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    return next(filter(None, map(shutil.which, [*paths, "nvcc", "/usr/local/cuda/bin/nvcc"])), None)


def find_cuobjdump() -> str | None:
    """That of the toolkit, else the one that the package triton brings along, with nvdisasm."""
    nvcc, spec = find_nvcc(), importlib.util.find_spec("triton")
    folders = [str(Path(nvcc).resolve().parent)] if nvcc else []
    if spec is not None and spec.origin is not None:
        folders.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    folders.append(os.environ.get("PATH", ""))
    for folder in folders:
        tool = shutil.which("cuobjdump", path=folder)
        if tool is not None and shutil.which("nvdisasm", path=_folder(tool)):
            return tool
    return None


def _folder(tool: str) -> str:
    return str(Path(tool).parent)


# 16-byte loads (LDGSTS: into shared memory), 16-byte stores, products of matrices; stores to and
# loads from local memory.
_INSTRUCTIONS = (r"LDG(STS)?\.E(\.\w+)*\.128", r"STG\.E\.128", r"HMMA", r"STL", r"LDL")


def instructions(cubin: Path) -> dict[str, tuple[int, ...]] | None:
    """How many _INSTRUCTIONS the machine code of each function has; None without cuobjdump."""
    if find_cuobjdump() is None:
        return None
    counts: dict[str, tuple[int, ...]] = {}
    for function in cuobjdump("-sass", str(cubin)).split("Function : ")[1:]:
        counts[function.split(maxsplit=1)[0]] = tuple(
            sum(1 for _ in re.finditer(rf"\b{op}\b", function)) for op in _INSTRUCTIONS
        )
    return counts


def cuobjdump(*arguments: str, folder: Path | None = None) -> str:
    """What it prints, run in ``folder``."""
    tool = find_cuobjdump()
    if tool is None:
        raise RuntimeError("no cuobjdump beside nvcc, in the package triton or in PATH")
    environment = {**os.environ, "PATH": f"{_folder(tool)}:{os.environ.get('PATH', '')}"}
    return run([tool, *arguments], environment, folder)


def built_kernels(library: Path) -> list[Kernel]:
    """The kernels that an extension has machine code of.

    Raises:
        RuntimeError: there is no cuobjdump, or the library has no CUDA code.
    """
    with tempfile.TemporaryDirectory() as folder:
        cuobjdump("-xelf", "all", str(library.resolve()), folder=Path(folder))
        with ThreadPoolExecutor(workers()) as pool:
            cubins = sorted(Path(folder).glob("*.cubin"))
            found = [k for kernels in pool.map(_disassembled, cubins) for k in kernels]
    if not found:
        raise RuntimeError(f"{library} has no CUDA code")
    return found


def _disassembled(cubin: Path) -> list[Kernel]:
    number = cubin.name.rsplit(".sm_", 1)[1].removesuffix(".cubin")
    architecture = {"90": "90a"}.get(number, number)  # the name has no letter
    counts = instructions(cubin)
    assert counts is not None
    resources = dict(re.findall(r"Function (\w+):\s+(REG:.*)", cuobjdump("-res-usage", str(cubin))))
    found = []
    for name, readable in zip(resources, demangled(list(resources)), strict=True):
        used = dict(re.findall(r"(REG|STACK):(\d+)", resources[name]))
        *counted, stores, loads = counts[name]
        numbers = (int(used["REG"]), int(used["STACK"]), stores, loads)
        found.append(_kernel(architecture, readable, numbers, counted))
    return found


def _kernel(
    architecture: str, name: str, numbers: Sequence[int], counted: Sequence[int | None]
) -> Kernel:
    match = re.search(r"(\w+)(?:<(.*)>)?\(", name)
    kernel, arguments = (match[1], match[2] or "") if match else (name, "")
    arguments = re.sub(r"\((bool|int|resops::Activation)\)", "", arguments)
    return Kernel(architecture, kernel, arguments, *numbers, *counted)


def compile_kernels(source: Path, architecture: str) -> list[Kernel]:
    """The kernels of one .cu file. What was compiled before is not compiled again.

    Raises:
        RuntimeError: nvcc is not there or fails; with its output.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda")
    command = [nvcc, *FLAGS, f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-Xptxas", "-v", "-cubin", str(source)]
    folders = (ROOT / "csrc" / "common", ROOT / "csrc" / "cuda")  # all that kernels include
    headers = [p for folder in folders for p in folder.glob("*") if p.suffix in (".h", ".cuh")]
    key = hashlib.sha256(repr(command).encode() + run([nvcc, "--version"]).encode())
    for path in sorted([source, *headers]):
        key.update(path.read_bytes())
    report = BUILD / f"{source.stem}-{architecture}-{key.hexdigest()[:12]}.txt"
    if not report.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        temporary = report.with_suffix(f".{os.getpid()}")
        temporary.write_text(run([*command, "-o", str(report.with_suffix(".cubin"))]))
        temporary.replace(report)
    return parse(report.read_text(), architecture, instructions(report.with_suffix(".cubin")))


def workers() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def run(
    command: list[str], environment: dict[str, str] | None = None, folder: Path | None = None
) -> str:
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def parse(
    report: str, architecture: str, counts: dict[str, tuple[int, ...]] | None = None
) -> list[Kernel]:
    """The kernels that a report of ``ptxas -v`` names, with their :func:`instructions`."""
    entries = list(_ENTRY.finditer(report))
    found = []
    for entry, name in zip(entries, demangled([e["name"] for e in entries]), strict=True):
        numbers = [int(entry[k]) for k in ("registers", "stack", "stores", "loads")]
        counted = (None, None, None) if counts is None else counts[entry["name"]][:3]
        found.append(_kernel(architecture, name, numbers, counted))
    return found


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return names
    text = "\n".join(names)
    done = subprocess.run([tool], input=text, capture_output=True, text=True, check=True)
    # Up to the parameters of the function: they have templates and parentheses of their own.
    return [re.sub(r"\(resops::cuda::.*|\(long.*", "(", line) for line in done.stdout.splitlines()]


def table(found: Iterable[Kernel], every_instance: bool = False) -> str:
    """Rows of text; unless ``every_instance``, the instances of a kernel share one."""
    groups: dict[tuple[str, str, str], list[Kernel]] = {}
    for k in found:
        key = (k.name, k.arguments if every_instance else "", k.architecture)
        groups.setdefault(key, []).append(k)
    title = ("kernel", "sm", "instances", "registers", "stack", "spilled", "16-byte")
    rows = ["{:<62} {:>4} {:>9} {:>9} {:>5} {:>7} {:>8}".format(*title)]
    for (name, arguments, architecture), ks in sorted(groups.items()):
        registers = sorted({min(k.registers for k in ks), max(k.registers for k in ks)})
        label = f"{name}<{arguments}>" if arguments else name
        rows.append(
            f"{label:<62} {architecture:>4} {len(ks):>9} {'-'.join(map(str, registers)):>9} "
            f"{max(k.stack for k in ks):>5} {max(k.spilled for k in ks):>7} {_width(ks):>8}"
        )
    return "\n".join(rows)


def _width(kernels: list[Kernel]) -> str:
    vectors = [k for k in kernels if k.is_for_wide_accesses]
    if not vectors or vectors[0].wide_loads is None:
        return ""
    return "no" if any(k.is_narrow for k in vectors) else "yes"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, metavar="ARCHITECTURE")
    parser.add_argument("--all", action="store_true", help="a row for every instance")
    parser.add_argument("--release", action="store_true", help="the architectures of a release too")
    parser.add_argument("--built", type=Path, metavar="LIBRARY", help="an extension with CUDA")
    options = parser.parse_args()
    if find_nvcc() is None:
        print("no nvcc on this machine: nothing was checked")
        return 0
    found = [] if options.built is None else built_kernels(options.built)
    built = {k.architecture for k in found}
    jobs = [
        (source, a)
        for a in options.architectures
        for source in SOURCES
        if a not in built or source.parent.name == "bench"
    ]
    if options.release:
        more = [a for a in RELEASE if a not in options.architectures]
        jobs += [(source, a) for a in more for source in RELEASE_SOURCES]
    with ThreadPoolExecutor(workers()) as pool:
        found += [k for ks in pool.map(lambda job: compile_kernels(*job), jobs) for k in ks]
    print(table(found, options.all))
    defined = {
        name
        for path in (ROOT / "csrc" / "cuda").glob("*.cuh")
        for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", path.read_text())
    }
    if not_seen := defined - {k.name for k in found}:
        print(f"\nin csrc/cuda, but not in what ptxas reports: {', '.join(sorted(not_seen))}")
        return 1
    if bad := [k for k in found if k.is_bad]:
        print(
            f"\nspills, stack, more than {MOST_REGISTERS} registers, no 16-byte accesses or no "
            "tensor cores, in kernels that walk over tensors:"
        )
        print(table(bad, every_instance=True))
        return 1
    print(f"\n{len(found)} instances; no spills in the kernels that walk over tensors")
    if find_cuobjdump() is None:
        print("no cuobjdump: the width of accesses was not looked at")
    return 0


if __name__ == "__main__":
    sys.exit(main())
