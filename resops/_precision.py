"""How exact float32 convolutions are: a choice between speed and the last digits.

``high``, the default, allows Winograd's algorithm for 3x3 convolutions of stride 1 on the CPU: its
rounding error is at most 5e-5 of the sum of the absolute values of an output's terms, and two to
ten times that of a direct convolution (docs/math/conv_bn_act.md). TF32, in which PyTorch computes
convolutions on GPUs unless told otherwise, is at 3e-4. ``highest`` takes direct convolutions only.
"""

from __future__ import annotations

import os

from . import _native

_CHOICES = ("high", "highest")


def _checked(name: str, source: str) -> str:
    if name not in _CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(_CHOICES)}, but got {name!r}")
    return name


_precision = _checked(os.environ.get("RESOPS_CONV_PRECISION", "high"), "RESOPS_CONV_PRECISION")


def _apply(name: str) -> None:
    global _precision
    _precision = name
    if _native.module is not None:
        _native.module.set_conv_precision(name)


_apply(_precision)


def get_conv_precision() -> str:
    """``high`` or ``highest``."""
    return _precision


class set_conv_precision:  # a function that is a context manager too, as torch has them
    """Choose how exact float32 convolutions are, in all threads, forward and backward.

    As a function it holds from now on; as a context manager, until the end of the block. The
    environment variable RESOPS_CONV_PRECISION sets what holds at the start.

    Args:
        precision: ``high`` allows Winograd's algorithm, ``highest`` does not.

    Raises:
        ValueError: ``precision`` is neither.
    """

    def __init__(self, precision: str) -> None:
        self._before = _precision
        _apply(_checked(precision, "conv_precision"))

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        _apply(self._before)
