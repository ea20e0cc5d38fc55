"""Compiles the Triton kernels that a call would launch, for GPUs that are not there.

The launchers run on CPU tensors of real size with every launch recorded instead of done (memory
from torch.empty that nobody touches costs nothing). Each distinct kernel is then compiled by
Triton and ptxas as it would be on the GPU: same argument types, same specialisation.
"""

from __future__ import annotations

import functools
import io
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.interpreter.kernels import import_kernels

CAPABILITIES = (80, 90, 100)
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


Path_ = tuple[int, ...]  # position of an argument, and inside of a tuple


@dataclass(frozen=True)
class Launch:
    """A kernel with the types and constants of one launch; equal ones compile to equal code."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[Path_, Any], ...]
    # Of specialised arguments: whether they are known to be multiples of 16.
    specialised: tuple[tuple[Path_, bool], ...]
    options: tuple[tuple[str, int], ...]  # warps, stages
    label: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class MainLoop:
    """Of sm_90's machine code, the loop with the tensor cores' instructions (HGMMA)."""

    products: int  # HGMMA
    instructions: int
    barriers: int  # BAR
    shared_stores: int  # STS
    full_waits: int  # for all products to be done

    def per_product(self, what: str) -> float:
        return float(getattr(self, what)) / self.products

    def __str__(self) -> str:
        names = ("instructions", "barriers", "shared_stores", "full_waits")
        figures = ", ".join(f"{self.per_product(name):.3g} {name}" for name in names)
        return f"{self.products} HGMMA, for each {figures}".replace("_", " ")


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a launch."""

    launch: Launch
    capability: int
    registers: int
    stack: int  # bytes of local memory, where spilled registers go
    shared: int
    ptx: str
    messages: str  # of ptxas
    code: str  # of the machine

    @property
    def serialised(self) -> list[str]:
        """The messages of ptxas that it made wgmma wait for one another, and why."""
        return re.findall(r"C751\d.*", self.messages)

    def widest(self, direction: str) -> int:
        """Bytes of the widest global access ("ld" or "st")."""
        pattern = rf"\b{direction}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b"
        accesses = re.findall(pattern, self.ptx)
        return max(int(n or 1) * int(bits) // 8 for n, bits in accesses)

    def main_loop(self) -> MainLoop | None:
        """The loop with most HGMMA, without the loops around it; None where none has any."""
        lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", self.code, re.MULTILINE)
        code = [(int(address, 16), text) for address, text in lines]
        loops: list[MainLoop] = []
        for end, text in code:
            target = re.search(r"\bBRA(?:\.\w+)*\s.*?(0x[0-9a-f]+)", text)
            if target is None or int(target[1], 16) >= end:
                continue
            body = [t for address, t in code if int(target[1], 16) <= address <= end]
            counts = [
                sum(bool(re.search(pattern, t)) for t in body)
                for pattern in (
                    r"\bHGMMA\b",
                    "",
                    r"\bBAR\b",
                    r"\bSTS\b",
                    r"DEPBAR\S* gsb0, 0x0\s*$",
                )
            ]
            if counts[0] > 0:
                loops.append(MainLoop(*counts))
        return min(loops, key=lambda loop: loop.instructions, default=None)

    def __str__(self) -> str:
        warps = "".join(f" {n} {name.removeprefix('num_')}" for name, n in self.launch.options)
        loop = self.main_loop()
        return (
            f"{self.launch.label:<34} sm_{self.capability:<4} {self.launch.name:<38}{warps} "
            f"{self.registers:>3} registers {self.stack:>3} bytes of stack {self.shared:>5} of "
            f"shared memory" + ("" if loop is None else f"; main loop: {loop}")
        )


def _describe(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    names = [p.name for p in kernel.params]
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    constants: list[tuple[Path_, Any]] = []
    specialised: list[tuple[Path_, bool]] = []

    def kind(value: Any, path: Path_, constant: bool, specialise: bool) -> Any:
        """The type of an argument, as Triton's launcher sees it."""
        if isinstance(value, tuple):
            return tuple(kind(v, (*path, i), constant, specialise) for i, v in enumerate(value))
        if isinstance(value, Tensor):
            specialised.append((path, value.data_ptr() % 16 == 0))
            return _POINTERS[value.dtype]
        if constant or value is None or (specialise and type(value) is int and value == 1):
            constants.append((path, value))
            if isinstance(value, str):  # which Triton takes for a specialisation without a property
                specialised.append((path, False))
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if specialise:
            specialised.append((path, value % 16 == 0))
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = [
        (p.name, kind(given[p.name], (i,), p.is_constexpr, not p.do_not_specialize))
        for i, p in enumerate(kernel.params)
    ]
    options = [(k, v) for k, v in kwargs.items() if k in ("num_warps", "num_stages")]
    return Launch(
        kernel, tuple(signature), tuple(constants), tuple(specialised), tuple(sorted(options))
    )


@contextmanager
def on_a_gpu(capability: int, processors: int = 132) -> Iterator[None]:
    """Inside, launchers take tensors of the CPU for tensors of such a GPU."""
    launch, tiles, conv = (import_kernels(name) for name in ("launch", "tiles", "conv_bn_act"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "DEVICES", {"cpu"})
        patch.setattr(tiles, "_capability", lambda device: capability)
        for module in (launch, conv):
            patch.setattr(module, "processors", lambda device: processors)
        yield


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
    return [replace(launch, label=label) for launch in launches]


def _dump(tool: str, *arguments: str) -> str:
    """The output of one of the tools that come with Triton."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run(
        [str(path), *arguments], capture_output=True, text=True, check=True
    ).stdout


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Equal launches, such as those of merging kernels, are compiled once."""
    return replace(_compiled(launch, capability), launch=launch)


def source_of(launch: Launch) -> ASTSource:
    """What Triton's launcher would compile: equal down to the key in Triton's cache."""
    return ASTSource(
        launch.kernel,
        dict(launch.signature),
        dict(launch.constants),
        {path: [["tt.divisibility", 16]] if known else [] for path, known in launch.specialised},
    )


@functools.cache
def _compiled(launch: Launch, capability: int) -> Compiled:
    messages = io.StringIO()
    with triton.knobs.nvidia.scope(), redirect_stdout(messages):
        triton.knobs.nvidia.dump_ptxas_log = True
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source_of(launch), target=target, options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = dict(
            re.findall(
                r"\b(REG|STACK|LOCAL):(\d+)", _dump("cuobjdump", "--dump-resource-usage", file.name)
            )
        )
        code = _dump("cuobjdump", "-sass", file.name) if "wgmma" in compiled.asm["ptx"] else ""
    return Compiled(
        launch,
        capability,
        int(used["REG"]),
        int(used["STACK"]) + int(used["LOCAL"]),
        int(compiled.metadata.shared),
        str(compiled.asm["ptx"]),
        messages.getvalue(),
        code,
    )
