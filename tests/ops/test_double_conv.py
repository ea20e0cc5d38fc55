"""double_conv: values, gradients and what is saved, of one block and of blocks one after another.

The passes are bottleneck's, whose tests (test_bottleneck.py) have the options of the layers; here
is what is its own: no join, an input of several slices, and an output that is not kept twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import resops
from bench.session import saved_bytes
from resops.functional import double_conv
from resops.ops import activation_source
from resops.ops.double_conv import DoubleConvFunction
from resops.reference import double_conv as reference
from tests.dispatch import counted_calls
from tests.ops.residual_block_cases import (
    CONVOLUTIONS,
    assert_near_to_float64,
    fresh,
    layer,
    results,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("native", "one_thread")

F64 = torch.float64
NHWC = torch.channels_last
both_convolutions = pytest.mark.parametrize("how", CONVOLUTIONS)


def block(dtype: torch.dtype, width: int = 6, **kwargs: Any) -> list[Any]:
    """x and two layers; the first narrows it, as behind a skip connection."""
    n = kwargs.get("dimensions", 2)
    x = torch.randn(3, 2 * width, *(9, 7, 5)[:n]).to(dtype)
    layers = [layer(2 * width, width, 3, dtype, **kwargs), layer(width, width, 3, dtype, **kwargs)]
    return [x.requires_grad_(), *layers]


def of_slices(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """double_conv of x in three parts, which are not dense."""
    return double_conv(x.tensor_split([2, 5], 1), *args, **kwargs)


def of_dense_slices(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    parts = [t.contiguous(memory_format=NHWC) for t in x.tensor_split([2, 5], 1)]
    return double_conv(parts, *args, **kwargs)


FORMS: dict[str, Callable[..., Tensor]] = {"one tensor": double_conv, "slices": of_slices}
all_forms = pytest.mark.parametrize("form", FORMS)


def assert_equal_results(mine: dict[str, Tensor], its: dict[str, Tensor]) -> None:
    assert mine.keys() == its.keys()
    for name, t in mine.items():
        torch.testing.assert_close(t, its[name], rtol=1e-9, atol=1e-9, msg=name)


@all_forms
@both_convolutions
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_equal_to_the_definition(
    form: str, how: str, training: bool, activation: str | None
) -> None:
    args = block(F64, training=training)
    copied = fresh(args)
    with CONVOLUTIONS[how]():
        mine = results(FORMS[form], args, activation=activation)
    its = results(reference.double_conv, copied, activation or "identity", 0.01)
    assert_equal_results(mine, its)


@all_forms
@pytest.mark.parametrize("options", [{"conv_bias": True}, {"dimensions": 3}], ids=str)
def test_options_of_the_layers(form: str, options: dict[str, Any]) -> None:
    args = block(F64, **options)
    copied = fresh(args)
    args[2], copied[2] = (a[2]._replace(training=False) for a in (args, copied))
    mine = results(FORMS[form], args)
    assert_equal_results(mine, results(reference.double_conv, copied, "relu", 0.01))


@pytest.mark.parametrize("f", [double_conv, of_dense_slices])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_near_to_float64(f: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """With Winograd's kernels in float32, which read slices where they are."""
    args = block(dtype, width=16)
    args[0] = args[0].detach().contiguous(memory_format=NHWC).requires_grad_()
    before = fresh(args)
    with counted_calls() as calls:
        mine = results(f, args, activation="silu")
    winograd = dtype == torch.float32
    # Else concatenated: for the forward pass, and again for the gradient of the weight.
    assert calls["aten::cat"] == (0 if winograd or f is double_conv else 2)
    assert calls["conv_bn_act_forward"] == (2 if winograd else 0)
    assert_near_to_float64("double_conv", before, mine, 5e-5 if winograd else 0.0)


