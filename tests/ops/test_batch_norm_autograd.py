"""Battery D: autograd. Each test names the case that it stands for."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import resops
from resops.functional import batch_norm_act
from tests.dispatch import counted_calls, native_calls
from tests.ops.batch_norm_oracle import (
    ACTIVATIONS,
    GRADS,
    random_case,
    run_functional,
    run_native,
)

pytestmark = pytest.mark.usefixtures("native")

NAMES = ("x", "residual", "weight", "bias")


def buffers(channels: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.full((channels,), 0.5, dtype=dtype), torch.full((channels,), 2.0, dtype=dtype)


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Collects what save_for_backward keeps."""
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield packed


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_evaluation_backward(residual: bool, activation: str, capability: str) -> None:
    """D: eval-mode backward: grad_x = g w rsqrt(rv + eps), grad_weight from the running
    statistics; repeatable."""
    case = random_case(
        torch.randn(4, 5, 3, 3) + 7, residual=residual, training=False, activation=activation
    ).with_decided_signs()
    first, second = run_native(case), run_native(case)
    case.check(first)
    for name in GRADS:
        a, b = first.get(name), second.get(name)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("which", ["x", "weight", "residual"])
def test_saved_tensor_modified_in_place(which: str, activation: str) -> None:
    """D: an input modified in place before backward: RuntimeError (version counter)."""
    x, residual = torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3)
    weight, bias = torch.rand(5).requires_grad_(), torch.rand(5).requires_grad_()
    leaf = x.clone().requires_grad_()
    inner, r = leaf * 1, residual * 1
    scaled = weight * 1
    y = batch_norm_act(inner, None, None, scaled, bias, True, residual=r, activation=activation)
    with torch.no_grad():
        {"x": inner, "weight": scaled, "residual": r}[which].add_(1)
    if which == "residual" and activation == "relu":
        y.sum().backward()  # only the mask of it is kept, so it may change
        assert leaf.grad is not None
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_version_counters_of_running_statistics() -> None:
    """D: running statistics are updated without a bump of their version counters, as torch's are;
    evaluation saves its own copies of mean and invstd."""
    mean, var = buffers()
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    versions = mean._version, var._version
    batch_norm_act(x, mean, var, training=True)
    assert (mean._version, var._version) == versions
    y = batch_norm_act(x, mean, var, training=False, activation=None)
    with torch.no_grad():
        mean.zero_()
        var.fill_(100.0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    m, v = buffers()
    batch_norm_act(x.detach(), m, v, training=True)
    expected = torch.rsqrt(v + 1e-5).view(1, 5, 1, 1).expand_as(x)
    # Two roundings: of the root and of the product with the gradient.
    torch.testing.assert_close(grad, expected, rtol=4 * 2.0**-24, atol=0)


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize(
    "subset", [s for n in range(5) for s in itertools.combinations(NAMES, n)], ids="+".join
)
def test_every_subset_of_requires_grad(subset: tuple[str, ...], activation: str) -> None:
    """D: every subset of requires_grad over (x, w, b, residual): only those gradients, with the
    values that they have when all are asked for."""
    for training in (True, False):
        case = random_case(
            torch.randn(4, 5, 3, 3), residual=True, training=training, activation=activation
        )
        everything = run_functional(case)
        some = run_functional(case, requires_grad=" ".join(subset))
        for name in NAMES:
            grad, wanted = some.get(f"grad_{name}"), everything[f"grad_{name}"]
            if name in subset:
                assert grad is not None and wanted is not None and torch.equal(grad, wanted), name
            else:
                assert grad is None, name


def test_nothing_is_saved_without_grad() -> None:
    """D: no_grad and inference_mode forward in training: statistics update, nothing is saved."""
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    for context in (torch.no_grad, torch.inference_mode):
        mean, var = buffers()
        with context(), saved_tensors() as packed, counted_calls() as calls:
            y = batch_norm_act(x, mean, var, training=True)
        assert not y.requires_grad and y.grad_fn is None and not packed
        assert native_calls(calls) == {"batch_norm_forward": 1}
        assert not torch.equal(mean, buffers()[0]) and not torch.equal(var, buffers()[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved(dtype: torch.dtype, residual: bool, activation: str) -> None:
    """D: tensors are kept with save_for_backward only, where saved_tensors_hooks see them; large
    ones are x, and with a residual one bit per element (relu, leaky_relu) or the residual
    (silu, gelu): never y."""
    x = torch.randn(4, 16, 12, 12).to(dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    r = torch.randn_like(x) if residual else None
    with saved_tensors() as packed:
        y = batch_norm_act(
            x,
            *buffers(16),
            torch.ones(16),
            torch.zeros(16),
            True,
            residual=r,
            activation=activation,
        )
    large = [t for t in packed if t.numel() > 16]
    expected = x.nbytes
    if residual and activation in ("relu", "leaky_relu"):
        expected += x.numel() // 8
    elif residual and activation in ("silu", "gelu"):
        expected += x.nbytes
    assert sum(t.nbytes for t in large) == expected, [(t.shape, t.dtype) for t in large]
    assert all(t.data_ptr() != y.data_ptr() for t in packed)
    y.sum().backward()
    assert x.grad is not None


def test_saved_tensors_hooks_can_replace() -> None:
    """D: saved_tensors_hooks that pack to another copy give the same gradients."""
    grads = []
    for hook in (None, lambda t: t.clone()):
        x = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        if hook is None:
            y = batch_norm_act(x, None, None, training=True, residual=x * 2)
        else:
            with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
                y = batch_norm_act(x, None, None, training=True, residual=x * 2)
        y.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_no_leak() -> None:
    """D: 1000 steps leave no tensor behind, also when backward never runs."""

    def live_tensors() -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    x = torch.randn(2, 5, 3, 3, requires_grad=True)
    mean, var = buffers()

    def step(i: int) -> None:
        y = batch_norm_act(x, mean, var, training=True, residual=x.detach(), activation="relu")
        if i % 2:
            y.sum().backward()

    for i in range(10):
        step(i)
    before = live_tensors()
    for i in range(1000):
        step(i)
    assert live_tensors() <= before + 2


def test_no_reference_cycle() -> None:
    """D: the graph is freed when the output is, without the garbage collector."""
    import weakref

    gc.collect()
    gc.disable()
    try:
        x = torch.randn(2, 5, 3, 3, requires_grad=True)
        inner = x * 1
        alive = weakref.ref(inner)
        y = batch_norm_act(inner, None, None, training=True)
        del inner
        assert alive() is not None
        del y
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    """D: checkpointed (reentrant or not): gradients = plain; running statistics are updated twice,
    exactly as torch's are."""

    def run(
        f: Callable[..., Tensor], checkpointed: bool, mean: Tensor, var: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        x = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        w = torch.ones(5, requires_grad=True)

        def block(t: Tensor) -> Tensor:
            return f(t, mean, var, w, None, True).square()

        y = checkpoint(block, x, use_reentrant=use_reentrant) if checkpointed else block(x)
        y.sum().backward()
        return x.grad, w.grad

    def torch_block(*args: Any) -> Tensor:
        return F.relu(F.batch_norm(*args))

    plain, ours, theirs = buffers(), buffers(), buffers()
    expected = run(batch_norm_act, False, *plain)
    got = run(batch_norm_act, True, *ours)
    run(torch_block, True, *theirs)
    for a, b in zip(expected, got, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    for mine, of_torch, once in zip(ours, theirs, plain, strict=True):
        torch.testing.assert_close(mine, of_torch)
        assert not torch.equal(mine, once)


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_not_differentiable(which: str, training: bool) -> None:
    """D: running statistics are non-differentiable: one that requires grad is an error, as in
    torch."""
    statistics = dict(zip(("running_mean", "running_var"), buffers(), strict=True))
    statistics[which].requires_grad_()
    message = f"not differentiable with respect to argument '{which}'"
    for f in (batch_norm_act, F.batch_norm):
        with pytest.raises(RuntimeError, match=message):
            f(torch.randn(2, 5, 3, 3), **statistics, training=training)


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "gelu"])
def test_unused_outputs_and_partial_graphs(activation: str) -> None:
    """D: some outputs unused: gradients of some inputs only, through torch.autograd.grad, and a
    second output of the graph that is never used."""
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    residual = torch.randn(4, 5, 3, 3, requires_grad=True)
    weight = torch.rand(5, requires_grad=True)
    y = batch_norm_act(x, None, None, weight, None, True, residual=residual, activation=activation)
    unused = batch_norm_act(x, None, None, training=True)
    assert unused.requires_grad
    (only_weight,) = torch.autograd.grad(y.sum(), weight, retain_graph=True)
    (only_residual,) = torch.autograd.grad(y.sum(), residual, retain_graph=True)
    grads = torch.autograd.grad(y.sum(), (x, residual, weight))
    assert torch.equal(only_weight, grads[2]) and torch.equal(only_residual, grads[1])
    (no_gradient,) = torch.autograd.grad(unused.sum(), residual, allow_unused=True)
    assert no_gradient is None


def test_backward_through_undefined_gradient() -> None:
    """D: set_materialize_grads(False): where no gradient arrives, None goes on."""

    class Swallow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            ctx.set_materialize_grads(False)
            return t.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> None:
            return None

    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    with counted_calls() as calls:
        y = batch_norm_act(x, None, None, training=True)
        Swallow.apply(y).sum().backward()
    assert x.grad is None or not x.grad.any()
    assert native_calls(calls) == {"batch_norm_forward": 1}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_accumulate_and_repeat(training: bool, residual: bool, activation: str) -> None:
    """retain_graph: a second backward gives the same again."""
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    r = torch.randn(4, 5, 3, 3) if residual else None
    y = batch_norm_act(x, *buffers(), training=training, residual=r, activation=activation)
    y.sum().backward(retain_graph=True)
    assert x.grad is not None
    once = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * once)


def test_backend_of_the_forward_pass_runs_the_backward() -> None:
    """The choice made in forward is kept for backward, wherever that runs."""
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    y = batch_norm_act(x, None, None, training=True)
    with resops.backend("reference"), counted_calls() as calls:
        y.sum().backward()
    assert native_calls(calls) == {"batch_norm_backward": 1}
    with resops.backend("reference"), counted_calls() as calls:
        y = batch_norm_act(x, None, None, training=True)
    with counted_calls() as backward_calls:
        y.sum().backward()
    assert native_calls(calls) == {} and native_calls(backward_calls) == {}
    assert "aten::native_batch_norm" in calls


def test_forward_mode() -> None:
    """F: forward-mode AD, by itself and through torch.func.jvp: PyTorch's own ops compute."""
    import torch.autograd.forward_ad as forward_ad

    x, tangent = torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3)

    def ours(t: Tensor) -> Tensor:
        return batch_norm_act(t, None, None, training=True)

    def stock(t: Tensor) -> Tensor:
        return torch.relu(torch.nn.functional.batch_norm(t, None, None, training=True))

    def dual(f: Callable[[Tensor], Tensor]) -> Any:
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))))

    for derive in (dual, lambda f: torch.func.jvp(f, (x,), (tangent,))):
        torch.testing.assert_close(derive(ours), derive(stock), rtol=0, atol=0)  # the same ops


