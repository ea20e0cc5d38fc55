"""Benchmarks of whole models, and the stock models that they are compared with."""