@all_forms
@both_convolutions
def test_any_subset_of_gradients(form: str, how: str) -> None:
    args = block(F64, conv_bias=True)
    full = results(FORMS[form], fresh(args))
    names = list(tensors_of(args))
    for wanted in [*[(name,) for name in names], *itertools.combinations(names[::3], 2)]:
        some = fresh(args)
        for name, t in tensors_of(some).items():
            t.requires_grad_(name in wanted)
        with CONVOLUTIONS[how]():
            found = results(FORMS[form], some)
        assert [n for n in found if n.startswith("grad_")] == [f"grad_{n}" for n in wanted]
        assert_equal_results(found, {name: full[name] for name in found})


def test_wrong_slices() -> None:
    x, *layers = block(torch.float32)
    with pytest.raises(RuntimeError, match=r"input\[1\] should be of size .* but got size"):
        double_conv([x[:, :6], x[:, 6:, 1:]], *layers)
    with pytest.raises(RuntimeError, match=r"input\[1\] should be torch.float32 on cpu"):
        double_conv([x[:, :6], x[:, 6:].double()], *layers)
    with pytest.raises(RuntimeError, match=r"conv1: Given groups=1, .* 12 channels, but got 11"):
        double_conv([x[:, :6], x[:, 6:11]], *layers)
    with pytest.raises(TypeError, match="argument 'input' must be Tensor, not list"):
        double_conv([], *layers)
    with pytest.raises(TypeError, match="argument 'conv2' must be ConvNorm, not None"):
        double_conv(x, layers[0], None)


# ---- blocks one after another ------------------------------------------------------------------


def two_blocks(dtype: torch.dtype = F64, width: int = 6) -> list[Any]:
    """x, a block, and one that takes the output of the first beside x."""
    x, *first = block(dtype, width)
    second = [layer(3 * width, width, 3, dtype), layer(width, width, 3, dtype)]
    return [x, *first, *second]


def skip(
    f: Callable[..., Tensor], args: list[Any], between: Callable[[Tensor], Tensor] = lambda y: y
) -> Tensor:
    x, *layers = args
    y = between(f(x, *layers[:2], activation="silu", negative_slope=0.01))
    x = x.to(y.dtype)
    slices = (y, x) if f is double_conv else torch.cat([y, x], 1)
    return f(slices, *layers[2:], activation="silu", negative_slope=0.01)


def gradients(y: Tensor, args: list[Any], **kwargs: Any) -> tuple[Tensor, ...]:
    grad_y = torch.cos(3 * torch.arange(y.numel(), dtype=F64)).view(y.shape).to(y)
    return torch.autograd.grad(y, list(tensors_of(args).values()), grad_y, **kwargs)


def in_place(y: Tensor) -> Tensor:
    return y.mul_(0.5)


def detached(y: Tensor) -> Tensor:
    return y.detach()


def as_view(y: Tensor) -> Tensor:
    return y.flatten(2).view_as(y)


