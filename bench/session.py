"""What the parts of one benchmark run share: where it runs, how long it may, where rows go."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Module

from bench.report import Report, Row
from bench.timing import Comparison, Deadline

EAGER, RESOPS = "eager", "resops"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Progress:
    """A bar that counts steps; a line per step where there is no terminal, or no tqdm."""

    def __init__(self, total: int, shown: bool = True) -> None:
        self._bar: Any = None
        self._shown, self._total, self._finished = shown, total, 0
        if shown:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                if sys.stderr.isatty():  # else a line per step: a log shows no bar
                    self._bar = tqdm(total=total, unit="step", dynamic_ncols=True, leave=False)

    def start(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(what)
        elif self._shown:
            print(f"[{self._finished + 1}/{self._total}] {what}", file=sys.stderr, flush=True)

    def done(self) -> None:
        self._finished += 1
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@dataclass
class Session:
    """One run.

    Attributes:
        threads: the numbers of threads to time with, the first of which is the main one.
        deadline: of the whole job; what does not fit is recorded as not run.
        seconds: for one comparison of two providers of an op.
        model_seconds, large_seconds: the same for a model, and for an op beyond the caches.
        failed: what a check refused; nothing of it is timed.
    """

    report: Report
    device: torch.device
    threads: tuple[int, ...]
    deadline: Deadline
    progress: Progress
    seconds: float = 0.2
    model_seconds: float = 2.0
    large_seconds: float = 1.2
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    failed: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[bool]:
        """One step of the progress bar; False where its time is over, and then a row says so."""
        self.progress.start(what)
        in_time = self.deadline.left() > 0
        if not in_time:
            self.report.add({"suite": "job", "case": what, "metric": "skipped"})
        yield in_time
        self.progress.done()

    def check(self, case: str, passed: bool, share: float | None, detail: str, group: str) -> bool:
        """Record a check; a failed one is printed at once.

        Args:
            share: the error as a part of what is allowed, at most 1 where it passed.
            detail: what was compared with what; for a failure, the figures.
            group: the line of the table that counts it.
        """
        row: Row = {"suite": "check", "group": group, "case": case, "metric": "error"}
        row["passed"] = passed
        if share is not None and share == share and share != float("inf"):
            row["share"] = share
        self.report.add({**row, "detail": detail})
        if not passed:
            self.failed.append(case)
            self.progress.say(f"CHECK FAILED: {case}: {detail}\nIts speed is not reported.")
        return passed

    def add_timing(
        self, suite: str, case: str, comparison: Comparison, threads: int, **facts: Any
    ) -> Row:
        """Record the times of eager and resops, whose outputs were checked before."""
        row: Row = {
            "suite": suite,
            "case": case,
            "metric": "time",
            "unit": "ms",
            "threads": threads,
            **facts,
            "checked": True,
            "providers": {
                name: comparison.milliseconds(name).as_dict() for name in comparison.seconds
            },
            "ratio": comparison.ratio(EAGER, RESOPS).as_dict(),
        }
        self.report.add(row)
        return row

    def add_saved(self, suite: str, case: str, eager: int, resops: int, **facts: Any) -> None:
        """Record the bytes that a forward pass keeps for the backward pass."""
        self.report.add(
            {
                "suite": suite,
                "case": case,
                "metric": "saved",
                "unit": "bytes",
                **facts,
                "providers": {EAGER: eager, RESOPS: resops},
            }
        )


def channels_last(model: Module, device: torch.device) -> Module:
    """The model itself, on the device, its convolution weights in channels-last."""
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def saved_bytes(forward: Any, exclude: Iterator[torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps from ``forward()``, each counted once.

    Args:
        forward: called without arguments; its result is kept alive while counting.
        exclude: tensors that are there anyway: parameters, buffers and the model's input.
    """
    there = {t.untyped_storage().data_ptr() for t in exclude}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    total = sum(kept.values())
    del result
    return total
