"""Builds and packages resops. CMakeLists.txt describes the native build; this file drives it.

Environment variables, all optional:
    RESOPS_NATIVE    0: pure Python package, nothing compiled. 1: stop if there is no C++ compiler.
                     Unset: compile if there is a C++ compiler.
    RESOPS_CUDA      0: no CUDA. 1: stop if there is no nvcc. Unset: CUDA if nvcc is found
                     (FORCE_CUDA=1 is RESOPS_CUDA=1).
    TORCH_CUDA_ARCH_LIST  architectures such as "8.0 9.0+PTX"; else those of the GPUs present, else
                     a short list.
    RESOPS_SANITIZE  address, undefined, address,undefined or thread: a sanitized module, in a build
                     folder of its own.
    CXX, CMAKE_ARGS, MAX_JOBS, CUDA_HOME, CUDA_PATH  as usual.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NEED_TORCH = "install torch first, then `pip install --no-build-isolation .`"
# Ampere, Hopper, and PTX for what came after, as CMake writes it: few, so that the build is short.
DEFAULT_ARCHITECTURES = ["80-real", "90a-real", "90-virtual"]


def switch(name: str) -> bool | None:
    """An environment variable that is 0, 1 or unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0, 1 or unset, but got '{value}'")
    return None if value == "" else value == "1"


