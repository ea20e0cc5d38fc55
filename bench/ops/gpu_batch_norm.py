"""Every BatchNorm of ResNet-50 and DenseNet-121 on a GPU, against eager and torch.compile.

    python -m bench.ops.gpu_batch_norm --output FILE [--batch N] [--dtypes bf16,fp16] [--seconds S]
        [--layout contiguous]

For each shape, forward and backward in training: microseconds, GB/s on the bytes that the scheme
has to move (two reads of what is reduced and applied), and what share of the bandwidth of a copy
that is, which is measured in the same run. Inputs rotate through more than four times the L2 cache.
The result is compared with eager's before anything is timed. A row of JSON per shape and dtype is
written as soon as it is there; shapes that do not fit into the time are named at the end, and found
rows are not timed again. Contiguous: those of ResNet-50, in 16 bits with planes that are no whole
vectors among them, and one of large images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import resops
from bench.ops.batch_norm import Inputs, zero_gradient_at_undecided_signs
from bench.roofline import tensors_moved
from bench.session import DTYPES
from bench.shapes import DENSENET121, RESNET50, BatchNormShape
from bench.timing import Deadline, percentile
from resops.functional import batch_norm_act

L2_BYTES = 64 << 20  # of the largest GPU that this is for; where torch tells it, its own
ROUNDS = 15
LARGE_IMAGES = BatchNormShape(128, 1024, 1024, residual=False, relu=False), 4  # and their batch


def rotation(nbytes: int, device: torch.device) -> int:
    """How many copies of inputs of ``nbytes`` are more than four times the L2 cache."""
    cache = L2_BYTES if device.type == "cuda" else 1
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", cache)
    return min(max(4 * cache // nbytes + 1, 2), 64)


def microseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The time of each round, in which every call runs once, per call."""
    found = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for call in calls:
                call()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1e3 / len(calls))
        else:
            start = time.perf_counter()
            for call in calls:
                call()
            found.append((time.perf_counter() - start) * 1e6 / len(calls))
    return found


def eager(inputs: Inputs, x: Tensor, residual: Tensor | None) -> Tensor:
    running = inputs.running_mean, inputs.running_var
    y = F.batch_norm(x, *running, inputs.weight, inputs.bias, True, 0.1, 1e-5)
    if residual is not None:
        y = y + residual
    return F.relu(y) if inputs.relu else y


def fused(inputs: Inputs, x: Tensor, residual: Tensor | None) -> Tensor:
    return batch_norm_act(
        x,
        inputs.running_mean,
        inputs.running_var,
        inputs.weight,
        inputs.bias,
        True,
        residual=residual,
        activation="relu" if inputs.relu else None,
    )


def copy_gb_per_s(nbytes: int, device: torch.device) -> float:
    """Of torch's own copy of tensors of ``nbytes``, reads and writes."""
    pairs = [
        torch.zeros(2, nbytes, dtype=torch.uint8, device=device)
        for _ in range(rotation(nbytes, device))
    ]
    calls = [lambda p=pair: p[1].copy_(p[0]) for pair in pairs]
    microseconds(calls, device)
    return 2e-3 * nbytes / percentile(microseconds(calls, device), 0.5)


def check(inputs: Inputs) -> float:
    """How far y and grad_x are from eager's, in norms of eager's; what rule R allows two results
    to differ is less than eight roundings of the dtype."""
    zero_gradient_at_undecided_signs(inputs)
    worst = 0.0
    outputs = []
    for provider in (eager, fused):
        x = inputs.x.detach().requires_grad_()
        y = provider(inputs, x, inputs.residual)
        outputs.append((y.detach(), torch.autograd.grad(y, x, inputs.grad_y)[0]))
    for theirs, ours in zip(*outputs, strict=True):
        apart = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        worst = max(worst, float(apart))
    allowed = 4 * torch.finfo(inputs.x.dtype).eps
    if not worst <= allowed:
        raise AssertionError(
            f"differs from eager by {worst:.2g} of its norm, allowed {allowed:.2g}"
        )
    return worst


