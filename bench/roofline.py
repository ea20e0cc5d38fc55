"""The bandwidth limit: how fast this machine can move the bytes that an op has to move.

A fused op is a sequence of passes over memory; ``PASSES`` lists the least that each needs with two
passes over the input (statistics, then apply). A pass reads or writes whole tensors, so its limit
is the fastest known way to read one (``read``), to read one and write another (``copy``) and to
read two and write a third (``triad``). Several ways are tried and the best of each is taken: the C
loops of bandwidth.c with non-temporal stores and several prefetch distances, numpy and torch.

The share of the limit that an op reaches is timed like everything else: the bare passes run
alternately with the op, reading the same tensors, and the paired ratio is reported. The 1-bit mask
(1/32 of a float32 tensor, 1/16 of a bfloat16 one) and the per-channel vectors are left out of the
limit's bytes.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import timing

KINDS = ("read", "copy", "triad")
STREAMS = {"read": 1, "copy": 2, "triad": 3}  # tensors that a pass reads or writes

# (direction, with residual) -> passes of the least traffic
#   forward:            statistics read x; apply reads x (and the residual), writes y
#   backward:           reduce reads grad_y and x; apply reads them again, writes grad_x
#   backward, residual: reduce also writes grad_residual, which apply then reads for grad_y
PASSES: dict[tuple[str, bool], tuple[str, ...]] = {
    ("forward", False): ("read", "copy"),
    ("forward", True): ("read", "triad"),
    ("backward", False): ("read", "read", "triad"),
    ("backward", True): ("triad", "triad"),
}
PREFETCH = (0, 4096, 16384)  # bytes ahead
BLOCK = 512  # bytes; the granularity of bandwidth.c
CURVE_MIB = (4, 16, 64, 256, 768)
LARGE_BYTES = 256 * 2**20  # a tensor that is beyond the caches


def tensors_moved(direction: str, residual: bool) -> int:
    """Reads and writes of whole tensors in the least traffic."""
    return sum(STREAMS[kind] for kind in PASSES[direction, residual])


def available_memory() -> int:
    """Bytes that can be allocated without swapping; a large number where nobody says."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**40


def large_bytes() -> int:
    """LARGE_BYTES, or less where some fifteen such tensors would fill half of the memory."""
    size = LARGE_BYTES
    while size > 2**20 and 30 * size > available_memory():
        size //= 2
    return size


