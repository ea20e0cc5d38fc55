"""Fused ops for models that are already there: see docs/fuse.md."""

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
    "fuse",
    "fuse_report",
    "register_pattern",
    "unfuse",
]
