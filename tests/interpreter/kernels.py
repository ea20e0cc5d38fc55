"""The Triton kernels of an op, and memory in which a write outside of an output is seen."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tensors import Guarded

MARGIN = 64  # elements; a multiple of 16, so that memory is aligned as torch aligns it
_ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "zeros", "new_zeros"}


def import_kernels(op: str) -> Any:
    """resops.triton_kernels.<op>; from the clone's folder where nothing is installed."""
    if importlib.util.find_spec("resops.triton_kernels") is None:
        folder = Path(__file__).resolve().parents[2] / "triton_kernels"
        spec = importlib.util.spec_from_file_location(
            "resops.triton_kernels",
            folder / "__init__.py",
            submodule_search_locations=[str(folder)],
        )
        assert spec is not None and spec.loader is not None
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    if os.environ.get("TRITON_INTERPRET") == "1":
        torch.set_num_threads(1)  # for tensors of a few hundred elements
        _prepare_the_language_once()
    return importlib.import_module(f"resops.triton_kernels.{op}")


@functools.cache
def _prepare_the_language_once() -> None:
    """Triton's interpreter puts its own functions in the place of those of triton.language at every
    launch, and again at every call from one function of a kernel to another, each time with a list
    of all that is in the module. The list is always the same, and a function needs what its launch
    did not do at its first call only. The rest was three tenths of the time of these tests. After
    a launch it copies all arguments to where they came from, which here is where they are."""
    language = importlib.import_module("triton.language")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")

    @functools.cache
    def builtins(place: Any) -> list[str]:
        members = inspect.getmembers(place)
        return [name for name, member in members if language.core.is_builtin(member)]

    def patch(place: Any, builder: Any, scope: Any) -> None:
        for name in builtins(place):
            member = getattr(place, name)
            if language.core.is_builtin(member):  # not there yet
                interpreter._patch_attr(place, name, member, builder, scope)

    prepare = functools.cache(interpreter._patch_lang)

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        prepare(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    interpreter._patch_builtin = patch
    interpreter.InterpretedFunction.__call__ = call
    core = language.core
    for place in (language, core, language.math, core.tensor, core.tensor_descriptor_base):
        builtins(place)  # now, while they are what they were


@contextmanager
def one_program_only(first: bool = False) -> Iterator[None]:
    """Of every launch inside, only the last program along the first axis runs, or the first: enough
    to see which offsets it computes, of tensors that would take the interpreter hours."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    executor, builder = interpreter.GridExecutor, interpreter.interpreter_builder
    launch, place = executor.__call__, builder.set_grid_idx

    def launch_one(self: Any, *args: Any, **kwargs: Any) -> None:
        count, *others = self.grid
        self.grid = (1, *others)

        def place_it(_: int, y: int, z: int) -> None:
            builder.set_grid_dim(count, *others, *[1] * (2 - len(others)))
            place(0 if first else count - 1, y, z)

        builder.set_grid_idx = place_it
        launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "__call__", launch_one)
        patch.setattr(builder, "set_grid_idx", place)
        yield


class _Guards(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; True would load torch._dynamo, which takes a second."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.guarded: list[Guarded] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in _ALLOCATE or made.numel() == 0:
            return made
        extent = made.untyped_storage().nbytes() // made.element_size()
        poison = math.nan if made.dtype.is_floating_point else 255
        buffer = torch.full((extent + 2 * MARGIN,), poison, dtype=made.dtype)
        view = buffer.as_strided(made.size(), made.stride(), MARGIN)
        if "zeros" in name:
            view.copy_(made)
        guard = Guarded(view, buffer, buffer[:0])
        guard.remember()
        self.guarded.append(guard)
        return view


@contextmanager
def guarded_memory() -> Iterator[list[Guarded]]:
    """Memory that is allocated inside, which is listed, is poisoned and has margins, which are
    untouched at the end.

    Raises:
        AssertionError: something was written outside of a tensor.
    """
    with _Guards() as guards:
        yield guards.guarded
    for guard in guards.guarded:
        guard.assert_margins_untouched()
