"""Compiles the Triton kernels that a call would launch, for GPUs that are not there.

The launchers run on CPU tensors of real size with every launch recorded instead of done (memory
from torch.empty that nobody touches costs nothing). Each distinct kernel is then compiled by
Triton and ptxas as it would be on the GPU: same argument types, same specialisation.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

CAPABILITIES = (80, 90, 100)
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """A kernel with the types and constants of one launch; equal ones compile to equal code."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # positions of arguments that are known to be multiples of 16
    label: str = ""

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a launch."""

    launch: Launch
    capability: int
    registers: int
    stack: int  # bytes of local memory, where spilled registers go
    shared: int
    ptx: str

    def widest(self, direction: str) -> int:
        """Bytes of the widest global access ("ld" or "st")."""
        pattern = rf"\b{direction}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b"
        accesses = re.findall(pattern, self.ptx)
        return max(int(n or 1) * int(bits) // 8 for n, bits in accesses)

    def __str__(self) -> str:
        return (
            f"{self.launch.label:<34} sm_{self.capability:<4} {self.launch.name:<38} "
            f"{self.registers:>3} registers {self.stack:>3} bytes of stack {self.shared:>5} of "
            f"shared memory"
        )


def _describe(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    names = [p.name for p in kernel.params]
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, divisible = [], [], []
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if isinstance(value, Tensor):
            kind = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.append(position)
        elif parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            kind = "constexpr"
            constants.append((parameter.name, value))
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(position)
        signature.append((parameter.name, kind))
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible))


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Launches inside the ``with`` block are listed and not done."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(0 < n < 2**31 for n in grid), grid
        launches.append(_describe(self, args, kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def launches_of(call: Callable[[], Any], label: str = "") -> list[Launch]:
    with recorded_launches() as launches:
        call()
    return [Launch(x.kernel, x.signature, x.constants, x.divisible, label) for x in launches]


def compile_launch(launch: Launch, capability: int) -> Compiled:
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(launch.kernel.arg_names.index(name),): value for name, value in launch.constants},
        {(position,): [["tt.divisibility", 16]] for position in launch.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return Compiled(
        launch,
        capability,
        int(used["REG"]),
        int(used["STACK"]) + int(used["LOCAL"]),
        int(compiled.metadata.shared),
        str(compiled.asm["ptx"]),
    )
