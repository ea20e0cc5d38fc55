"""Which backend computes a call, and why another one cannot.

Three backends implement every op: ``native`` (the C++ kernels of ``csrc``, registered as
``torch.ops.resops``), ``triton`` (``triton_kernels``) and ``reference`` (plain PyTorch, the
definition). ``auto`` takes the native kernels on the devices on which they were measured, and the
reference elsewhere; a backend that was asked for by name and cannot do the call raises
:class:`BackendError`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

from . import _native, _triton

BACKENDS = ("native", "triton", "reference")
_CHOICES = ("auto", *BACKENDS)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# backend -> device type -> dtypes that its kernels take there
_DTYPES: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "native": {"cpu": (*_GPU_DTYPES, torch.float64), "cuda": _GPU_DTYPES},
    "triton": {"cpu": _GPU_DTYPES, "cuda": _GPU_DTYPES},
}
# Where ``auto`` takes kernels. On a GPU they have not been run yet (docs/simt.md), so there they
# wait for somebody to ask for them by name.
_MEASURED_ON = frozenset({"cpu"})


def _native_devices() -> frozenset[str]:
    """Device types that the extension has kernels for: CUDA is an option of the build."""
    if _native.module is None or _native.module.build_info()["cuda architectures"] == "none":
        return frozenset({"cpu"})
    return frozenset({"cpu", "cuda"})


# op -> device types for which the backend has kernels. The reference takes everything.
_KERNELS: dict[str, dict[str, frozenset[str]]] = {
    "native": {
        "batch_norm": _native_devices(),
        "batch_norm_act_max_pool": _native_devices(),
        "dense_block": _native_devices(),
        "residual_add": _native_devices(),
        "conv_bn_act": _native_devices(),
    },
    "triton": {
        "batch_norm": _triton.DEVICES,
        "residual_add": _triton.DEVICES,
        "conv_bn_act": _triton.DEVICES,
        "dense_block": _triton.DEVICES,
    },
}


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot do this call; the message says why."""


class _State(threading.local):
    # A threading.local, not a ContextVar: torch.compile(fullgraph=True) can read the former only.
    def __init__(self) -> None:
        self.backend = _default


def _checked(name: str, source: str) -> str:
    if name not in _CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(_CHOICES)}, but got {name!r}")
    return name


_default = _checked(os.environ.get("RESOPS_BACKEND", "auto"), "RESOPS_BACKEND")
_state = _State()


def get_backend() -> str:
    """The backend chosen for this thread: ``auto``, ``native``, ``triton`` or ``reference``."""
    return _state.backend


def set_backend(name: str) -> None:
    """Choose the backend of all later calls, in this thread and in threads started later.

    Args:
        name: ``auto`` (the native kernels on a CPU, and the reference elsewhere, as long as no
            kernel has been measured on a GPU), ``native``, ``triton`` or ``reference``.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _default
    _default = _state.backend = _checked(name, "backend")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block, in this thread only.

    The choice made in a forward pass is kept for its backward pass, wherever that runs.

    Raises:
        ValueError: ``name`` is not a backend.
    """
    before = _state.backend
    _state.backend = _checked(name, "backend")
    try:
        yield
    finally:
        _state.backend = before


def unavailable_reason(backend: str, op: str | None = None) -> str | None:
    """Why ``backend`` cannot compute ``op`` (or anything) in this installation; None if it can."""
    if backend == "reference":
        return None
    if backend == "native" and _native.error is not None:
        return _native.error
    if backend == "triton" and _triton.error is not None:
        return _triton.error
    if not _KERNELS[backend]:
        return f"this version of resops has no {backend} kernels"
    if op is not None and op not in _KERNELS[backend]:
        return f"this version of resops has no {backend} kernel for {op}"
    return None


def _device_type(x: torch.Tensor) -> str:
    """``x.device.type``, which takes half a microsecond to find: a tenth of it on a CPU."""
    return "cpu" if x.is_cpu else x.device.type


def refusal(backend: str, op: str, x: torch.Tensor) -> str | None:
    """Why ``backend`` cannot compute ``op`` on an input like ``x``; None if it can."""
    if backend == "reference":
        return None
    devices = _KERNELS[backend].get(op)
    native = backend == "native"
    if devices is None or (_native.error if native else _triton.error) is not None:
        return unavailable_reason(backend, op)
    device = _device_type(x)
    if device not in devices:
        reason = f"the {backend} {op} has no kernel for {device} tensors"
        if (backend, device) == ("native", "cuda"):
            reason += _without_cuda()
        elif (backend, device) == ("triton", "cpu"):
            reason += ", unless TRITON_INTERPRET=1 is set when Python starts (slow, for tests)"
        return reason
    if x.dtype not in _DTYPES[backend][device]:
        return f"the {backend} {op} does not take {x.dtype} on {device}"
    return None


def _without_cuda() -> str:
    """Why the extension has no CUDA kernels, and what to do: the rest of a sentence."""
    assert _native.module is not None
    return (
        f": the extension was built without CUDA ({_native.module.build_info()['cuda']}); "
        "with nvcc, run `RESOPS_CUDA=1 pip install --no-build-isolation .` in the source tree"
    )


def choose(op: str, x: torch.Tensor) -> str:
    """The backend that computes ``op`` on ``x`` under the present setting.

    Raises:
        BackendError: a backend was chosen by name and cannot do the call.
    """
    wanted = _state.backend
    if wanted == "auto":
        measured = _device_type(x) in _MEASURED_ON
        return "native" if measured and refusal("native", op, x) is None else "reference"
    reason = refusal(wanted, op, x)
    if reason is not None:
        raise BackendError(f"backend {wanted!r} cannot compute {op}: {reason}")
    return wanted