def contiguous(inputs: Inputs) -> Inputs:
    tensors = ("x", "residual", "grad_y")
    present = {name: t for name in tensors if (t := getattr(inputs, name)) is not None}
    return replace(inputs, **{name: t.contiguous() for name, t in present.items()})


def time_shape(
    shape: BatchNormShape, batch: int, dtype: str, layout: str, device: torch.device
) -> dict[str, Any]:
    inputs = Inputs.random(shape, batch, DTYPES[dtype], device)
    if layout == "contiguous":
        inputs = contiguous(inputs)
    row = described(shape, batch, dtype, layout)
    row["differs from eager by"] = check(inputs)
    nbytes = inputs.x.numel() * inputs.x.element_size()
    count = rotation(nbytes, device)
    sets = [
        tuple(None if t is None else t.clone() for t in (inputs.x, inputs.residual, inputs.grad_y))
        for _ in range(count)
    ]
    copy = copy_gb_per_s(nbytes, device)
    row |= {"bytes": nbytes, "copies": count, "copy GB/s": round(copy, 1)}
    providers: dict[str, Callable[..., Tensor]] = {"eager": eager, "resops": fused}
    if device.type == "cuda":
        providers["torch.compile"] = torch.compile(eager)
    for name, provider in providers.items():
        forwards, backwards = [], []
        for x, residual, grad_y in sets:
            assert x is not None
            leaves = [t.requires_grad_() for t in (x, residual) if t is not None]
            call = lambda x=x, r=residual, p=provider: p(inputs, x, r)  # noqa: E731
            y = call()
            forwards.append(call)
            backwards.append(
                lambda y=y, t=leaves, g=grad_y: torch.autograd.grad(y, t, g, retain_graph=True)
            )
        for direction, calls in (("forward", forwards), ("backward", backwards)):
            microseconds(calls, device)  # warm
            found = percentile(microseconds(calls, device), 0.5)
            figures = {"us": round(found, 2)}
            if name == "resops":
                rate = 1e-3 * tensors_moved(direction, shape.residual) * nbytes / found
                figures |= {"GB/s": round(rate, 1), "share of copy": round(rate / copy, 3)}
            row[f"{name} {direction}"] = figures
    return row


def described(shape: BatchNormShape, batch: int, dtype: str, layout: str) -> dict[str, Any]:
    return {"shape": shape.label, "dtype": dtype, "batch": batch, "layout": layout}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtypes", default="bf16,fp16")
    parser.add_argument(
        "--layout", choices=("channels-last", "contiguous"), default="channels-last"
    )
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--shapes", type=int, help="only the first so many")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    device, deadline = torch.device(options.device), Deadline(options.seconds)
    layout = options.layout
    if layout == "contiguous":
        shapes = [*((shape, options.batch) for shape in dict.fromkeys(RESNET50)), LARGE_IMAGES]
    else:
        shapes = [(shape, options.batch) for shape in dict.fromkeys([*RESNET50, *DENSENET121])]
    done = []
    if options.output.exists():
        rows = [json.loads(line) for line in options.output.read_text().splitlines()]
        done = [row for row in rows if "error" not in row]
    left, failed = [], 0
    with resops.backend("native"):
        for (shape, batch), dtype in itertools.product(
            shapes[: options.shapes], options.dtypes.split(",")
        ):
            row = described(shape, batch, dtype, layout)
            if any(row.items() <= other.items() for other in done):
                continue
            if deadline.left() < 5:
                left.append(f"{shape.label} {dtype}")
                continue
            try:
                row = time_shape(shape, batch, dtype, layout, device)
            except (AssertionError, RuntimeError) as error:  # out of memory too
                failed += 1
                row["error"] = str(error)[:500]
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    if left:
        print(f"no time for: {', '.join(left)}; start it again to time these")
    return int(bool(left or failed))


if __name__ == "__main__":
    sys.exit(main())
