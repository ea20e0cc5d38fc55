"""Which tile a fused convolution works in: the user's table, ours, and a heuristic for the rest.

A key is (architecture, bits of the dtype, shape class). The class says what decides the code that
the compiler makes of a tile: the pass, whether there is one tap, whether there is a prologue, and
how many columns of the result are worth computing at a time.

Nothing is tuned on the way: a tile is looked up. ``python -m resops.tune`` times tiles on a GPU and
writes the user's table, JSON in the user's cache folder or where ``RESOPS_TILES`` says
(``RESOPS_TILES=off``: there is none). What is not a table that this version wrote is reported once
and ignored.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

PASSES = ("forward", "backward_data", "backward_weight")
COLUMNS = (16, 32, 64, 128)  # of a shape class
_FORMAT = "resops tiles 1"


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the result that a program computes, depth of a step of its sum, warps,
    and stages of the pipeline that loads the operands."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    def flags(self) -> dict[str, int]:
        """As arguments of a launch."""
        return {
            "ROWS": self.rows,
            "COLS": self.cols,
            "DEPTH": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    @property
    def is_allowed(self) -> bool:
        """Whether a table may hold it: sizes that the kernels are written for."""
        sizes = (self.rows, self.cols, self.depth)
        return (
            all(size in (16, 32, 64, 128, 256) for size in sizes)
            and self.rows * self.cols <= 128 * 256
            and self.warps in (4, 8)
            and 1 <= self.stages <= 5
        )


@dataclass(frozen=True)
class ShapeClass:
    """What the choice depends on beside architecture and dtype."""

    phase: str  # of PASSES
    pointwise: bool  # one tap, stride 1, no padding
    prologue: bool
    columns: int  # a power of two, 16 to 128

    @classmethod
    def of(cls, phase: str, pointwise: bool, prologue: bool, columns: int) -> ShapeClass:
        width = min(max(triton.next_power_of_2(columns), COLUMNS[0]), COLUMNS[-1])
        return cls(phase, pointwise, prologue, width)

    def __str__(self) -> str:
        kernel = "1x1" if self.pointwise else "kxk"
        return f"{self.phase} {kernel} {'prologue' if self.prologue else 'plain'} {self.columns}"


Table = Mapping[tuple[int, int, str], Tile]  # (90 for sm_90, bits, class) -> tile


# (architecture, bits) -> class -> a tile for every one of COLUMNS. Of sm_90: ptxas makes other
# tiles wait for every product (messages C7510 to C7519) or spill, so a narrow result may take a
# wide tile. fp32 is for TF32; what is not named takes the heuristic's, which on sm_80 spills here.
_TILES = {
    (90, 16): {
        "forward 1x1 plain": "128x16x64x4x3 128x32x64x4x3 128x64x64x4x3 128x128x64x8x3",
        "forward kxk plain": "128x16x64x4x3 128x32x64x4x3 128x64x64x4x3 128x128x64x8x3",
        "forward 1x1 prologue": "128x32x32x4x3 128x32x32x4x3 128x64x128x8x2 128x128x64x8x3",
        "forward kxk prologue": "128x32x32x4x3 128x32x32x4x3 128x128x64x8x3 128x128x64x8x3",
        "backward_data 1x1 plain": "128x16x64x4x3 128x32x64x4x3 128x64x64x4x3 128x128x64x8x3",
        "backward_data kxk plain": "128x16x64x4x3 128x32x64x4x3 128x64x64x4x3 128x128x64x8x3",
        "backward_data 1x1 prologue": "128x16x64x4x3 128x32x64x4x3 128x64x64x8x3 128x128x64x8x3",
        "backward_data kxk prologue": "128x16x64x4x3 128x32x64x4x3 128x64x64x8x3 128x128x64x8x3",
        "backward_weight 1x1 plain": "128x16x64x4x3 128x32x64x4x3 128x64x64x4x3 128x128x64x4x3",
        "backward_weight kxk plain": "128x16x64x4x3 128x32x64x4x3 128x64x64x4x3 128x128x64x4x3",
        "backward_weight 1x1 prologue": "128x16x64x4x3 128x32x64x4x3 128x64x64x8x3 128x128x64x8x3",
        "backward_weight kxk prologue": "128x16x64x4x3 128x32x64x4x3 128x64x64x8x3 128x128x64x8x3",
    },
    (90, 32): {
        "forward 1x1 prologue": "128x64x32x8x2 128x64x32x8x2 128x64x32x8x2 128x64x32x8x2",
        "forward kxk prologue": "128x64x32x8x2 128x64x32x8x2 128x64x32x8x2 128x64x32x8x2",
        "forward kxk plain": "128x16x32x8x2 128x64x32x8x2 128x64x32x8x2 128x64x32x8x2",
        "backward_data 1x1 prologue": "128x16x32x8x2 128x64x32x8x2 128x64x32x8x2 128x64x32x8x2",
        "backward_data kxk plain": "128x16x32x8x2 128x64x32x8x2 128x64x32x8x2 128x64x32x8x2",
        "backward_data kxk prologue": "128x16x32x8x2 128x64x32x8x2 128x64x32x8x2 128x64x32x8x2",
    },
    (80, 32): {
        "forward 1x1 plain": "128x16x32x8x2 128x32x32x8x3 128x64x32x8x2 128x64x32x8x2",
        "forward kxk plain": "128x16x32x8x2 128x32x32x8x3 128x64x32x8x2 128x64x32x8x2",
    },
}


def _built_in() -> Table:
    """Tiles of which the compiler makes good code; none has been timed on a GPU yet."""
    return {
        (capability, bits, f"{name} {columns}"): Tile(*map(int, text.split("x")))
        for (capability, bits), classes in _TILES.items()
        for name, texts in classes.items()
        for columns, text in zip(COLUMNS, texts.split(), strict=True)
    }


TABLE = _built_in()


def heuristic(dtype: torch.dtype, shape: ShapeClass) -> Tile:
    """A tile for what is in no table: small enough for the shared memory of any GPU since sm_80."""
    if dtype == torch.float32:
        return Tile(128, min(shape.columns, 64), 32, 8, 2)
    return Tile(128, shape.columns, 32, 8, 3)


def without_tensor_cores(shape: ShapeClass) -> Tile:
    """A tile for products in float32: their operands are in registers, of which 32 deep spill. So
    they do in the widest gradient of a weight with 8 warps, to each of which ptxas leaves 80."""
    wide_gradient = shape.phase == "backward_weight" and shape.columns >= 64
    return Tile(128, min(shape.columns, 64), 16, 4 if wide_gradient else 8, 3)


def capability_of(device: torch.device) -> int:
    """90 for sm_90; of a CPU, for the interpreter, 0."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_forced: Tile | None = None


@contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Every call inside works in this tile. For the tuner and the tests."""
    global _forced
    before, _forced = _forced, tile
    try:
        yield
    finally:
        _forced = before


def choose(device: torch.device, dtype: torch.dtype, precision: str, shape: ShapeClass) -> Tile:
    """The tile for a call. ``precision`` of products: "ieee" of float32 is without tensor cores."""
    if _forced is not None:
        return _forced
    key = (_capability(device), 8 * dtype.itemsize, str(shape))
    if found := _users_table().get(key):
        return found
    if dtype == torch.float32 and precision == "ieee":
        return without_tensor_cores(shape)
    return TABLE.get(key) or heuristic(dtype, shape)


_capability = functools.cache(capability_of)


# ---- the user's table ---------------------------------------------------------------------------


def table_path() -> Path | None:
    """Where the user's table is, whether or not there is one; None where it is switched off."""
    setting = os.environ.get("RESOPS_TILES", "")
    if setting.lower() in ("off", "0", "none"):
        return None
    if setting:
        return Path(setting)
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as containers have them
        return None
    return folder / "resops/tiles.json"


@functools.cache
def _users_table() -> Table:
    path = table_path()
    if path is None:
        return {}
    try:
        return read_table(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the table of tiles {path} is ignored: {error}; `python -m resops.tune` writes a new "
            "one, RESOPS_TILES=off does without",
            stacklevel=2,
        )
        return {}


def read_table(path: Path) -> Table:
    """The table in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, one of another version of resops or Triton, or has an entry that is
            not allowed; nothing of it is taken.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter of brackets without end
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it is not in the format {_FORMAT!r}")
    if content.get("triton") != triton.__version__:
        raise ValueError(
            f"it was written with Triton {content.get('triton')}, and this is {triton.__version__}"
        )
    entries = content.get("tiles")
    if not isinstance(entries, list):
        raise ValueError("it has no list of tiles")
    return dict(_parsed(entry) for entry in entries)


def _parsed(entry: Any) -> tuple[tuple[int, int, str], Tile]:
    match entry:
        case {
            "architecture": int(capability),
            "bits": 16 | 32 as bits,
            "class": str(name),
            "tile": [int(), int(), int(), int(), int()] as sizes,
        } if name in CLASSES and Tile(*sizes).is_allowed:
            return (capability, bits, name), Tile(*sizes)
    raise ValueError(f"it has an entry that is not allowed: {json.dumps(entry)[:200]}")


CLASSES = frozenset(
    str(ShapeClass(phase, pointwise, prologue, columns))
    for phase in PASSES
    for pointwise in (False, True)
    for prologue in (False, True)
    for columns in COLUMNS
)


def write_table(path: Path, table: Table) -> None:
    """Write a table that :func:`read_table` reads; a reader sees the old file or the new one."""
    content = {
        "format": _FORMAT,
        "triton": triton.__version__,
        "tiles": [
            {"architecture": capability, "bits": bits, "class": name, "tile": list(astuple(tile))}
            for (capability, bits, name), tile in sorted(table.items())
        ],
    }
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _users_table.cache_clear()
