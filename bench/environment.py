"""Where a number comes from: machine, versions, settings, commit. And the allocator's settings."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

# glibc gives large blocks back to the system when they are freed, so that a training step would
# fault in all its pages again and measure that. The settings hold for every provider alike.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
_MARK = "RESOPS_BENCH_ALLOCATOR_SET"


def restart_with_allocator_settings(arguments: list[str], module: str = "bench") -> None:
    """Start ``python -m <module>`` again with MALLOC set: glibc reads it when a process starts.

    Does nothing where it is set already, or where there is no glibc.
    """
    if os.environ.get(_MARK) or not sys.platform.startswith("linux"):
        return
    environment = {**MALLOC, **os.environ, _MARK: "1"}  # what the user set stays
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def caches() -> dict[str, str]:
    """Cache sizes as the kernel tells them; a virtual machine may show its host's whole L3."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(f"{index}/{name}") for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            found[f"L{level}"] = size
    return found


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> dict[str, Any]:
    """Hash of the checked-out commit, and whether files differ from it (results do not count)."""
    changed = _output("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return {"hash": _output("git", "rev-parse", "HEAD"), "changed": bool(changed)}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def slug(device: torch.device) -> str:
    """The device in a form that a file name can have: ``intel-xeon-processor``."""
    name = re.sub(r"\((r|tm)\)", "", device_name(device).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _cuda(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": query.splitlines()[0] if query else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """Everything that somebody who doubts a number would ask for, as JSON can hold it."""
    import resops
    import resops.info

    facts = resops.info.environment()
    prefixes = ("MALLOC_", "OMP_", "KMP_", "MKL_", "LD_PRELOAD", "RESOPS_", "DNNL_", "ONEDNN_")
    settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)}
    settings.pop(_MARK, None)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(device),
        "cpu": cpu_model(),
        "cores": cores(),
        "caches": caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": os.getloadavg()[0],
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "gpu": _cuda(device),
        "platform": facts["platform"],
        "versions": facts["versions"],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "resops_capability": facts["cpu_capability"],
        "resops_native": facts["native"],
        "resops_native_missing": facts["native_missing"],
        "resops_backend": facts["backend"],
        "settings": settings,
    }
