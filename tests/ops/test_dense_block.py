"""dense_block and transition: values, gradients, what is saved, and what is refused.

The truth is the definition in float64 at the rounded inputs. In less than float64 a relu that
changes its side moves a gradient by more than any rounding, so that there whole blocks are
compared where no argument of a relu is near 0 (biases of 3); the signs are tested in float64, and
consumer by consumer, where both sides see the same inputs (test_dense_block_phases.py).
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resops
from bench.session import saved_bytes
from resops.functional import DenseLayer, NormConv, dense_block, transition
from resops.ops.dense_block import fallback_reason
from tests.accuracy import UNIT_ROUNDOFF
from tests.dispatch import counted_calls
from tests.ops.dense_block_cases import (
    Block,
    block,
    definition,
    fresh,
    gradient_like,
    map_tensors,
    norm_conv,
    parts_of,
    results,
    tensors_of,
)
from tests.ops.residual_block_cases import CONVOLUTIONS

pytestmark = pytest.mark.usefixtures("native", "one_thread")

F64 = torch.float64
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])


def assert_equal_results(mine: dict[str, Tensor], its: dict[str, Tensor]) -> None:
    assert mine.keys() == its.keys()
    for name, t in mine.items():
        torch.testing.assert_close(t, its[name], rtol=1e-9, atol=1e-9, msg=name)


# ---- values and gradients, float64 --------------------------------------------------------------


@modes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"transition": False},
        {"layers": 1},
        {"layers": 1, "transition": False},
        {"size": (1, 7, 3)},
        {"size": (2, 3, 2), "channels": 3, "growth": 5},
        {"size": (2, 4, 4), "channels": 33, "growth": 16},
        {"affine": False},
        {"momentum": 1.0, "eps": 1e-2},
    ],
    ids=str,
)
def test_equal_to_the_definition(training: bool, options: dict[str, Any]) -> None:
    args = block(F64, training=training, **options)
    assert fallback_reason(*args) is None
    its = results(definition, fresh(args))
    with counted_calls() as calls:
        mine = results(dense_block, args)
    # Each consumer once forward and once backward: none of it went another way.
    consumers = len(args.layers) + (args.transition is not None)
    assert calls["dense_block_apply"] == 2 * consumers
    assert calls["dense_block_accumulate"] == consumers
    assert_equal_results(mine, its)


@modes
def test_memory_is_written_before_it_is_read(training: bool, poisoned_memory: None) -> None:
    for last in (True, False):
        args = block(F64, training=training, transition=last)
        assert_equal_results(results(dense_block, fresh(args)), results(definition, fresh(args)))


def test_without_running_statistics() -> None:
    args = block(F64, track=False)
    assert_equal_results(results(dense_block, fresh(args)), results(definition, fresh(args)))


def test_one_consumer_without_affine_and_one_without_running_statistics() -> None:
    args = block(F64)
    first, second, third = args.layers
    layers = [
        DenseLayer(first.conv1._replace(weight=None, bias=None), first.conv2),
        DenseLayer(second.conv1._replace(running_mean=None, running_var=None), second.conv2),
        DenseLayer(third.conv1._replace(bias=None), third.conv2),
    ]
    args = args._replace(layers=layers)
    assert fallback_reason(*args) is None
    assert_equal_results(results(dense_block, fresh(args)), results(definition, fresh(args)))


@modes
def test_transition_alone(training: bool) -> None:
    args = block(F64, layers=0, training=training, channels=10)

    def ours(x: Tensor, layers: list[DenseLayer], last: NormConv) -> Tensor:
        return transition(x, last)

    assert_equal_results(results(ours, fresh(args)), results(definition, fresh(args)))


@pytest.mark.parametrize("how", ["contiguous", "channels_last", "sliced", "expanded"])
def test_layouts_of_the_input(how: str) -> None:
    args = block(F64)
    x = args.x.detach()
    wide = torch.full((3, 12, 12, 5), torch.nan, dtype=F64)
    wide[:, ::2, ::2] = x
    x = {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": wide[:, ::2, ::2],
        "expanded": x[:1].expand(3, -1, -1, -1),
    }[how]
    args = args._replace(x=x.requires_grad_())
    dense = fresh(args._replace(x=x.detach().contiguous().requires_grad_()))
    mine = results(dense_block, args)
    assert mine["y"].is_contiguous(memory_format=torch.channels_last)
    assert_equal_results(mine, results(definition, dense))


@modes
def test_any_subset_of_gradients(training: bool) -> None:
    """Only those that are asked for, and the same as with all the others."""
    args = block(F64, layers=2, training=training)
    full = results(dense_block, fresh(args))
    names = list(tensors_of(args))
    for wanted in [*[(name,) for name in names], *itertools.combinations(names[::4], 2)]:
        some = fresh(args)
        for name, t in tensors_of(some).items():
            t.requires_grad_(name in wanted)
        found = results(dense_block, some)
        for name in wanted:
            torch.testing.assert_close(found[f"grad_{name}"], full[f"grad_{name}"], msg=str(wanted))


@modes
@pytest.mark.parametrize("last", [True, False], ids=["transition", "features"])
def test_gradcheck(training: bool, last: bool) -> None:
    args = block(
        F64, layers=2, channels=2, growth=1, size=(2, 2, 3), training=training, transition=last
    )
    args = map_tensors(lambda t: t if t.requires_grad else t.clone(), args)
    inputs = list(tensors_of(args).values())

    def call(*tensors: Tensor) -> Tensor:
        replaced = dict(zip((id(t) for t in inputs), tensors, strict=True))
        return dense_block(*map_tensors(lambda t: replaced.get(id(t), t.clone()), args))

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, atol=1e-4)


# ---- the other dtypes, whole blocks -------------------------------------------------------------


def far_from_zero(args: Block) -> Block:
    """The same, with no argument of a relu near 0: xhat is at least -3.5 in so few values."""
    with torch.no_grad():
        for part in parts_of(args).values():
            assert part.weight is not None and part.bias is not None
            part.weight.mul_(0.5)
            part.bias.fill_(3)
    return args


def assert_near_to_float64(args: Block, **kwargs: Any) -> None:
    """As near to the definition in float64 as PyTorch's ops, whose every layer rounds too: rule R's
    factor, and some roundings per layer. An output that is a sum of terms that cancel is measured
    by the largest of its kind."""
    truth = results(definition, fresh(args, F64), bias=1.0)
    torchs = results(definition, fresh(args), bias=1.0)
    mine = results(dense_block, fresh(args), bias=1.0, **kwargs)
    dtype = args.x.dtype
    factor = 2 if dtype == torch.float32 else 3
    floor = 2 * (2 * len(args.layers) + 1) * UNIT_ROUNDOFF[dtype]
    scale: dict[str, float] = {}
    for name, t in truth.items():
        kind = name.rpartition(".")[2]
        scale[kind] = max(scale.get(kind, 0.0), float(t.norm()))
    for name, t in truth.items():
        size = scale[name.rpartition(".")[2]]
        error, its = (float((r[name].double() - t).norm()) / size for r in (mine, torchs))
        assert error <= factor * its + floor, (name, error, its)


@pytest.mark.parametrize("consumers", [25, 49])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_deep_blocks_with_biased_gradients(dtype: torch.dtype, consumers: int) -> None:
    """As many consumers as DenseNet-121 and -201 have, and gradients with a common sign."""
    args = block(dtype, layers=consumers - 1, channels=4, growth=2, size=(4, 4, 4))
    assert_near_to_float64(far_from_zero(args))


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks(dtype: torch.dtype, training: bool) -> None:
    args = block(dtype, size=(4, 5, 7), training=training)
    assert_near_to_float64(far_from_zero(args), accumulate_in_float32=True)


@modes
def test_first_convolution_of_a_layer_in_one_kernel(training: bool) -> None:
    """In float32 with 16 outputs or a multiple; the gradients are the same whichever are wanted."""
    torch.manual_seed(0)
    args = far_from_zero(block(torch.float32, growth=8, size=(2, 12, 9), training=training))
    assert_near_to_float64(args)
    with counted_calls() as calls:
        full = results(dense_block, fresh(args))
    assert calls["dense_block_narrow_forward"] == calls["dense_block_narrow_backward"] == 3
    assert calls["dense_block_apply"] == 2  # of the transition, there and back
    names = list(tensors_of(args))
    for wanted in (names[1:], ["layer1.conv1.conv_weight"], ["x"], ["layer2.conv1.bias"]):
        some = fresh(args)
        for name, t in tensors_of(some).items():
            t.requires_grad_(name in wanted)
        found = results(dense_block, some)
        for name in wanted:
            its = full[f"grad_{name}"]
            torch.testing.assert_close(found[f"grad_{name}"], its, rtol=1e-4, atol=1e-4)


# ---- statistics, and what is kept ---------------------------------------------------------------


def test_momentum_may_differ() -> None:
    args = block(F64)
    layers = [
        DenseLayer(layer.conv1._replace(momentum=m), layer.conv2)
        for layer, m in zip(args.layers, (0.1, 0.25, 1.0), strict=True)
    ]
    args = args._replace(layers=layers)
    assert fallback_reason(*args) is None
    assert_equal_results(results(dense_block, fresh(args)), results(definition, fresh(args)))


@pytest.mark.parametrize(
    ("change", "reason"), [({"eps": 1e-3}, "eps differs"), ({"training": False}, "in training")]
)
def test_differing_norms_fall_back_and_say_so(change: dict[str, Any], reason: str) -> None:
    args = block(F64)
    first = args.layers[0]
    changed = DenseLayer(first.conv1._replace(**change), first.conv2)
    args = args._replace(layers=[changed, *args.layers[1:]])
    why = fallback_reason(*args)
    assert why is not None and reason in why
    with counted_calls() as calls:
        mine = results(dense_block, fresh(args))
    assert calls["dense_block_apply"] == 0
    assert_equal_results(mine, results(definition, fresh(args)))


def test_norm_inside_a_layer_may_be_frozen_alone() -> None:
    args = block(F64)
    frozen = [
        DenseLayer(layer.conv1, layer.conv2._replace(training=False)) for layer in args.layers
    ]
    args = args._replace(layers=frozen)
    assert fallback_reason(*args) is None
    assert_equal_results(results(dense_block, fresh(args)), results(definition, fresh(args)))


def test_running_statistics_are_updated_once_and_without_a_version() -> None:
    args = block(torch.float32)
    part = args.layers[0].conv1
    assert part.running_mean is not None
    version = part.running_mean._version
    y = dense_block(*args)
    after = part.running_mean.clone()
    y.sum().backward()
    assert torch.equal(part.running_mean, after)
    assert part.running_mean._version == version


@modes
def test_what_is_saved(training: bool) -> None:
    """The buffer, the raw 1x1 outputs and vectors: nothing that is quadratic in the layers."""
    args = block(torch.float32, layers=8, channels=16, growth=8, size=(2, 8, 8), training=training)
    there = [args.x, *[t for p in parts_of(args).values() for t in p if isinstance(t, Tensor)]]
    kept = saved_bytes(lambda: dense_block(*args), iter(there))
    pixels, new = 2 * 8 * 8, 8 * 8
    consumed = 8 * [16] if training else [16 + 8 * i for i in range(9)]
    vectors = 2 * (sum(consumed) + 8 * 16) * 4
    assert kept <= (pixels * (16 + new + 2 * new) * 4 + vectors) * 1.05


def test_a_change_of_the_output_is_noticed() -> None:
    args = block(torch.float32, transition=False)
    y = dense_block(*args)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_dropout(rate: float) -> None:
    args = block(F64, layers=1, transition=False)
    kept = dense_block(*fresh(args)).detach()[:, 6:]
    copied = fresh(args)
    torch.manual_seed(0)
    mine = results(dense_block, args, drop_rate=rate)
    new = mine["y"][:, 6:]
    mask = new != 0
    scale = 0.0 if rate == 1 else 2.0
    torch.testing.assert_close(new, kept * mask * scale)
    if rate < 1:
        assert 0.3 < mask.double().mean() < 0.7

    def masked(x: Tensor, layers: list[DenseLayer], last: None) -> Tensor:
        y = definition(x, layers, last)
        return torch.cat([x, y[:, 6:] * mask * scale], 1)

    assert_equal_results(mine, results(masked, copied))


def test_dropout_before_later_layers() -> None:
    """Statistics and gradients are those of what is left."""
    args = block(F64, layers=3)
    torch.manual_seed(0)
    mine = results(dense_block, fresh(args), drop_rate=0.3)
    torch.manual_seed(0)
    second = fresh(args)
    y = dense_block(*second, drop_rate=0.3)
    inputs = list(tensors_of(second).values())
    grads = torch.autograd.grad(y, inputs, gradient_like(y), create_graph=True)
    for name, grad in zip(tensors_of(second), grads, strict=True):
        torch.testing.assert_close(grad.detach(), mine[f"grad_{name}"])


# ---- evaluation, compilation, autocast ----------------------------------------------------------


@pytest.mark.parametrize("last", [True, False], ids=["transition", "features"])
def test_evaluation_without_gradients(last: bool) -> None:
    args = block(F64, training=False, transition=last)
    with torch.no_grad():
        its = definition(*args)
        with counted_calls() as calls:
            mine = dense_block(*args)
    assert calls["dense_block_apply"] == 3 + last
    assert calls["batch_norm_forward"] == 0  # folded
    torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


def test_training_without_gradients() -> None:
    args = block(F64)
    copied = fresh(args)
    its = results(definition, copied)
    with torch.no_grad():
        y = dense_block(*args)
    torch.testing.assert_close(y, its["y"])
    for name, part in parts_of(args).items():
        torch.testing.assert_close(part.running_var, its[f"{name}.running_var"])


@modes
def test_compiled(training: bool) -> None:
    args = block(torch.float32, layers=2, training=training)
    eager = results(dense_block, fresh(args))
    torch._dynamo.reset()
    compiled = torch.compile(dense_block, fullgraph=True, backend="aot_eager")
    found = results(compiled, fresh(args))
    for name, t in eager.items():
        torch.testing.assert_close(found[name], t, msg=name)


def test_exported_as_plain_operators() -> None:
    args = block(torch.float32, training=False, layers=1)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return dense_block(x, args.layers, args.transition)

    detached = map_tensors(lambda t: t.detach(), args)
    args = detached
    program = torch.export.export(Model(), (args.x,))
    assert not [node for node in program.graph.nodes if "resops" in str(node.target)]
    torch.testing.assert_close(program.module()(args.x), dense_block(*args))


def test_autocast() -> None:
    args = block(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dense_block(*args)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for name, t in tensors_of(args).items():
        assert t.grad is not None and t.grad.dtype == torch.float32, name


def test_same_bits_for_any_number_of_threads() -> None:
    args = block(torch.float32, channels=40, growth=8, size=(4, 16, 16))
    one = results(dense_block, fresh(args))
    torch.set_num_threads(2)
    two = results(dense_block, fresh(args))
    # The library's convolutions may differ: what is ours is y's input channels and x's statistics.
    for name in ("layer1.conv1.running_mean", "layer1.conv1.running_var"):
        assert torch.equal(one[name], two[name]), name


@modes
@pytest.mark.parametrize("how", ["library", "fused"])
def test_convolutions_of_other_kinds(how: str, training: bool) -> None:
    """As a table of a GPU's measurements may choose them: the library's, and all of them with
    prologue, statistics and sums; then the 1x1 of a layer normalises the buffer on load."""
    args = block(F64, training=training)
    its = results(definition, fresh(args))
    with CONVOLUTIONS[how](), counted_calls() as calls:
        mine = results(dense_block, fresh(args))
    # Each consumer there and back; with a prologue the transition's, which pools first.
    assert calls["dense_block_apply"] == (2 if how == "fused" else 8)
    assert_equal_results(mine, its)


def test_several_inputs() -> None:
    """Side by side along the channels, each with its gradient."""
    args = block(F64)
    whole = results(dense_block, fresh(args))
    parts = [t.detach().requires_grad_() for t in args.x.split([1, 3, 2], 1)]
    copied = fresh(args)
    y = dense_block(parts, copied.layers, copied.transition)
    torch.testing.assert_close(y, whole["y"])
    grads = torch.autograd.grad(y, parts, gradient_like(y))
    torch.testing.assert_close(torch.cat(grads, 1), whole["grad_x"])
    one = dense_block([copied.x], fresh(args).layers, fresh(args).transition)
    torch.testing.assert_close(one, whole["y"])


def test_backend_reference_is_the_definition() -> None:
    args = block(F64)
    with resops.backend("reference"), counted_calls() as calls:
        mine = results(dense_block, fresh(args))
    assert not [name for name in calls if name.startswith("dense_block")]
    assert_equal_results(mine, results(definition, fresh(args)))


# ---- what is refused ----------------------------------------------------------------------------


def _bad_calls() -> dict[str, tuple[Any, type[Exception], str]]:
    good = block(torch.float32)
    narrow, wide = good.layers[1]
    f32 = torch.float32

    def second(layer: Any) -> Block:
        return good._replace(layers=[good.layers[0], layer, good.layers[2]])

    return {
        "channels do not add up": (
            good._replace(layers=[good.layers[1]]),
            RuntimeError,
            r"layer 1, conv1: .*should contain 6 elements not 10",
        ),
        "between the convolutions": (
            second(DenseLayer(narrow, norm_conv(7, 4, 3, f32))),
            RuntimeError,
            "layer 2, conv2: .*should contain 8 elements not 7",
        ),
        "of a convolution": (
            second(DenseLayer(narrow._replace(conv_weight=torch.ones(8, 9, 1, 1)), wide)),
            RuntimeError,
            "layer 2, conv1: .*to have 9 channels, but got 10",
        ),
        "of the transition": (
            good._replace(transition=norm_conv(10, 5, 1, f32)),
            RuntimeError,
            "transition: .*should contain 18 elements not 10",
        ),
        "even kernel": (
            second(DenseLayer(narrow, norm_conv(8, 4, 2, f32))),
            RuntimeError,
            "layer 2, conv2: expected a kernel of odd sizes",
        ),
        "dtype of a weight": (
            second(DenseLayer(narrow._replace(conv_weight=narrow.conv_weight.double()), wide)),
            RuntimeError,
            "layer 2, conv1: .*one dtype",
        ),
        "evaluation without statistics": (
            block(f32, training=False, track=False),
            RuntimeError,
            "layer 1, conv1: running_mean must be defined in evaluation mode",
        ),
        "one value per channel": (
            block(f32, size=(1, 1, 1), transition=False),
            ValueError,
            "layer 1, conv1: Expected more than 1 value per channel",
        ),
        "image too small to pool": (block(f32, size=(4, 1, 5)), RuntimeError, "2x2 of the pool"),
        "no image": (
            good._replace(x=torch.randn(3, 6, 5)),
            ValueError,
            r"size \(N, C, H, W\), but got",
        ),
        "integers": (
            good._replace(x=torch.ones(3, 6, 6, 5, dtype=torch.int64)),
            NotImplementedError,
            "not implemented for torch.int64",
        ),
        "no tensor": (good._replace(x=1.0), TypeError, "'input' must be Tensor"),
        "nothing in a list": (good._replace(x=[]), TypeError, "'input' must be Tensor, not list"),
        "no tensor in a list": (
            good._replace(x=[good.x, 1.0]),
            TypeError,
            r"'input\[1\]' must be Tensor, not float",
        ),
        "inputs of unequal size": (
            good._replace(x=[good.x[:, :4], good.x[:, 4:, :5]]),
            RuntimeError,
            r"input\[1\] should be .* image size of input\[0\], \[3, 4, 6, 5\]",
        ),
        "inputs of unequal batch": (
            good._replace(x=[good.x[:, :4], good.x[:2, 4:]]),
            RuntimeError,
            r"input\[1\] should be .* batch and image size",
        ),
        "inputs of unequal dtype": (
            good._replace(x=[good.x[:, :4], good.x[:, 4:].double()]),
            RuntimeError,
            r"input\[1\] should be torch.float32",
        ),
        "channels of several inputs": (
            good._replace(x=[good.x, good.x]),
            RuntimeError,
            "layer 1, conv1: .*should contain 12 elements not 6",
        ),
        "only one running statistic": (
            second(DenseLayer(narrow._replace(running_var=None), wide)),
            ValueError,
            "layer 2, conv1: running_mean and running_var must either both be None",
        ),
        "no layer": (second((narrow, wide)), TypeError, "layer 2 must be DenseLayer, not tuple"),
        "no norm": (
            second(DenseLayer(narrow, None)),
            TypeError,
            "layer 2, conv2 must be NormConv, not NoneType",
        ),
        "nothing at all": (Block(good.x, []), ValueError, "at least one layer, or a transition"),
    }


@pytest.mark.parametrize("case", list(_bad_calls()))
def test_refused_before_anything_is_written(case: str) -> None:
    args, error, message = _bad_calls()[case]
    parts = [p for layer in args.layers for p in layer if isinstance(p, NormConv)]
    statistics = [p.running_mean for p in parts if p.running_mean is not None]
    before = [t.clone() for t in statistics]
    with pytest.raises(error, match=message):
        dense_block(*args)
    assert all(map(torch.equal, statistics, before))


def test_drop_rate_is_a_probability() -> None:
    args = block(torch.float32)
    with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
        dense_block(*args, drop_rate=1.5)


def test_empty_batch() -> None:
    args = block(torch.float32, size=(0, 6, 5))
    y = dense_block(*args)
    assert y.shape == (0, 9, 3, 2)
    y.sum().backward()
    assert args.x.grad is not None and args.x.grad.shape == args.x.shape


def test_average_pool_commutes_with_the_convolution() -> None:
    """On which the transition relies, here with a last row and column that the pool leaves out."""
    x, weight = torch.randn(2, 4, 5, 7, dtype=F64), torch.randn(3, 4, 1, 1, dtype=F64)
    first, last = F.conv2d(F.avg_pool2d(x, 2), weight), F.avg_pool2d(F.conv2d(x, weight), 2)
    torch.testing.assert_close(first, last)


def test_a_wide_transition_is_computed_before_the_pool() -> None:
    torch.manual_seed(3)
    part = NormConv(torch.zeros(4), torch.ones(4), None, None, torch.randn(2, 4, 3, 3))
    x = torch.randn(1, 4, 6, 6)
    assert "1x1" in (fallback_reason(x, [], part) or "")
    y = resops.functional.transition(x, part)
    with resops.backend("reference"):
        torch.testing.assert_close(y, resops.functional.transition(x, part))
