"""Every convolution of ResNet-50 and DenseNet-121: a backend's fused kernels against cuDNN.

    python -m bench.gpu_convolutions measure --network resnet50 --batch 256 --phase forward
    python -m bench.gpu_convolutions table ROWS.jsonl [--output FILE]

``measure`` appends a row of JSON for each convolution to its output as it ends. The providers:

* library: cuDNN's convolution (``cudnn.benchmark`` on), batch norm's phases as ops of their own;
* fused: the one kernel of the backend that does the same, with prologue and epilogue;
* compiled, with ``--compile``: the same in PyTorch's own ops, ``max-autotune`` of torch.compile.

Library and fused are called through what a block's op calls (resops/ops/convolution.py), and both
do what the block needs of the phase: statistics after a forward pass, the two sums of batch norm
beside a gradient. Nothing is timed whose output is not right. A row that is there is not measured
again: the command goes on where it was stopped.

``table`` writes the choice per shape from such rows, to where the package finds it.

Without a GPU nothing is measured: the list of what was not, and exit status 0.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import environment
from bench.convolution_shapes import NETWORKS, ConvolutionShape
from bench.session import DTYPES
from bench.timing import Deadline, alternate
from resops import _dispatch
from resops.ops import convolution, convolution_table
from resops.ops.convolution import FUSED, LIBRARY, Geometry, Input, Norm

PHASES = convolution_table.PHASES
BATCHES = (32, 256)
ROTATED_BYTES = 256 * 2**20  # of inputs, so that none of them is still in the L2 (60 MB on an H200)
DENSE_SIZE = 8192
EPS = 1e-5

Result = tuple[Tensor, ...]
Implementation = Callable[[], Result]


@dataclass(frozen=True)
class Case:
    """One convolution and phase at one batch size; tensors are made by :func:`operands`."""

    shape: ConvolutionShape
    phase: str
    batch: int
    dtype: str

    @property
    def label(self) -> str:
        return f"{self.phase} {self.shape.label}, batch {self.batch}, {self.dtype}"

    @property
    def geometry(self) -> Geometry:
        stride, padding = self.shape.stride, self.shape.padding
        return Geometry((stride, stride), (padding, padding), (1, 1), 1)

    def row(self, device: str, backend: str) -> dict[str, Any]:
        """The fields of the table that say which convolution it is."""
        shape = self.shape
        return {
            "device": device,
            "backend": backend,
            "phase": self.phase,
            "dtype": str(DTYPES[self.dtype]).removeprefix("torch."),
            "prologue": shape.prologue,
            "input": [shape.channels_in, shape.size, shape.size],
            "weight": [shape.channels, shape.channels_in, shape.kernel, shape.kernel],
            **dict(zip(("stride", "padding", "dilation"), self.geometry.lists(), strict=True)),
            "batch": self.batch,
        }


@dataclass(frozen=True)
class Operands:
    """Input, its norm where there is a prologue, weight, and gradient of the output."""

    x: Tensor
    norm: Norm | None
    weight: Tensor
    grad_y: Tensor

    def to(self, dtype: torch.dtype) -> Operands:
        """The same values in a wider dtype."""
        return Operands(self.x.to(dtype), self.norm, self.weight.to(dtype), self.grad_y.to(dtype))


def operands(case: Case, device: torch.device) -> Operands:
    """Random ones, channels-last; the input has means beside 0."""
    shape, dtype = case.shape, DTYPES[case.dtype]
    cl: Any = {"memory_format": torch.channels_last}

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(dtype).contiguous(**cl)

    c, k, n = shape.channels_in, shape.channels, case.batch
    x = (random(n, c, shape.size, shape.size) + torch.randn(c, 1, 1, device=device)).to(dtype)
    x = x.contiguous(**cl)
    norm = None
    if shape.prologue:
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        affine = torch.rand(c, device=device) + 0.5, torch.randn(c, device=device)
        norm = Norm(*affine, mean, torch.rsqrt(var + EPS), "relu", 0.0)
    weight = random(k, c, shape.kernel, shape.kernel) / (c * shape.kernel**2) ** 0.5
    grad_y = random(n, k, shape.output_size, shape.output_size)
    return Operands(x, norm, weight.contiguous(**cl), grad_y)


# ---- the providers ------------------------------------------------------------------------------


def block_phase(case: Case, backend: str, wanted: str, at: Operands) -> Result:
    """What a block's op does for the phase, with library or fused convolutions.

    Returns:
        forward: c, mean, variance. backward_data: with a prologue the gradient before or after its
        activation's derivative (the library leaves that to batch norm) and the two sums.
        backward_weight: the gradient.
    """
    ops = convolution.NAMESPACES[backend]
    conv = (at.weight, None, case.geometry, backend, wanted)
    input = Input(at.x, at.norm)
    if case.phase == "forward":
        c, statistics = convolution.forward(input, *conv, True)
        return (c, *(ops.batch_norm_statistics(c) if statistics is None else statistics))
    if case.phase == "backward_weight":
        grad_weight, _ = convolution.backward_weight(at.grad_y, input, *conv, (True, False))
        assert grad_weight is not None
        return (grad_weight,)
    data = (at.weight, case.geometry, backend, wanted, None)
    g, sums = convolution.backward_data(at.grad_y, input, *data)
    if at.norm is None:
        return (g,)
    if sums is None:
        sums = ops.batch_norm_backward_reduce(g, at.x, None, None, *at.norm)
    return (g, *sums)


def torch_phase(case: Case, at: Operands) -> Result:
    """The same in PyTorch's own ops: what torch.compile is given, and, in float32, the truth.

    Of backward_data with a prologue the gradient is that after the activation's derivative.
    """
    x = at.x
    passes = None
    if at.norm is not None:
        scale, shift = (t[:, None, None] for t in at.norm.scale_and_shift())
        z = at.x.float() * scale + shift
        passes = z > 0
        x = F.relu(z).to(at.x.dtype)
    if case.phase == "forward":
        c = F.conv2d(x, at.weight, None, *case.geometry)
        var, mean = torch.var_mean(c.float(), (0, 2, 3), correction=0)
        return c, mean, var
    mask = [case.phase == "backward_data", case.phase == "backward_weight", False]
    geometry = (*case.geometry.lists(), False, [0, 0], 1)
    grads = torch.ops.aten.convolution_backward(at.grad_y, x, at.weight, None, *geometry, mask)
    if case.phase == "backward_weight":
        return (grads[1],)
    g = grads[0]
    if at.norm is None or passes is None:
        return (g,)
    g = torch.where(passes, g, 0)
    xhat = (at.x.float() - at.norm.mean[:, None, None]) * at.norm.invstd[:, None, None]
    return g, g.float().sum((0, 2, 3)), (g.float() * xhat).sum((0, 2, 3))


def errors(found: Result, exact: Result) -> list[float]:
    return [
        float((mine.float() - truth.float()).norm() / truth.float().norm().clamp_min(1e-30))
        for mine, truth in zip(found, exact, strict=True)
    ]


def wrong(case: Case, at: Operands, fused: Result) -> str | None:
    """What of the fused result is not right; None if all is.

    The truth is torch_phase in float32 without TF32. Allowed is three times the error of
    torch_phase in the dtype itself, and two roundings of an output. (Rule R of tests/accuracy.py
    with the norm of the output for A: in a random sum, value and error grow alike.)
    """
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = torch_phase(case, at.to(torch.float32))
    unit = torch.finfo(DTYPES[case.dtype]).eps / 2
    pairs = zip(errors(fused, exact), errors(torch_phase(case, at), exact), strict=True)
    for number, (mine, its) in enumerate(pairs):
        if not mine <= 3 * its + 2 * unit:
            return f"output {number} is off by {mine:.3g}, PyTorch's own by {its:.3g}"
    return None


def rotating(call: Callable[[Operands], Result], given: list[Operands]) -> Implementation:
    """``call`` on the next of the operands each time."""
    turn = itertools.cycle(given)
    return lambda: call(next(turn))


# ---- measuring ----------------------------------------------------------------------------------


def dense_rate(device: torch.device, dtype: str, size: int = DENSE_SIZE) -> float:
    """TFLOP/s of a large matrix product of the library: what 100 % is, measured in the same run."""
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    found = alternate({"matmul": lambda: a @ b}, budget_s=1.0, device=device)
    return 2 * size**3 / found.milliseconds("matmul").median * 1e-9


def measure(
    case: Case,
    device: torch.device,
    backend: str,
    dense: float,
    *,
    compiled: bool = False,
    seconds: float = 0.6,
) -> dict[str, Any]:
    """The row of one case. ``error`` is in it, and no time, where the fused kernel is wrong."""
    first = operands(case, device)
    row = case.row(convolution_table.device_name(device.type, device.index), backend)
    problem = wrong(case, first, block_phase(case, backend, FUSED, first))
    if problem is not None:
        return {**row, "error": problem}
    nbytes = (first.x.numel() + first.grad_y.numel()) * first.x.element_size()
    copies = 1 if device.type == "cpu" else max(1, min(8, ROTATED_BYTES // nbytes))
    given = [first, *(operands(case, device) for _ in range(copies - 1))]
    providers = {
        name: rotating(functools.partial(block_phase, case, backend, name), given)
        for name in (LIBRARY, FUSED)
    }
    if compiled:
        # Without CUDA graphs, which the other providers are not given either.
        torch._dynamo.reset()  # the limit of recompilations is for all cases together
        best = torch.compile(torch_phase, mode="max-autotune-no-cudagraphs", dynamic=False)
        providers["compiled"] = rotating(functools.partial(best, case), given)
    found = alternate(providers, budget_s=seconds, device=device)
    for name in providers:
        ms = found.milliseconds(name).median
        rate = case.shape.flops(case.batch) / ms * 1e-9
        row |= {f"{name}_ms": ms, f"{name}_tflops": rate, f"{name}_of_dense": rate / dense}
    return {**row, "ratio": found.ratio(LIBRARY, FUSED).as_dict(), "dense_tflops": dense}


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two rows measurements of the same thing."""
    fields = (*convolution_table.SHAPE_FIELDS, "batch", "commit", "compiled")
    return tuple(json.dumps(row.get(field)) for field in fields)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may not exist yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(
    cases: Iterable[Case],
    device: torch.device,
    backend: str,
    output: Path,
    deadline: Deadline,
    *,
    compiled: bool,
    commit: str | None,
    dense_size: int = DENSE_SIZE,
) -> tuple[list[str], list[str]]:
    """Measure what is not in ``output`` yet and append it there.

    Returns:
        what is wrong, and what there was no time for.

    Raises:
        BackendError: the backend has no fused convolution on this device.
    """
    done = {identity(row) for row in read_rows(output)}
    facts = {"commit": commit, "compiled": compiled, "provenance": environment.provenance(device)}
    bad, missing = [], []
    dense: dict[str, float] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        name = convolution_table.device_name(device.type, device.index)
        if identity({**case.row(name, backend), **facts}) in done:
            continue
        if deadline.left() <= 0:
            missing.append(case.label)
            continue
        if case.dtype not in dense:
            dense[case.dtype] = dense_rate(device, case.dtype, dense_size)
            refused = torch.empty(0, dtype=DTYPES[case.dtype], device=device)
            if reason := _dispatch.refusal(backend, "conv_bn_act", refused):
                raise _dispatch.BackendError(reason)  # else the library would be timed twice
        row = measure(case, device, backend, dense[case.dtype], compiled=compiled)
        with output.open("a") as file:
            file.write(json.dumps({**row, **facts}) + "\n")
        if "error" in row:
            bad.append(f"{case.label}: {row['error']}")
            print(f"WRONG {bad[-1]}", flush=True)
        else:
            print(line(case, row), flush=True)
    return bad, missing