@functools.cache
def native_passes() -> ctypes.CDLL | None:
    """bandwidth.c, compiled for this processor; None without a C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="resops-bench-") as folder:
        library = Path(folder) / "bandwidth.so"
        source = Path(__file__).with_name("bandwidth.c")
        command = [compiler, "-O3", "-shared", "-fPIC", str(source), "-o", str(library)]
        for flags in (["-march=native"], []):
            try:
                subprocess.run([*command, *flags], check=True, capture_output=True)
                loaded = ctypes.CDLL(str(library))
            except (OSError, subprocess.CalledProcessError):
                continue
            pointer, size = ctypes.c_void_p, ctypes.c_size_t
            loaded.pass_read.argtypes = [pointer, size, size]
            loaded.pass_copy.argtypes = [pointer, pointer, size, size]
            loaded.pass_triad.argtypes = [pointer, pointer, pointer, size, size]
            return loaded
    return None


@dataclass
class Buffers:
    """Three tensors of the same size: y = f(x, z). Written once, so that they have memory."""

    y: Tensor
    x: Tensor
    z: Tensor

    @classmethod
    def of(cls, nbytes: int, device: torch.device) -> Buffers:
        count = max(nbytes // BLOCK, 1) * BLOCK // 4
        aligned = []
        for value in (0.0, 1.0, 2.0):
            whole = torch.full((count + 16,), value, device=device)
            skip = -whole.data_ptr() % 64 // 4
            aligned.append(whole[skip : skip + count])
        return cls(*aligned)

    @property
    def nbytes(self) -> int:
        return self.x.numel() * 4


def memory_of(t: Tensor) -> Tensor:
    """The memory of a dense tensor, in its own order, as float32; whole blocks of it.

    Raises:
        ValueError: it does not begin on a cache line.
    """
    if t.data_ptr() % 64 != 0:
        raise ValueError(f"the tensor begins {t.data_ptr() % 64} bytes behind a cache line")
    count = max(t.nbytes // BLOCK, 1) * BLOCK // t.element_size()
    return t.as_strided((count,), (1,)).view(torch.float32)


def _parts(nbytes: int, count: int) -> Iterator[tuple[int, int]]:
    """Offset and length of ``count`` parts that are multiples of BLOCK."""
    blocks = nbytes // BLOCK
    edges = [blocks * index // count * BLOCK for index in range(count + 1)]
    return itertools.pairwise(edges)


def _native_call(kind: str, b: Buffers, ahead: int, pool: ThreadPoolExecutor | None) -> Callable:
    library = native_passes()
    assert library is not None
    function = getattr(library, f"pass_{kind}")
    tensors = {"read": (b.x,), "copy": (b.y, b.x), "triad": (b.y, b.x, b.z)}[kind]
    pointers = [t.data_ptr() for t in tensors]
    if pool is None:
        return lambda: function(*pointers, b.nbytes, ahead)
    jobs = [
        ([pointer + begin for pointer in pointers], end - begin)
        for begin, end in _parts(b.nbytes, pool._max_workers)
    ]

    def run() -> None:  # ctypes releases the interpreter lock
        running = [
            pool.submit(functools.partial(function, *parts, size, ahead)) for parts, size in jobs
        ]
        for job in running:
            job.result()

    return run


def _ways(
    kind: str, b: Buffers, pool: ThreadPoolExecutor | None
) -> dict[str, Callable[[], object]]:
    """Every known way to do a pass, by name."""
    ways: dict[str, Callable[[], object]] = {}
    on_cpu = b.x.device.type == "cpu"
    if on_cpu and native_passes() is not None:
        for ahead in PREFETCH:
            ways[f"bandwidth.c, prefetch {ahead}"] = _native_call(kind, b, ahead, pool)
    if kind == "read":
        ways |= {"torch.dot": lambda: torch.dot(b.x, b.x), "torch.sum": lambda: b.x.sum()}
        if on_cpu:
            ways["numpy max"] = lambda: b.x.numpy().max()
    elif kind == "copy":
        ways["torch copy_"] = lambda: b.y.copy_(b.x)
        if on_cpu:
            ways["numpy copyto"] = lambda: np.copyto(b.y.numpy(), b.x.numpy())
    else:
        ways["torch add"] = lambda: torch.add(b.x, b.z, out=b.y)
    return ways


@dataclass(frozen=True)
class Measured:
    """The best way of one kind of pass: its bandwidth in GB/s and its name."""

    gb_per_s: float
    p20: float
    p80: float
    way: str
    all_ways: dict[str, float]


class Roofline:
    """The limits of one device at one number of threads.

    ``measured``: kind of pass to what was found on ``nbytes`` (per tensor).
    """

    def __init__(
        self, device: torch.device, threads: int, nbytes: int | None = None, budget_s: float = 3.0
    ) -> None:
        self.device, self.threads = device, threads
        self.nbytes = large_bytes() if nbytes is None else nbytes
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        buffers = Buffers.of(self.nbytes, device)
        budget_s /= len(KINDS)
        self.measured = {kind: self._measure(kind, buffers, budget_s) for kind in KINDS}
        self._written = buffers.y  # the others go: their memory is what comes next in the run

    def _measure(self, kind: str, buffers: Buffers, budget_s: float) -> Measured:
        with timing.threads(self.threads):
            found = timing.alternate(
                _ways(kind, buffers, self._pool),
                budget_s=budget_s,
                device=self.device,
                min_rounds=3,
                warmup=1,
            )
        traffic = STREAMS[kind] * buffers.nbytes * 1e-9
        rates = {
            way: timing.Summary.of([traffic / s for s in seconds])
            for way, seconds in found.seconds.items()
        }
        way = max(rates, key=lambda name: rates[name].median)
        best = rates[way]
        everything = {name: round(rate.median, 2) for name, rate in rates.items()}
        return Measured(best.median, best.p20, best.p80, way, everything)

    def bare_passes(
        self, direction: str, residual: bool, x: Tensor, z: Tensor
    ) -> Callable[[], object]:
        """The least passes of an op that reads ``x`` and ``z``, each done in the best way.

        They read the memory of these two dense tensors: how fast that is depends on the pages that
        a tensor happened to get, by some ten percent.
        """
        if self._written.nbytes < x.nbytes:
            self._written = Buffers.of(x.nbytes, self.device).y
        read, also = memory_of(x), memory_of(z)
        part = Buffers(self._written[: read.numel()], read, also)
        calls = [
            _ways(kind, part, self._pool)[self.measured[kind].way]
            for kind in PASSES[direction, residual]
        ]

        def run() -> None:
            for call in calls:
                call()

        return run

    def curve(self, budget_s: float = 3.0) -> dict[int, float]:
        """Read bandwidth in GB/s by size in MiB: shows from which size on caches do not help."""
        found = {}
        sizes = [mib for mib in CURVE_MIB if 6 * mib * 2**20 < available_memory()]
        way = self.measured["read"].way
        for mib in sizes:
            buffers = Buffers.of(mib * 2**20, self.device)
            with timing.threads(self.threads):
                seconds = timing.alternate(
                    {way: _ways("read", buffers, self._pool)[way]},
                    budget_s=budget_s / len(sizes),
                    device=self.device,
                    min_rounds=3,
                    max_rounds=30,
                ).seconds[way]
            found[mib] = buffers.nbytes * 1e-9 / timing.percentile(seconds, 0.5)
        return found

    def close(self) -> None:
        """Give the memory and the threads back."""
        if self._pool is not None:
            self._pool.shutdown()
        self._written = torch.empty(0)
