"""torch.ops.resops on another device, for cases whose tensors are on the CPU.

The oracles compute in float64 on the CPU. Here every argument goes to the device with its strides,
its offset and all that its storage holds, the op runs there, and its outputs come back; a tensor
that the op may write to is copied back into the argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeviceOps:
    """The ops of torch.ops.resops as functions of CPU tensors."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.resops, name).default

        def call(*arguments: Any, **named: Any) -> Any:
            schema = op._schema.arguments
            given = [*arguments, *(named[a.name] for a in schema[len(arguments) :])]
            moved = [self._moved(a) for a in given]
            outputs = op(*moved)
            for argument, before, after in zip(schema, given, moved, strict=True):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._copy_back(before, after)
            if isinstance(outputs, Tensor):
                return outputs.cpu()
            return None if outputs is None else tuple(t.cpu() for t in outputs)

        return call

    def _copy_back(self, before: Any, after: Any) -> None:
        if isinstance(before, Tensor):
            before.copy_(after)
        elif before is not None:
            for b, a in zip(before, after, strict=True):
                self._copy_back(b, a)

    def _moved(self, argument: Any) -> Any:
        if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
            return [self._there(t) for t in argument]
        return self._there(argument) if isinstance(argument, Tensor) else argument

    def _there(self, t: Tensor) -> Tensor:
        storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
        there = storage.to(self.device, copy=True)
        return there.as_strided(t.shape, t.stride(), t.storage_offset())