def line(case: Case, row: Mapping[str, Any]) -> str:
    """A row for people."""
    parts = [
        f"{name} {row[f'{name}_ms']:.3f} ms {row[f'{name}_tflops']:.0f} TFLOP/s "
        f"{100 * row[f'{name}_of_dense']:.0f} %"
        for name in (LIBRARY, FUSED, "compiled")
        if f"{name}_ms" in row
    ]
    return f"{case.label}: {', '.join(parts)}; {row['ratio']['median']:.2f}x"


def cases_of(network: str, phases: Sequence[str], batch: int, dtype: str) -> Iterator[Case]:
    """Every convolution of a network. An image has no gradient: the first has no backward_data."""
    for phase, shape in itertools.product(phases, NETWORKS[network]()):
        if phase != "backward_data" or shape.channels_in > 3:
            yield Case(shape, phase, batch, dtype)


# ---- the table ----------------------------------------------------------------------------------


def table(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the package ships: the figures that decide, of the last row of each case, by device.

    Raises:
        ValueError: nothing was measured on a GPU; a wrong result is among the rows, so that its
            kernel must be mended first.
    """
    last: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        if "error" in row:
            raise ValueError(f"a kernel was wrong, mend it first: {row['error']} at {row}")
        key = tuple(json.dumps(row[field]) for field in (*convolution_table.SHAPE_FIELDS, "batch"))
        if row["device"] != "cpu" and not row["compiled"]:
            last[key] = row
    if not last:
        raise ValueError("none of the rows was measured on a GPU")
    fields = (*convolution_table.SHAPE_FIELDS, "batch", "library_ms", "fused_ms", "commit")
    kept = [{field: row[field] for field in fields} for row in last.values()]
    convolution_table.table_of(kept)  # raises where the package could not read it
    return {"rows": kept}


# ---- the command --------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_convolutions", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--network", choices=NETWORKS, required=True)
    measuring.add_argument("--batch", type=int, required=True)
    measuring.add_argument("--phase", choices=PHASES, required=True)
    measuring.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    measuring.add_argument("--backend", choices=tuple(convolution.NAMESPACES), default="triton")
    measuring.add_argument("--compile", action="store_true")
    measuring.add_argument("--seconds", type=float, default=480.0)
    measuring.add_argument("--output", type=Path, default=Path("convolutions.jsonl"))
    tabling = commands.add_parser("table")
    tabling.add_argument("rows", type=Path)
    tabling.add_argument("--output", type=Path, default=convolution_table.PATH)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a result was wrong or time ran out."""
    options = parse(arguments)
    if options.command == "table":
        options.output.write_text(json.dumps(table(read_rows(options.rows)), indent=1) + "\n")
        return 0
    cases = list(cases_of(options.network, (options.phase,), options.batch, options.dtype))
    if not torch.cuda.is_available():
        print("There is no GPU here. Not run:")
        for case in cases:
            print(f"  {case.label}")
        return 0
    torch.backends.cudnn.benchmark = True
    commit = environment.commit()
    bad, missing = run(
        cases,
        torch.device("cuda", torch.cuda.current_device()),
        options.backend,
        options.output,
        Deadline(options.seconds),
        compiled=options.compile,
        commit=None if commit["changed"] else commit["hash"],
    )
    if missing:
        print(f"no time for {len(missing)} of {len(cases)}; start it again to go on")
    return int(bool(bad or missing))


if __name__ == "__main__":
    sys.exit(main())
