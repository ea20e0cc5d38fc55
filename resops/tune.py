"""Times the tiles of the Triton convolutions on this GPU: ``python -m resops.tune``.

For every class of shapes (:mod:`resops.triton_kernels.tiles`) and every candidate: the candidate
is checked alone, against float64, and only then timed, on all shapes of the class. The fastest goes
into the user's table, which later processes read. Nothing else writes that table.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _triton
from .reference import conv_bn_act as reference

Measure = Callable[[Callable[[], Any]], float]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """One convolution without its batch."""

    channels: int
    size: int
    filters: int
    kernel: int = 1
    stride: int = 1

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From channels,size,filters[,kernel[,stride]]."""
        try:
            numbers = [int(n) for n in text.split(",")]
            if not 3 <= len(numbers) <= 5 or min(numbers) < 1:
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected channels,size,filters[,kernel[,stride]], but got {text!r}"
            ) from None
        return cls(*numbers)


# The convolutions of ResNet-50 behind its stem, and those of a layer of DenseNet-121.
SHAPES = (
    *(
        Shape(*shape)
        for width, size in ((64, 56), (128, 28), (256, 14), (512, 7))
        for shape in (
            (4 * width, size, width),
            (width, size, width, 3),
            (width, size, 4 * width),
        )
    ),
    *(Shape(width, 2 * size, width, 3, 2) for width, size in ((128, 28), (256, 14), (512, 7))),
    *(Shape(width, 2 * size, 2 * width, 1, 2) for width, size in ((256, 28), (512, 14), (1024, 7))),
    *(Shape(channels, size, 128) for channels, size in ((256, 56), (512, 28), (1024, 14))),
    *(Shape(128, size, 32, 3) for size in (56, 28, 14)),
)


@dataclass
class Call:
    """One phase of one convolution, and what it should give."""

    phase: str
    arguments: tuple[Any, ...]
    dtype: torch.dtype

    def run(self, phases: Any) -> tuple[Tensor, ...]:
        result = getattr(phases, f"conv_bn_act_{self.phase}")(*self.arguments)
        return result if isinstance(result, tuple) else (result,)

    def truth(self) -> tuple[tuple[Tensor, ...], float]:
        """The result in float64, and the largest sum of absolute terms of an element of it."""
        exact = Call(self.phase, _wide(self.arguments), torch.float64).run(reference)
        plain = Call(self.phase, _wide(self.arguments, absolute=True), torch.float64)
        return exact, float(plain.run(reference)[0].abs().max())


def is_right(call: Call, ours: tuple[Tensor, ...], exact: tuple[Tensor, ...], terms: float) -> bool:
    """Whether each result is within rounding of the exact one.

    The operands of :func:`calls` are short numbers, so their products are exact in TF32 and bf16
    too. What is left is the rounding of long sums in float32, 2^-20 of their terms, and of results.
    """
    unit, largest = torch.finfo(call.dtype).eps / 2, float(exact[0].abs().max())
    sums = 2.0**-20 * terms
    error = unit * largest + sums
    bounds: tuple[Any, ...] = (unit * exact[0].abs() + sums,)
    if call.phase == "forward":  # then mean and variance
        bounds += (error, 4 * error * largest)
    elif call.phase == "backward_data":  # then sums of this many, the second with |xhat| < 2
        count = exact[0].numel() / exact[0].size(1)
        bounds += (error * count, 2 * error * count)
    return all(
        bool(((t.double() - z).abs() <= bound).all())
        for t, z, bound in zip(ours, exact, bounds, strict=True)
    )


def _wide(value: Any, absolute: bool = False) -> Any:
    if isinstance(value, Tensor):
        return value.double().abs() if absolute else value.double()
    if isinstance(value, list | tuple):
        return type(value)(_wide(v, absolute) for v in value)
    return value


