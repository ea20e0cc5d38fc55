"""Which operators really ran: a package that only called torch would pass most value tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name.removeprefix("resops::")] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Counts operator calls by name, such as ``batch_norm_forward`` and ``aten::add``.

    Ops of the namespace resops are named without it.
    """
    with _Count() as mode:
        yield mode.calls


def native_calls(calls: Counter[str]) -> dict[str, int]:
    """Only the calls of ops that this package registered."""
    own = {name for name in calls if hasattr(torch.ops.resops, name)}
    return {name: calls[name] for name in sorted(own)}