def test_vmap() -> None:
    """F: torch.vmap over the op in evaluation, as stock layers allow it."""
    x = torch.randn(3, 4, 5, 3, 3)
    mean, var = torch.randn(5), torch.rand(5) + 0.5
    mapped = torch.vmap(lambda t: batch_norm_act(t, mean, var))(x)
    torch.testing.assert_close(mapped, torch.stack([batch_norm_act(t, mean, var) for t in x]))


def test_func_grad() -> None:
    """torch.func.grad gives autograd's gradient."""
    x = torch.randn(4, 5, 3, 3)

    def loss(t: Tensor) -> Tensor:
        return batch_norm_act(t, None, None, training=True, activation="silu").square().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    # functorch builds the graph of the backward pass too: the differentiable formulas compute it.
    torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """F: CPU autocast: the convolution in low precision, batch norm in its input's dtype with fp32
    parameters and statistics; the dtype of the gradient is that of the input."""
    conv = torch.nn.Conv2d(3, 8, 3, bias=False)
    weight, bias = torch.rand(8, requires_grad=True), torch.rand(8, requires_grad=True)
    mean, var = torch.zeros(8), torch.ones(8)
    x = torch.randn(4, 3, 9, 9)
    seen: list[torch.dtype] = []
    with torch.autocast("cpu", dtype=dtype):
        z = conv(x)
        assert z.dtype == dtype
        z.register_hook(lambda g: seen.append(g.dtype))
        with counted_calls() as calls:
            y = batch_norm_act(z, mean, var, weight, bias, True, residual=z.detach().float())
        assert native_calls(calls) == {"batch_norm_forward": 1}
    assert mean.dtype == torch.float32 and mean.abs().sum() > 0
    y.float().sum().backward()
    assert seen == [dtype]
    assert conv.weight.grad is not None and conv.weight.grad.dtype == torch.float32
    for p in (weight, bias):
        assert p.grad is not None and p.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        plain = batch_norm_act(z.detach(), mean, var, weight, bias, True)
    assert plain.dtype == dtype
