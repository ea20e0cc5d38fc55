"""Which tile a fused convolution works in: a table, and a heuristic for what is not in it.

A key is (architecture, bits of the dtype, shape class). The class says what decides the code that
the compiler makes of a tile: the pass, whether there is one tap, whether there is a prologue, and
how many columns of the result are worth computing at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

PASSES = ("forward", "backward_data", "backward_weight")
_WIDEST = 128  # columns; more made ptxas serialise or spill (docs/math/conv_bn_act.md)


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


@dataclass(frozen=True)
class ShapeClass:
    """What the choice depends on beside architecture and dtype."""

    phase: str  # of PASSES
    pointwise: bool  # one tap, stride 1, no padding
    prologue: bool
    columns: int  # a power of two, 16 to 128

    @classmethod
    def of(cls, phase: str, pointwise: bool, prologue: bool, columns: int) -> ShapeClass:
        width = min(max(triton.next_power_of_2(columns), 16), _WIDEST)
        return cls(phase, pointwise, prologue, width)

    def __str__(self) -> str:
        kernel = "1x1" if self.pointwise else "kxk"
        return f"{self.phase} {kernel} {'prologue' if self.prologue else 'plain'} {self.columns}"


def heuristic(capability: int, dtype: torch.dtype, shape: ShapeClass) -> Tile:
    """A tile that compiles well on every architecture that was looked at."""
    if dtype == torch.float32:
        return Tile(64, min(shape.columns, 64), 32, 4, 2)
    cols = shape.columns
    return Tile(128, cols, 64, 8 if cols > 64 else 4, 3)


def capability_of(device: torch.device) -> int:
    """90 for sm_90; of a CPU, for the interpreter, 0."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(device: torch.device, dtype: torch.dtype, shape: ShapeClass) -> Tile:
    """The tile for this call."""
    return heuristic(capability_of(device), dtype, shape)
