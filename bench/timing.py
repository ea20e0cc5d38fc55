"""Timing on a machine that is shared and noisy.

The providers of one comparison run alternately in one process, in rounds: a slow phase of the
machine hits all of them. Each round gives one time per provider and one ratio; what is reported is
the median of the times and the median of the *paired* ratios, each with its 20th and 80th
percentile, and the best time. A call that is short is repeated inside its sample, so that the clock
does not matter; a sample is still shorter than the time slices of the system, so that most samples
are whole ones even where other work is running.

A call whose memory is new is not timed for what it computes: the system fills each page with zeros
first, which takes longer than any kernel here takes to write it. Rounds in which somebody got new
memory are left out wherever enough others are left.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

SAMPLE_S = 1e-3  # a sample is at least about this long
NEW_PAGES = 256  # pages that the system may hand out within a round: 1 MiB
Call = Callable[[], object]


def percentile(values: Sequence[float], q: float) -> float:
    """The ``q`` quantile, 0 to 1, with linear interpolation between the two nearest values."""
    if not values:
        raise ValueError("percentile of no values")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Summary:
    """Median, 20th and 80th percentile and least of ``rounds`` values."""

    median: float
    p20: float
    p80: float
    least: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float], scale: float = 1.0) -> Summary:
        scaled = [value * scale for value in values]
        median, p20, p80 = (percentile(scaled, q) for q in (0.5, 0.2, 0.8))
        return cls(median, p20, p80, min(scaled), len(scaled))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Seconds per call: one value per provider and round."""

    seconds: dict[str, list[float]]

    def milliseconds(self, provider: str) -> Summary:
        return Summary.of(self.seconds[provider], 1e3)

    def ratio(self, baseline: str, candidate: str) -> Summary:
        """How many times faster the candidate is, from the ratio of each round."""
        pairs = zip(self.seconds[baseline], self.seconds[candidate], strict=True)
        return Summary.of([base / ours for base, ours in pairs])


class Deadline:
    """The time by which the whole job has to be over."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds left, 0 where none are."""
        return max(0.0, self._end - self._clock())


def _sample(call: Call, repeats: int, device: torch.device) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def _pages_received() -> int:
    """Pages of memory that the system has handed out to this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, and not inside the block."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def alternate(
    providers: Mapping[str, Call],
    *,
    budget_s: float,
    device: torch.device | str = "cpu",
    min_rounds: int = 5,
    max_rounds: int = 400,
    warmup: int = 2,
    sample_s: float = SAMPLE_S,
) -> Comparison:
    """Time all providers, alternately.

    Args:
        providers: name to a call without arguments.
        budget_s: seconds for everything, warm-up included; at least ``min_rounds`` rounds are run
            whatever they take, at most ``max_rounds``.
        warmup: untimed calls of each provider; the last of them sets how often the call is
            repeated within a sample.
        sample_s: the length that a sample should have.

    Returns:
        seconds per call, for every provider and round; every second round runs in reverse order.
        Only rounds without new memory, or all where there are fewer than ``min_rounds`` of them.
    """
    device = torch.device(device)
    repeats = {}
    with no_garbage_collection():
        begin = time.perf_counter()
        for name, call in providers.items():
            for _ in range(max(warmup, 1)):
                once = _sample(call, 1, device)
            repeats[name] = max(1, round(sample_s / max(once, 1e-9)))
        rounds: list[dict[str, float]] = []
        settled: list[dict[str, float]] = []
        order = list(providers.items())
        while len(rounds) < max_rounds:
            if len(rounds) >= min_rounds and time.perf_counter() - begin >= budget_s:
                break
            pages = _pages_received()
            timed = order if len(rounds) % 2 == 0 else order[::-1]
            rounds.append({name: _sample(call, repeats[name], device) for name, call in timed})
            if device.type == "cuda" or _pages_received() - pages <= NEW_PAGES:
                settled.append(rounds[-1])
    kept = settled if len(settled) >= min_rounds else rounds
    return Comparison({name: [times[name] for times in kept] for name in providers})


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let the kernels of torch and resops use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
