"""What only a GPU can show of the CUDA ops: the ops in torch's own surroundings there, graphs,
streams, and more than 2^31 elements. tests/simt/test_bindings.py has the values, and runs on a GPU
as well where there is one.

RESOPS_TEST_DEVICE=cpu runs the part of this file that needs no CUDA, to try the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resops
from resops import _dispatch
from resops.functional import (
    batch_norm_act,
    batch_norm_act_max_pool,
    dense_block,
    residual_add,
)
from tests.accuracy import Exact, assert_rule_R, to_numpy
from tests.dispatch import counted_calls, native_calls
from tests.ops import dense_block_cases

DEVICE = os.environ.get("RESOPS_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
pytestmark = pytest.mark.skipif(
    ON_GPU
    and not (torch.cuda.is_available() and "cuda" in _dispatch._KERNELS["native"]["batch_norm"]),
    reason="no GPU, or the extension was built without CUDA",
)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="about CUDA itself")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    """By name: on a GPU ``auto`` does not take these kernels yet."""
    with resops.backend("native"):
        yield


def inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual, channels-last, and a gradient; kappa is about 3."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(shift: float) -> Tensor:
        t = torch.randn(shape, generator=generator, device=DEVICE).add_(shift)
        return t.to(dtype, memory_format=torch.channels_last)

    return random(3), random(0), random(0)


def layer(channels: int) -> resops.nn.BatchNormAct2d:
    torch.manual_seed(1)
    made = resops.nn.BatchNormAct2d(channels).to(DEVICE)
    torch.nn.init.uniform_(made.weight, 0.5, 1.5)
    torch.nn.init.uniform_(made.bias)
    return made


def forward_and_backward(
    call: Callable[[Tensor, Tensor], Tensor], x: Tensor, residual: Tensor, grad: Tensor
) -> list[Tensor]:
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    y = call(x, residual)
    return [y.detach(), *torch.autograd.grad(y, (x, residual), grad)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 64, 14, 14), (4, 17, 7, 9), (2, 3, 5, 5)], ids=str)
def test_native_ops_run_and_give_the_same_bits_twice(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, residual, grad = inputs(dtype, *shape)
    results = []
    for _ in range(2):
        norm = layer(shape[1])
        with counted_calls() as calls:
            results.append([*forward_and_backward(norm, x, residual, grad), norm.running_var])
        assert native_calls(calls) == {"batch_norm_backward": 1, "batch_norm_forward": 1}
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_opcheck(dtype: torch.dtype, activation: str) -> None:
    x, residual, grad = inputs(dtype, 4, 9, 3, 5)
    ops = torch.ops.resops
    weight, bias = (torch.rand(9, device=DEVICE) for _ in range(2))
    act = (activation, 0.1)
    forward = (x, residual, weight, bias, None, None, True, 0.1, 1e-5, *act)
    torch.library.opcheck(ops.batch_norm_forward.default, forward)
    _, mean, invstd, mask = ops.batch_norm_forward(*forward)
    kept = residual if activation == "silu" else None
    saved = (grad, x, kept, mask, weight, bias, mean, invstd)
    torch.library.opcheck(ops.batch_norm_statistics.default, (x,))
    torch.library.opcheck(ops.batch_norm_apply.default, (*forward[:4], mean, invstd, *act))
    torch.library.opcheck(ops.batch_norm_backward_reduce.default, (*saved, *act))
    torch.library.opcheck(
        ops.batch_norm_backward_apply.default, (*saved, mean, invstd, *act, True, True)
    )
    torch.library.opcheck(ops.batch_norm_backward.default, (*saved, True, *act, [True] * 4))
    added = (x, residual, weight[:1], None, 1.0, 0.5, False, *act)
    torch.library.opcheck(ops.residual_add_forward.default, added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_gives_the_same_bits(dtype: torch.dtype) -> None:
    x, residual, grad = inputs(dtype, 4, 16, 7, 7)
    results = []
    for compiled in (False, True):
        norm = layer(16)
        call = torch.compile(norm, fullgraph=True) if compiled else norm
        results.append(forward_and_backward(call, x, residual, grad))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced) and eager.stride() == traced.stride()


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_dense_block(training: bool) -> None:
    """A block on its own kernels, against PyTorch's ops on the same device."""

    def there(t: Tensor) -> Tensor:
        return t.detach().to(DEVICE).requires_grad_(t.requires_grad)

    torch.manual_seed(2)
    args = dense_block_cases.map_tensors(
        there,
        dense_block_cases.block(
            torch.float32, layers=2, channels=8, size=(4, 12, 10), training=training
        ),
    )
    its = dense_block_cases.results(dense_block_cases.definition, dense_block_cases.fresh(args))
    with counted_calls() as calls:
        mine = dense_block_cases.results(dense_block, dense_block_cases.fresh(args))
    assert calls["dense_block_accumulate"] == 3
    assert calls["dense_block_update_running"] == int(training)
    for name, t in its.items():
        # Of the size of TF32's rounding, which the library's convolutions may have.
        error = float((mine[name] - t).norm() / t.norm().clamp_min(1e-3))
        assert error <= 5e-3, (name, error)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replay_of_a_graph(dtype: torch.dtype) -> None:
    """Captured once, replayed with other data; workspaces belong to the graph."""
    x, residual, grad = inputs(dtype, 8, 64, 14, 14)
    norm = layer(64)

    def step() -> list[Tensor]:
        return forward_and_backward(norm, x, residual, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for scale in (1.0, 0.5):
        x.mul_(scale)
        graph.replay()
        torch.cuda.synchronize()
        for replayed, eager in zip(captured, step(), strict=True):
            assert torch.equal(replayed, eager)


@needs_gpu
@pytest.mark.parametrize("scheme", ["two_reads", "reverse", "single_read"])
@pytest.mark.parametrize("shape", [(32, 2048, 7, 7), (32, 512, 14, 14), (64, 64, 56, 56)], ids=str)
def test_schemes_agree_and_are_captured(
    shape: tuple[int, ...], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way to read, in eager and in a graph, cooperative launches too; two schemes agree to
    rounding, one agrees with itself to the bit."""
    x, residual, grad = inputs(torch.bfloat16, *shape)
    norm = layer(shape[1])
    want = forward_and_backward(norm, x, residual, grad)
    monkeypatch.setenv("RESOPS_CUDA_BATCH_NORM", scheme)
    got = forward_and_backward(norm, x, residual, grad)
    for a, b in zip(got, want, strict=True):
        # A sign of z within rounding of 0 may differ, and with it one element of a gradient.
        assert ((a.float() - b.float()).norm() <= 2**-7 * b.float().norm()).item()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_backward(norm, x, residual, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(norm, x, residual, grad)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_batch_norm_act_max_pool(layout: torch.memory_format) -> None:
    """The native op, its checks by opcheck, the same bits twice and compiled."""
    x = inputs(torch.bfloat16, 4, 16, 12, 10)[0].contiguous(memory_format=layout)
    norm = layer(16)

    def stem(x: Tensor) -> Tensor:
        return batch_norm_act_max_pool(
            x, None, None, norm.weight, norm.bias, True, kernel_size=3, stride=2, padding=1
        )

    leaf = x.requires_grad_()
    results = []
    for call in (stem, stem, torch.compile(stem, fullgraph=True)):
        y = call(leaf)
        results.append((y.detach(), torch.autograd.grad(y.sum(), leaf)[0]))
    with counted_calls() as calls:
        stem(leaf)
    assert native_calls(calls) == {"batch_norm_act_max_pool_forward": 1}
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
    arguments: tuple[Any, ...] = (
        x.detach(),
        norm.weight.detach(),
        norm.bias.detach(),
        None,
        None,
        True,
        0.1,
        1e-5,
    )
    arguments += ("relu", 0.0, [3, 3], [2, 2], [1, 1])
    torch.library.opcheck(torch.ops.resops.batch_norm_act_max_pool_forward.default, arguments)


@needs_gpu
def test_work_is_put_on_the_current_stream() -> None:
    """On a side stream behind a long wait: a kernel on another stream would read old data."""
    x, residual, grad = inputs(torch.float32, 8, 64, 28, 28)
    norm = layer(64)
    want = forward_and_backward(norm, x, residual, grad)
    late = torch.full_like(x, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        got = forward_and_backward(norm, late, residual, grad)
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize("batch", [65535, 65537, 131073, 880801])
def test_large_batches(batch: int) -> None:
    """Grids beyond what one dimension of a launch takes."""
    for shape in ((batch, 3), (batch, 1, 1, 1), (batch, 2, 3, 1)):
        x = torch.randn(shape, device=DEVICE)
        got = batch_norm_act(x, None, None, training=True, activation=None)
        want = F.batch_norm(x.double(), None, None, training=True)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)
        per_sample = torch.rand(batch, device=DEVICE)
        want = x + per_sample.view(-1, *[1] * (x.dim() - 1)) * x
        torch.testing.assert_close(residual_add(x, x, 1.0, per_sample), want)


@needs_gpu
@pytest.mark.parametrize("channels_last", [True, False])
def test_more_than_2_to_the_31_elements(channels_last: bool) -> None:
    """Exact data: every element is checked, by what comes out of integers."""
    n, c, side = 33, 64, 1024  # 33 * 2^26 elements, 4.4 GB
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GB of free GPU memory")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(n, c, side, side, dtype=torch.bfloat16, device=DEVICE, memory_format=layout)
    # Mean 2 and deviation 1 in every channel, whatever the order.
    x[..., 0::2] = 1
    x[..., 1::2] = 3
    y, mean, invstd, _ = torch.ops.resops.batch_norm_forward(
        x, None, None, None, None, None, True, 0.1, 1e-5, "relu", 0.0
    )
    assert torch.equal(mean, torch.full_like(mean, 2.0))
    torch.testing.assert_close(invstd, torch.ones_like(invstd), rtol=1e-5, atol=0)
    assert bool((y[..., 0::2] == 0).all()) and bool((y[..., 1::2] == 1).all())
    added, _ = torch.ops.resops.residual_add_forward(
        x, y, None, None, 1.0, 1.0, False, "identity", 0.0
    )
    assert bool((added[..., 0::2] == 1).all()) and bool((added[..., 1::2] == 4).all())
    del y, added
    # With statistics held fixed the gradient of x is that of y, where relu passes it.
    grad_x, _, grad_weight, grad_bias = torch.ops.resops.batch_norm_backward(
        *(torch.ones_like(x), x, None, None, None, None, mean, invstd),
        *(False, "relu", 0.0, [True, False, True, True]),
    )
    assert bool((grad_x[..., 0::2] == 0).all()) and bool((grad_x[..., 1::2] == 1).all())
    passed = torch.full_like(mean, n * side * side / 2)
    assert torch.equal(grad_bias, passed)
    torch.testing.assert_close(grad_weight, passed, rtol=1e-5, atol=0)


@needs_gpu
def test_a_wrong_argument_raises_before_a_kernel_runs() -> None:
    x, residual, _ = inputs(torch.float32, 2, 3, 4, 4)
    rest: tuple[Any, ...] = (None, None, None, None, True, 0.1, 1e-5, "relu", 0.0)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ops.resops.batch_norm_forward(x, residual.cpu(), *rest)
    with pytest.raises(NotImplementedError, match="not implemented for 'Double' by the CUDA"):
        torch.ops.resops.batch_norm_forward(x.double(), None, *rest)
    torch.cuda.synchronize()


# ---- conv_bn_act --------------------------------------------------------------------------------

HALF = [torch.bfloat16, torch.float16]


def convolution(dtype: torch.dtype, kernel: int, channels: int = 64) -> tuple[Any, ...]:
    """x, weight and bias; channels-last."""
    generator = torch.Generator(DEVICE).manual_seed(2)

    def random(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator, device=DEVICE) / shape[-3] ** 0.5
        return t.to(dtype, memory_format=torch.channels_last)

    bias = torch.randn(channels, generator=generator, device=DEVICE)
    return random(4, 64, 14, 14), random(channels, 64, kernel, kernel), bias


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_opcheck_of_the_convolution(kernel: int, dtype: torch.dtype) -> None:
    x, weight, bias = convolution(dtype, kernel)
    scale, shift = torch.rand(64, device=DEVICE), torch.rand(64, device=DEVICE)
    geometry = ([1, 1], [kernel // 2] * 2, [1, 1])
    for statistics, activation in ((True, "identity"), (False, "relu")):
        arguments = ([x], scale, shift, "relu", 0.0, weight, bias, None, activation, 0.0)
        op = torch.ops.resops.conv_bn_act_forward.default
        torch.library.opcheck(op, (*arguments, *geometry, statistics))


@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_folded_convolution(residual: bool, kernel: int, dtype: torch.dtype, backend: str) -> None:
    """Against float64, eager and replayed, by the kernel that `path` names; a NaN stays one."""
    x, weight, _ = convolution(dtype, kernel)
    made: Any = resops.nn.Conv2dNormActivation(64, 64, kernel).to(DEVICE).eval()
    conv, norm = made[0].to(dtype), made[1]
    with torch.no_grad():
        conv.weight.copy_(weight)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)[:, None, None]
        shift = norm.running_mean.double()[:, None, None] * scale
        wide_x, wide_weight = x.double(), weight.double()
        value = F.conv2d(wide_x, wide_weight, padding=kernel // 2) * scale - shift
        terms = F.conv2d(wide_x.abs(), wide_weight.abs(), padding=kernel // 2) * scale + shift.abs()
        if residual:
            value, terms = value + x, terms + x.abs()
    exact = Exact(to_numpy(value.relu(), dtype), to_numpy(terms, dtype))
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)

    def call() -> Tensor:
        with torch.inference_mode(), resops.backend(backend):
            y: Tensor = made(x, x if residual else None)
            return y

    with counted_calls() as calls:
        y = call()
    assert_rule_R("y", y, None, exact, dtype)
    if ON_GPU:
        assert native_calls(calls) == ({"conv_bn_act_forward": 1} if backend == "native" else {})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        graph.replay()
        torch.cuda.synchronize()
        assert_rule_R("y of a graph", captured, None, exact, dtype)
    x[1, :, 3, 4] = torch.nan
    assert bool(call()[1, :, 3, 4].isnan().all())
