"""What is there and what is not, and why: ``python -m resops.info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from . import _dispatch, _native
from ._version import __version__

__all__ = ["__version__", "environment", "show_env"]


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> tuple[list[str], str | None]:
    """Names of the GPUs that torch can use, and why there are none."""
    if torch.version.cuda is None:
        return [], f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return [], f"torch {torch.__version__} finds no usable GPU or driver; see `nvidia-smi`"
    names = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        names.append(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    return names, None


def _capability() -> tuple[str | None, list[str]]:
    """The instruction set in use, or why it cannot be named, and those that can run here."""
    if _native.module is None:
        return None, []
    names = _native.module.cpu_capabilities()
    try:
        return _native.module.cpu_capability(), names
    except ValueError as error:  # RESOPS_CPU_CAPABILITY holds an unknown name
        return f"none: {error}", names


def _backends() -> dict[str, dict[str, str]]:
    """For each op and backend: ``"cpu"`` (its device types), or ``"no: ..."`` with the reason."""
    kernels = _dispatch._KERNELS
    table: dict[str, dict[str, str]] = {}
    for op in sorted({op for ops in kernels.values() for op in ops}):
        table[op] = {}
        for backend in _dispatch.BACKENDS:
            reason = _dispatch.unavailable_reason(backend, op)
            devices = kernels.get(backend, {}).get(op)
            works = ", ".join(sorted(devices)) if devices else "every device"
            table[op][backend] = works if reason is None else f"no: {reason}"
    return table


def environment() -> dict[str, Any]:
    """What :func:`show_env` prints, as a dict that JSON can hold.

    Returns:
        ``versions`` (package to version or None), ``platform``, ``processor``, ``cores`` (that this
        process may use), ``threads`` (of torch and of the CPU kernels), ``gpus``, ``gpus_missing``
        (why there are none, or None), ``native`` (the facts of the build, or None),
        ``native_missing`` (why there is none, or None), ``cpu_capability`` and
        ``cpu_capabilities`` (instruction sets: in use, usable), ``backend`` (the one chosen),
        ``backends`` (op to backend to its devices, or to "no: " and the reason).
    """
    gpus, gpus_missing = _gpus()
    capability, capabilities = _capability()
    packages = ("torch", "triton", "numpy")
    return {
        "versions": {
            "resops": __version__,
            "python": platform.python_version(),
            **{name: _installed(name) for name in packages},
        },
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "gpus_missing": gpus_missing,
        "native": None if _native.module is None else _native.module.build_info(),
        "native_missing": _native.error,
        "cpu_capability": capability,
        "cpu_capabilities": capabilities,
        "backend": _dispatch.get_backend(),
        "backends": _backends(),
    }


def _print_section(title: str, rows: dict[str, object]) -> None:
    print(title)
    for key, value in rows.items():
        print(f"  {key + ':':<20} {value}")


def show_env() -> None:
    """Print versions, devices, what was built, and which backend can do which op, or why not."""
    facts = environment()
    missing = "not installed; `pip install {}` adds it"
    _print_section(
        "Versions",
        {name: found or missing.format(name) for name, found in facts["versions"].items()},
    )
    cpu = f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads"
    gpus = "; ".join(facts["gpus"]) or f"none: {facts['gpus_missing']}"
    _print_section("Devices", {"platform": facts["platform"], "CPU": cpu, "GPU": gpus})
    if facts["native"] is None:
        _print_section("C++ extension", {"not loaded": facts["native_missing"]})
    else:
        in_use = f"{facts['cpu_capability']} (of {', '.join(facts['cpu_capabilities'])})"
        _print_section("C++ extension", {**facts["native"], "in use": in_use})
    for op, backends in facts["backends"].items():
        _print_section(f"Backends of {op}", backends)
    print(f"Backend chosen: {facts['backend']}")


if __name__ == "__main__":
    show_env()
