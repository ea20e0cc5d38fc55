"""Battery G: determinism and threads. Each test names the case that it stands for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from resops.functional import batch_norm_act, residual_add
from resops.nn import BatchNormAct2d
from tests.ops.batch_norm_oracle import Outputs, bits, random_case, run_ops
from tests.tensors import in_layout

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same_bits(a: Outputs, b: Outputs, what: str) -> None:
    for name, t in a.items():
        other = b[name]
        assert (t is None) == (other is None), name
        if t is not None and other is not None:
            assert torch.equal(bits(t), bits(other)), f"{name} differs {what}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_runs_have_the_same_bits(dtype: torch.dtype, layout: str) -> None:
    """G: C=1024, running_mean not starting at 0, 20 runs; 50 runs of forward and backward:
    bit-identical, and right."""
    for shape, runs in (((16, 1024, 4, 4), 20), ((24, 17, 23, 29), 50)):
        x = in_layout((torch.randn(shape) + 3).to(dtype), layout)
        case = random_case(x, residual=True, activation="relu").with_decided_signs()
        first = run_ops(case)
        case.check(first)
        for run in range(runs):
            assert_same_bits(first, run_ops(case), f"in run {run}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(16, 64, 28, 28), (3, 5, 150, 150), (2, 251, 28, 28), (40000, 24), (1, 1, 400, 500)]
)
def test_any_number_of_threads_gives_the_same_bits(
    shape: tuple[int, ...], layout: str, thread_count: None
) -> None:
    """G: same input, same bits, for any number of threads."""
    case = random_case(in_layout(torch.randn(shape) + 1, layout), residual=True, activation="relu")
    torch.set_num_threads(1)
    first = run_ops(case)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.get_num_threads() == threads
        assert_same_bits(first, run_ops(case), f"with {threads} threads")


def test_several_threads_one_module() -> None:
    """G: two Python threads, one module: no crash, and every output is right. In training both
    update the statistics, in some order."""
    layer: Any = BatchNormAct2d(16)
    x = torch.randn(8, 16, 20, 20)
    expected = torch.nn.functional.relu(
        torch.nn.functional.batch_norm(x, None, None, training=True)
    )
    outputs: list[torch.Tensor] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                leaf = x.clone().requires_grad_()
                y = layer(leaf)
                y.sum().backward()
                outputs.append(y.detach())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and len(outputs) == 60
    for y in outputs:
        assert torch.equal(y, outputs[0])
    torch.testing.assert_close(outputs[0], expected)
    assert layer.num_batches_tracked > 0 and layer.running_mean.isfinite().all()


@pytest.mark.parametrize("what", ["batch_norm_statistics", "batch_norm_act", "residual_add"])
def test_gil_is_released(what: str) -> None:
    """G: another Python thread runs while a kernel does: the op's, and those of the public
    functions, which do not go through torch.ops."""
    x = torch.randn(64, 64, 56, 56)
    call: Callable[[], Any] = {
        "batch_norm_statistics": lambda: torch.ops.resops.batch_norm_statistics(x),
        "batch_norm_act": lambda: batch_norm_act(x, None, None, training=True),
        "residual_add": lambda: residual_add(x, x, activation="relu"),
    }[what]
    call()
    ticks = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.0005)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # Python itself never takes the lock from the main thread
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        while ticks == 0:
            time.sleep(0.001)
        before = ticks
        for _ in range(10):
            call()
        during = ticks - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert during > 0


FORKED = """
import os, torch, resops
from resops.functional import batch_norm_act
x = torch.randn(16, 64, 28, 28)
expected = batch_norm_act(x, None, None, training=True)  # a parallel region, in the parent
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)  # torch itself hangs in a forked child otherwise
    y = batch_norm_act(x, None, None, training=True)
    os._exit(0 if torch.equal(y, expected) else 3)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
"""


def test_forked_child() -> None:
    """A forked child that sets one thread first computes, after a parallel region of its parent."""
    result = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert result.returncode == 0, result.stderr
