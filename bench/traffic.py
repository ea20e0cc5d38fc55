"""Bytes that the operators of a call read and write, counted from the sizes of their tensors.

Every operator is taken to read each of its inputs and to write each of its outputs once, as if no
cache held anything between two operators. That is the smallest traffic of each, and the same rule
for all providers; it says nothing about time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# They allocate, and touch nothing.
_ALLOCATIONS = ("aten::empty", "aten::new_empty")


def _nbytes(t: Tensor) -> int:
    """Of the elements that there are, an expanded one counted once."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * t.element_size()


def _is_view(schema: Any) -> bool:
    aliases = [r.alias_info for r in schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if _is_view(func._schema) or name.startswith(_ALLOCATIONS):
            return result
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        if name in _OF_A_BUFFER:
            self.bytes[name] += _OF_A_BUFFER[name](args, result)
        else:
            self.bytes[name] += sum(map(_nbytes, tensors))
        return result


def _apply(args: Any, result: Any) -> int:
    return 2 * _nbytes(args[-1])


def _accumulate(args: Any, result: Any) -> int:
    grad_y, total, first = args[0], args[6], args[8]
    return 2 * _nbytes(grad_y) + (1 if first else 2) * grad_y.numel() * int(total.element_size())


def _gradient(args: Any, result: Any) -> int:
    read = [t for t in args[:3] if t is not None]
    return _nbytes(result) + sum(result.numel() * t.element_size() for t in read)


def _consumed(buffer: Tensor, mean: Tensor) -> int:
    """Elements of the channels that a consumer reads."""
    return buffer.numel() // buffer.size(1) * mean.numel()


def _narrow_forward(args: Any, result: Any) -> int:
    buffer, mean, conv_weight = args[0], args[3], args[5]
    read = _consumed(buffer, mean) * int(buffer.element_size())
    return read + _nbytes(conv_weight) + _nbytes(result)


def _narrow_backward(args: Any, result: Any) -> int:
    grad_c, conv_weight, buffer = args[:3]
    mean, total, first = args[5], args[7], args[9]
    passes = buffer.element_size() + (1 if first else 2) * int(total.element_size())
    tensors = (grad_c, conv_weight, *result)
    return _consumed(buffer, mean) * passes + sum(map(_nbytes, tensors))


def _update_running(args: Any, result: Any) -> int:
    mean, var, _, *running, _ = args
    return _nbytes(mean) + _nbytes(var) + 2 * sum(_nbytes(t) for ts in running for t in ts)


# Of a buffer these operators read and write some channels only; of lists they return nothing.
_OF_A_BUFFER: dict[str, Callable[[Any, Any], int]] = {
    f"{namespace}::dense_block_{phase}": count
    for namespace in ("resops", "resops_triton")
    for phase, count in (
        ("apply", _apply),
        ("accumulate", _accumulate),
        ("gradient", _gradient),
        ("narrow_forward", _narrow_forward),
        ("narrow_backward", _narrow_backward),
        ("update_running", _update_running),
    )
}


def count(call: Callable[[], object]) -> Counter[str]:
    """Bytes of one call, by the name of the operator."""
    with _Count() as counter:
        call()
    return counter.bytes
