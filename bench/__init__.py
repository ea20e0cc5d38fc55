"""Benchmarks of resops against stock PyTorch: ``python -m bench --help``. Needs a clone."""
