"""Which convolutions a fused kernel was measured to be faster at, on which device.

The table is ``convolutions.json`` beside this file: written by ``python -m bench.gpu_convolutions``
on the device that it is about, and used where it is there. Without it, and for every device and
shape that it does not name, the library's convolution is taken.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PATH = Path(__file__).with_name("convolutions.json")
PHASES = ("forward", "backward_data", "backward_weight")

# Fields of a row. Rows with equal values of the first ones are one shape at several batch sizes.
SHAPE_FIELDS = (
    "device",  # "cpu", or the name that the driver gives the GPU
    "backend",
    "phase",
    "dtype",  # "bfloat16"
    "prologue",  # whether the input is normalised on load
    "input",  # [C_in, *spatial]
    "weight",  # [C, C_in, *kernel]
    "stride",
    "padding",
    "dilation",
)
Key = tuple[Any, ...]
# (batch, whether the fused kernel was faster), by increasing batch
Table = dict[Key, list[tuple[int, bool]]]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def table_of(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The table of measured rows.

    Each has SHAPE_FIELDS, ``batch``, and ``library_ms`` and ``fused_ms``, times of what the two
    must do for the same result.

    Raises:
        ValueError: a row without one of these, or with an unknown phase.
    """
    table: Table = {}
    for number, row in enumerate(rows):
        if missing := {*SHAPE_FIELDS, "batch", "library_ms", "fused_ms"} - row.keys():
            raise ValueError(f"row {number} has no {', '.join(sorted(missing))}")
        if row["phase"] not in PHASES:
            raise ValueError(f"row {number} has the unknown phase {row['phase']!r}")
        key = tuple(_frozen(row[field]) for field in SHAPE_FIELDS)
        faster = bool(row["fused_ms"] < row["library_ms"])
        table.setdefault(key, []).append((int(row["batch"]), faster))
    return {key: sorted(measured) for key, measured in table.items()}


def read(path: Path) -> Table:
    """The table in ``path``; an empty one where there is no such file."""
    return table_of(json.loads(path.read_text())["rows"]) if path.is_file() else {}


_table = read(PATH)


@functools.cache
def device_name(kind: str, index: int | None) -> str:
    """How a table calls the device."""
    return torch.cuda.get_device_name(index) if kind == "cuda" else kind


def fused_is_faster(
    phase: str,
    backend: str,
    x: Tensor,
    weight: Tensor,
    geometry: tuple[tuple[int, ...], ...],
    prologue: bool,
) -> bool:
    """Whether the backend's kernel was faster at this shape, at the measured batch size nearest to
    that of ``x``; False for what was not measured.

    Args:
        geometry: stride, padding and dilation.
    """
    if not _table:
        return False
    name = device_name(x.device.type, x.device.index)
    dtype = str(x.dtype).removeprefix("torch.")
    sizes = (tuple(x.shape[1:]), tuple(weight.shape), *geometry)
    measured = _table.get((name, backend, phase, dtype, prologue, *sizes))
    if measured is None:
        return False
    batch = x.size(0)

    def distance(row: tuple[int, bool]) -> float:
        return max(row[0], batch) / max(min(row[0], batch), 1)

    return min(measured, key=distance)[1]
