"""Fused ops for models that are already there: see docs/fuse.md."""

from .fusing import FuseError, fuse, fuse_report, unfuse
from .patterns import register_pattern
from .report import FusedEntry, FuseReport, Reason, SkippedEntry

__all__ = [
    "FuseError",
    "FuseReport",
    "FusedEntry",
    "Reason",
    "SkippedEntry",
    "fuse",
    "fuse_report",
    "register_pattern",
    "unfuse",
]
