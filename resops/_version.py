"""The version of resops, written here and nowhere else."""

__version__ = "0.1.0"
