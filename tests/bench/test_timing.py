from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import torch

from bench import timing
from bench.timing import Comparison, Deadline, Summary, alternate, percentile


def test_percentile_interpolates_between_sorted_values() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([10.0, 0.0], 0.2) == pytest.approx(2.0)
    assert percentile([7.0], 0.8) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_summary_scales() -> None:
    assert Summary.of([1.0, 2.0, 3.0], 1e3) == Summary(2000.0, 1400.0, 2600.0, 1000.0, 3)


def test_the_ratio_is_paired() -> None:
    """A slow phase that hits both providers of some rounds leaves every ratio as it is."""
    eager = [2.0, 2.0, 2.0, 20.0, 20.0]
    ours = [1.0, 1.0, 1.0, 10.0, 10.0]
    ratio = Comparison({"eager": eager, "resops": ours}).ratio("eager", "resops")
    assert (ratio.p20, ratio.median, ratio.p80, ratio.rounds) == (2.0, 2.0, 2.0, 5)


def test_ratio_refuses_rounds_that_do_not_pair() -> None:
    with pytest.raises(ValueError):
        Comparison({"a": [1.0, 2.0], "b": [1.0]}).ratio("a", "b")


def test_providers_alternate_and_the_order_is_reversed_every_second_round() -> None:
    calls: list[str] = []
    providers = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = alternate(providers, budget_s=0.0, min_rounds=4, max_rounds=4, warmup=1, sample_s=0.0)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert {len(seconds) for seconds in found.seconds.values()} == {4}


def test_short_calls_are_repeated_within_a_sample() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    alternate({"a": call}, budget_s=0.0, min_rounds=2, max_rounds=2, sample_s=1e-3)
    assert count > 100


def test_the_budget_ends_the_rounds_but_not_before_the_least_number() -> None:
    def call() -> None:
        time.sleep(0.01)

    found = alternate({"a": call}, budget_s=0.1, min_rounds=2, warmup=1)
    assert 2 <= len(found.seconds["a"]) <= 9
    assert len(alternate({"a": call}, budget_s=0.0, min_rounds=3).seconds["a"]) == 3
    assert percentile(found.seconds["a"], 0.5) == pytest.approx(0.01, rel=1.0)


def test_rounds_with_new_memory_are_left_out_where_enough_others_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = 0

    def sample(every: int) -> Callable[..., float]:
        calls = itertools.count(1)

        def run(*_: object) -> float:
            nonlocal pages
            is_new = next(calls) % every == 0
            pages += 2 * timing.NEW_PAGES if is_new else 0
            return 9.0 if is_new else 1.0

        return run

    monkeypatch.setattr(timing, "_pages_received", lambda: pages)
    monkeypatch.setattr(timing, "_sample", sample(3))
    found = alternate({"a": int}, budget_s=60.0, min_rounds=4, max_rounds=9)
    assert found.seconds["a"] == [1.0] * 6
    # Where every other round has new memory, too few are left.
    monkeypatch.setattr(timing, "_sample", sample(2))
    found = alternate({"a": int}, budget_s=60.0, min_rounds=4, max_rounds=6)
    assert sorted(found.seconds["a"]) == [1.0] * 3 + [9.0] * 3


def test_garbage_collection_is_as_before() -> None:
    import gc

    assert gc.isenabled()
    with timing.no_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_threads_are_as_before_after_an_error() -> None:
    before = torch.get_num_threads()
    inside = []

    def fail() -> None:
        with timing.threads(before + 1):
            inside.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


def test_deadline() -> None:
    now = [10.0]
    deadline = Deadline(5.0, clock=lambda: now[0])
    now[0] = 12.0
    assert deadline.left() == 3.0
    now[0] = 99.0
    assert deadline.left() == 0.0