def find_compiler() -> str | None:
    """The C++ compiler that CMake will take."""
    if os.environ.get("CXX"):
        return shutil.which(shlex.split(os.environ["CXX"])[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def wants_extension() -> bool:
    wanted = switch("RESOPS_NATIVE")
    if wanted is False:
        return False
    if find_compiler() is not None:
        return True
    name = f"(CXX={os.environ['CXX']}) " if os.environ.get("CXX") else ""
    if wanted:
        raise SystemExit(f"resops: no C++ compiler {name}was found; install one, e.g. g++.")
    print(
        f"resops: no C++ compiler {name}was found, so nothing is compiled and the package will "
        "compute with plain PyTorch; for the fast kernels install g++ and then this again.",
        file=sys.stderr,
    )
    return False


def import_torch() -> ModuleType:
    """The torch of this environment, which pip's build isolation hides from sys.path."""
    try:
        import torch
    except ImportError:
        sys.path += [sysconfig.get_path("purelib"), *site.getsitepackages()]
        try:
            import torch
        except ImportError as error:
            raise SystemExit(f"resops: torch cannot be imported ({error}): {NEED_TORCH}") from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        raise SystemExit(f"resops needs torch 2.11 or newer, but found {torch.__version__}.")
    return torch


def tool(name: str) -> str:
    """Path of cmake or ninja: the one that pip installed, else the system's."""
    try:
        package = __import__(name)
    except ImportError:
        found = shutil.which(name)
        if found is None:
            raise SystemExit(f"resops: {name} was not found: run `pip install {name}`.") from None
        return found
    folder = package.CMAKE_BIN_DIR if name == "cmake" else package.BIN_DIR
    return str(Path(folder) / name)


def output_of(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def find_nvcc() -> tuple[str, tuple[int, int]] | None:
    """Path and version of nvcc. torch's own CUDA_HOME is None on a CPU torch, so it is no help."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for nvcc in filter(None, candidates):
        version = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version") or "")
        if version:
            return nvcc, (int(version[1]), int(version[2]))
    return None


def cuda_architectures() -> list[str]:
    """Architectures as CMake writes them: 80-real is machine code only, 80-virtual is PTX."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        query = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        listed = sorted(set((query or "").split()), key=float)
    if not listed:
        return DEFAULT_ARCHITECTURES
    found = []
    for text in listed:
        parts = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", text)
        if parts is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: '{text}' is not like 9.0, 9.0a or 9.0+PTX")
        number = parts[1] + parts[2]
        found += [f"{number}-real", f"{number}-virtual"] if parts[3] else [f"{number}-real"]
    return found


def cuda_options() -> tuple[list[str], str]:
    """CMake definitions for CUDA, and the sentence for the summary."""
    wanted = switch("RESOPS_CUDA")
    if wanted is None:
        wanted = switch("FORCE_CUDA") or None
    nvcc = None if wanted is False else find_nvcc()
    if wanted and nvcc is None:
        raise SystemExit(
            "RESOPS_CUDA=1, but there is no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
        )
    if nvcc is None:
        note = "switched off (RESOPS_CUDA=0)" if wanted is False else "no nvcc found"
        return ["-DRESOPS_NVCC=", f"-DRESOPS_NVCC_NOTE={note}"], note
    path, version = nvcc
    note = f"nvcc {version[0]}.{version[1]} found at {path}"
    return [
        f"-DRESOPS_NVCC={path}",
        f"-DRESOPS_NVCC_NOTE={note}",
        "-DRESOPS_CUDA_ARCHITECTURES=" + ";".join(cuda_architectures()),
    ], note


def pybind11_include(torch_root: Path) -> str:
    """That of the package, else of the copy among torch's headers."""
    try:
        import pybind11
    except ImportError:
        return str(torch_root / "include")
    return str(pybind11.get_include())


class CMakeBuild(build_ext):
    """Runs CMake and ninja in build/<tag>, a fixed folder, so that a rebuild is a short one."""

    def build_extension(self, ext: Extension) -> None:
        torch = import_torch()
        torch_root = Path(torch.__path__[0])
        sanitizer = os.environ.get("RESOPS_SANITIZE", "")
        tag = "-".join(
            filter(
                None,
                (
                    sys.implementation.cache_tag,
                    "torch" + re.sub(r"[^0-9A-Za-z.]", "-", torch.__version__),
                    sysconfig.get_platform(),
                    sanitizer,
                ),
            )
        )
        folder = ROOT / "build" / tag
        product = Path(self.get_ext_fullpath(ext.name)).resolve()
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        includes = [torch_root / "include", torch_root / "include/torch/csrc/api/include"]
        python_includes = [pybind11_include(torch_root), sysconfig.get_path("include")]
        cuda, cuda_note = cuda_options()
        configure = [
            tool("cmake"),
            f"-S{ROOT}",
            f"-B{folder}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DRESOPS_VERSION={self.distribution.get_version()}",
            f"-DRESOPS_OUTPUT_DIR={folder / 'module'}",
            f"-DRESOPS_EXT_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            "-DRESOPS_PYTHON_INCLUDES=" + ";".join(python_includes),
            f"-DRESOPS_TORCH_VERSION={torch.__version__}",
            "-DRESOPS_TORCH_INCLUDES=" + ";".join(map(str, includes)),
            f"-DRESOPS_TORCH_LIB={torch_root / 'lib'}",
            f"-DRESOPS_TORCH_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            f"-DRESOPS_SANITIZE={sanitizer}",
            *cuda,
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        print(f"resops: building in {folder} with {jobs} jobs; CUDA: {cuda_note}", flush=True)
        try:
            subprocess.run(configure, check=True)
            subprocess.run([tool("cmake"), "--build", str(folder), "-j", jobs], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "resops: the native build failed; its messages are above (with pip, add -v). "
                "RESOPS_NATIVE=0 installs the package without it."
            ) from error
        product.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / "module" / product.name, product)
        print_summary(folder, jobs)


def print_summary(folder: Path, jobs: str) -> None:
    facts = [line.partition("=") for line in (folder / "facts.txt").read_text().splitlines()]
    print("\nresops was built:")
    for key, _, value in [*facts, ("MAX_JOBS", "=", jobs), ("build folder", "=", str(folder))]:
        print(f"  {key + ':':<20} {value}")
    print(flush=True)


class CleanBuildPy(build_py):
    """Copies the Python files, and first removes what an earlier build left in the build folder."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "resops", ignore_errors=True)
        super().run()


kernels = ["resops.triton_kernels." + name for name in find_packages("triton_kernels")]
setup(
    packages=[*find_packages(include=["resops*"]), "resops.triton_kernels", *kernels],
    ext_modules=[Extension("resops._C", sources=[])] if wants_extension() else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy},
)
