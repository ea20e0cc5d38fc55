"""torch.ops.resops_simt: the CUDA bindings, launchers and kernels as ops on CPU tensors.

The bindings of csrc/cuda/bindings are compiled for the emulator and registered for the CPU, with
the schemas and checks of csrc/<op>.cpp, in a namespace of their own beside the CPU kernels' ops.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from . import emulator

_TORCH = Path(torch.__path__[0])
_CSRC = emulator.ROOT / "csrc"
OPS = ("batch_norm", "batch_norm_act_max_pool", "conv_bn_act", "dense_block", "residual_add")
# conv_bn_act stages tiles in shared memory: as much as every GPU has without asking.
_SHARED_BYTES = 48 * 1024


@functools.cache
def load() -> Any:
    """The namespace of ops. Raises ``RuntimeError`` with the compiler's output."""
    sources = [
        *(emulator.FOLDER / name for name in ("simt.cpp", "limits.cpp")),
        *(_CSRC / f"{op}.cpp" for op in OPS),
        *(path for path in sorted((_CSRC / "cuda").glob("*.cu")) if path.stem != "device"),
        *(_CSRC / "cuda" / "bindings" / f"{op}.cpp" for op in OPS),
    ]
    includes = [_TORCH / "include", _TORCH / "include/torch/csrc/api/include"]
    flags = ["-O1", "-fPIC", "-Dresops=resops_simt", f"-I{_CSRC}"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    for folder in includes:
        flags += ["-isystem", str(folder)]
    objects = emulator.compile_objects([(source, flags) for source in sources], "torch")
    key = hashlib.sha256("".join(f"{o}{o.stat().st_mtime_ns}" for o in objects).encode())
    library = emulator.BUILD / "torch" / f"resops_simt-{key.hexdigest()[:12]}.so"
    if not library.exists():
        libraries = [f"-l{name}" for name in ("c10", "torch", "torch_cpu")]
        temporary = library.with_suffix(".new")
        emulator._compile(
            ["-shared", *map(str, objects), f"-L{_TORCH / 'lib'}", *libraries, "-o", str(temporary)]
        )
        temporary.replace(library)
    os.environ.setdefault("RESOPS_SIMT_SHARED", str(_SHARED_BYTES))
    torch.ops.load_library(str(library))
    return torch.ops.resops_simt