BETWEEN = {"nothing": lambda y: y, "in_place": in_place, "detached": detached, "view": as_view}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_the_next_block_makes_of_the_output(between: str) -> None:
    args = two_blocks()
    copied = fresh(args)
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Any] = []
        value = activation_source.Source.value

        def recorded(source: activation_source.Source) -> Tensor:
            seen.append(source)
            return value(source)

        patch.setattr(activation_source.Source, "value", recorded)
        mine = gradients(skip(double_conv, args, BETWEEN[between]), args, allow_unused=True)
    assert len(seen) == (between == "nothing")  # that the output was computed again
    its = gradients(
        skip(reference.double_conv, copied, BETWEEN[between]), copied, allow_unused=True
    )
    for t, truth in zip(mine, its, strict=True):
        assert (t is None) == (truth is None)
        if t is not None:
            torch.testing.assert_close(t, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("around", ["checkpoint", "checkpoint of one", "offloaded"])
def test_hooks_of_the_graph(around: str) -> None:
    """Which take away what is kept: then the output itself is."""
    args = two_blocks()
    plain = gradients(skip(double_conv, args), args)
    copied = fresh(args)
    if around == "offloaded":
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
            y = skip(double_conv, copied)
    elif around == "checkpoint of one":

        def inner(x: Tensor) -> Tensor:
            return double_conv(x, *copied[1:3], activation="silu")

        y = checkpoint(inner, copied[0], use_reentrant=False)
        y = double_conv([y, copied[0]], *copied[3:], activation="silu")
    else:
        y = checkpoint(
            lambda x: skip(double_conv, [x, *copied[1:]]), copied[0], use_reentrant=False
        )
    for t, truth in zip(gradients(y, copied), plain, strict=True):
        torch.testing.assert_close(t, truth, rtol=1e-9, atol=1e-9)


def test_saved() -> None:
    """Four raw outputs, vectors, and one number at the place of the output of the first block."""
    args = two_blocks(torch.float32, 16)
    args[0] = torch.randn(2, 32, 24, 24).contiguous(memory_format=NHWC).requires_grad_()
    kept = saved_bytes(lambda: skip(double_conv, args), iter(tensors_of(args).values()))
    vectors = 4 * 2 * 16 * 4
    assert kept == 4 * 2 * 24 * 24 * (4 * 16) + vectors + 4


def test_what_is_kept_is_released() -> None:
    args = two_blocks()
    y = double_conv(args[0], *args[1:3])
    node: Any = y.grad_fn
    assert type(node).__name__ == f"{DoubleConvFunction.__name__}Backward"
    assert activation_source.source_of(y) is not None
    y.sum().backward()
    assert node.published.c() is None and activation_source.source_of(y) is None


def test_a_weight_that_is_changed_in_between() -> None:
    args = two_blocks()
    y = double_conv(args[0], *args[1:3])
    with torch.no_grad():
        args[2].bias.add_(1)
    assert activation_source.source_of(y) is None
    y = double_conv(args[0], *args[1:3])
    z = double_conv([y, args[0]], *args[3:])
    with torch.no_grad():
        args[2].bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_second_derivatives() -> None:
    """Through the output that is not kept, too: of a function of it that is not linear."""
    args = two_blocks(width=2)
    args[0] = torch.randn(2, 4, 4, 3, dtype=F64, requires_grad=True)

    def both(g: Callable[..., Tensor], args: list[Any]) -> tuple[Tensor, ...]:
        first = gradients(skip(g, args), args, create_graph=True)
        penalty = torch.stack([t.square().sum() for t in first]).sum()
        return torch.autograd.grad(penalty, list(tensors_of(args).values()))

    mine, its = both(double_conv, args), both(reference.double_conv, fresh(args))
    for t, truth in zip(mine, its, strict=True):
        torch.testing.assert_close(t, truth, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    args = two_blocks()
    compiled = torch.compile(skip, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    mine = gradients(compiled(double_conv, args), args)
    for t, truth in zip(mine, gradients(skip(double_conv, args), args), strict=True):
        torch.testing.assert_close(t, truth, rtol=1e-9, atol=1e-9)


def test_autocast() -> None:
    args = two_blocks(torch.float32)
    found = []
    for f in (double_conv, reference.double_conv):
        copied = fresh(args)
        with torch.autocast("cpu", torch.bfloat16):
            y = skip(f, copied)
        assert y.dtype == torch.bfloat16
        found.append([t.double() for t in gradients(y, copied)])
        assert all(t.dtype == torch.float32 for t in gradients(skip(f, copied), copied))
    copied = fresh(args, F64)
    exact = gradients(skip(reference.double_conv, copied), copied)
    for mine, its, truth in zip(*found, exact, strict=True):
        errors = [float((t - truth).norm() / truth.norm()) for t in (mine, its)]
        assert errors[0] <= 3 * errors[1] + 2 * 4 * 2**-8, errors


def test_reference_backend() -> None:
    x, *layers = block(torch.float32)
    with resops.backend("reference"), counted_calls() as calls:
        y = double_conv([x[:, :4], x[:, 4:]], *layers)
    assert not any(name.startswith("resops") for name in calls)
    torch.testing.assert_close(double_conv(x, *fresh([x, *layers])[1:]), y, rtol=1e-4, atol=1e-4)