def calls(
    shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, prologue: bool
) -> list[Call]:
    """The three phases of a training step."""

    def random(*size: int) -> Tensor:
        # Multiples of 1/4; with scale and shift below those of 1/8, and no argument of relu is 0.
        t = torch.randint(-8, 9, size, device=device).to(dtype) / 4
        return t.contiguous(memory_format=torch.channels_last)

    x = random(batch, shape.channels, shape.size, shape.size)
    weight = random(shape.filters, shape.channels, shape.kernel, shape.kernel)
    edge = (shape.size + 2 * (shape.kernel // 2) - shape.kernel) // shape.stride + 1
    grad_y = random(batch, shape.filters, edge, edge)
    geometry = ([shape.stride] * 2, [shape.kernel // 2] * 2, [1, 1])
    before: tuple[Any, ...] = (None, None, "identity", 0.0)
    normed: tuple[Any, ...] = (None, *before, None, None, None)
    if prologue:
        vectors = [torch.full((shape.channels,), v, device=device) for v in (2.0, 0.125, 0.3, 0.7)]
        before = (*vectors[:2], "relu", 0.0)
        normed = (x, *before, *vectors[2:], None)
    size, weight_size = list(x.shape), list(weight.shape)
    forward = ([x], *before, weight, None, None, "identity", 0.0, *geometry, True)
    return [
        Call("forward", forward, dtype),
        Call("backward_data", (grad_y, weight, size, *normed, *geometry), dtype),
        Call("backward_weight", (grad_y, [x], *before, weight_size, *geometry), dtype),
    ]


def class_of(shape: Shape, phase: str, prologue: bool) -> str:
    """The class by which the launcher of this phase looks up its tile."""
    pointwise = shape.kernel == shape.stride == 1
    columns = shape.channels if phase == "backward_data" else shape.filters
    return str(_tiles().ShapeClass.of(phase, pointwise, prologue, columns))


def candidates(dtype: torch.dtype) -> Iterable[Any]:
    """The tiles that are tried; those that do not fit into a multiprocessor are left out there."""
    depths = (32,) if dtype == torch.float32 else (32, 64)
    for rows, cols, depth, warps, stages in itertools.product(
        (64, 128), (32, 64, 128), depths, (4, 8), (3, 4)
    ):
        tile = _tiles().Tile(rows, cols, depth, warps, stages)
        if tile.is_allowed and 1024 <= rows * cols // warps <= 4096:
            yield tile


def _tiles() -> Any:
    return importlib.import_module("resops.triton_kernels.tiles")


def tune(
    shapes: Sequence[Shape],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    measure: Measure,
    tiles: Sequence[Any],
    say: Callable[[str], object] = print,
) -> dict[tuple[int, int, str], Any]:
    """The fastest of ``tiles`` for every class that the shapes have.

    Args:
        measure: seconds, or any unit, that a call takes.

    Returns:
        a table; without the classes for which no tile was right.
    """
    launchers: Any = importlib.import_module("resops.triton_kernels.conv_bn_act")
    times: dict[str, dict[Any, float]] = {}
    for shape, prologue in itertools.product(shapes, (False, True)):
        for call in calls(shape, batch, dtype, device, prologue):
            name = class_of(shape, call.phase, prologue)
            exact, terms = call.truth()
            survivors = times.setdefault(name, dict.fromkeys(tiles, 1.0))
            measured = {}
            for tile in list(survivors):
                with _tiles().forced(tile):
                    try:
                        right = is_right(call, call.run(launchers), exact, terms)
                    except (RuntimeError, _out_of_resources()) as error:
                        say(f"{name}: {tile} does not run: {error}")
                        continue
                    if right:
                        measured[tile] = measure(functools.partial(call.run, launchers))
                    else:
                        say(f"{name}: {tile} is wrong for {shape}")
            # Relative to the fastest, so that every shape of a class has the same weight.
            fastest = min(measured.values(), default=1.0)
            times[name] = {tile: survivors[tile] * t / fastest for tile, t in measured.items()}
    capability, bits = _tiles().capability_of(device), 8 * dtype.itemsize
    table = {}
    for name, scores in times.items():
        if scores:
            best = min(scores, key=lambda tile: scores[tile])
            table[capability, bits, name] = best
            say(f"{name}: {best}")
    return table


def _out_of_resources() -> type[Exception]:
    error: type[Exception] = importlib.import_module("triton.runtime.errors").OutOfResources
    return error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m resops.tune", description=__doc__)
    parser.add_argument(
        "shapes", nargs="*", type=Shape.parse, metavar="C_IN,SIZE,C[,KERNEL,STRIDE]"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args(arguments)
    if _triton.error is not None or not torch.cuda.is_available():
        print(f"nothing to tune: {_triton.error or 'torch finds no CUDA device'}")
        return 1
    path = _tiles().table_path()
    if path is None:
        print("nothing to tune: RESOPS_TILES is off, or the user has no home folder for a table")
        return 1
    dtype = DTYPES[options.dtype]
    benchmark = importlib.import_module("triton.testing").do_bench
    table = tune(
        options.shapes or SHAPES,
        options.batch,
        dtype,
        torch.device("cuda"),
        lambda call: float(benchmark(call, return_mode="median")),
        list(candidates(dtype)),
    )
    try:
        known = dict(_tiles().read_table(path))
    except (OSError, ValueError):
        known = {}
    _tiles().write_table(path, known | table)
    print(f"{len(table)} entries written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
