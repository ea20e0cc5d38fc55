"""How large the values of a tensor can be, without reading it again and again.

oneDNN's relu turns a NaN into 0. So it may only follow a convolution that cannot make one: a
convolution of finite values with finite weights, none of whose sums overflows. A bound on |x| and
one on the weights decide that. The bound on a layer's output follows from that on its input, and is
kept for the next layer; a tensor is read only where no bound on it is known, or the known one has
grown past use.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import torch
from torch import Tensor

# A residual block looks back over at most its own outputs.
_REMEMBERED = 8


class _Recent(threading.local):
    def __init__(self) -> None:
        self.bounds: deque[tuple[weakref.ref[Tensor], int, float]] = deque(maxlen=_REMEMBERED)


_recent = _Recent()


def remember(t: Tensor, bound: float) -> None:
    """Keep ``bound`` as an upper bound on |t| for as long as ``t`` is not written to.

    A write is seen by the version counter, as autograd sees it; an inference tensor has none, so
    nothing is kept about it.
    """
    if not t.is_inference():
        _recent.bounds.appendleft((weakref.ref(t), t._version, bound))


def known(t: Tensor) -> float | None:
    """The bound on |t| that was kept in this thread, if ``t`` is among the last few tensors."""
    for ref, version, bound in _recent.bounds:
        if ref() is t:
            return bound if version == t._version else None
    return None


def measure(t: Tensor) -> float:
    """An upper bound on |t| by reading it; inf or NaN where ``t`` holds one, or squares overflow.

    It is the Euclidean norm, which is as fast to compute as a sum and exceeds the largest value by
    at most the square root of the number of elements; 1 % is added for rounding.
    """
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    bound = 1.01 * float(torch.linalg.vector_norm(t, dtype=dtype))
    remember(t, bound)
    return bound
