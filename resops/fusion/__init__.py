"""Fused ops for models that are already there: see docs/fuse.md."""

from .explaining import explain
from .folding import fold
from .fusing import FuseError, fuse, fuse_report, unfuse
from .patterns import register_pattern
from .report import FusedEntry, FuseReport, Reason, SkippedEntry
from .synchronizing import convert_sync_batchnorm

__all__ = [
    "FuseError",
    "FuseReport",
    "FusedEntry",
    "Reason",
    "SkippedEntry",
    "convert_sync_batchnorm",
    "explain",
    "fold",
    "fuse",
    "fuse_report",
    "register_pattern",
    "unfuse",
]
