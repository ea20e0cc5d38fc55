"""bottleneck and basic_block: values, gradients, what is saved, and what is refused.

The truth is the definition in float64 at the rounded inputs. A whole block has no formula for its
terms A, so the limits here are rule R's with A the norm of the output itself: three times the
distance of the composition of PyTorch's ops, plus some roundings per layer. Activations are smooth
where gradients are compared in less than float64: one relu that changes its side moves a gradient
by more than any rounding.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs

import resops
from bench.session import saved_bytes
from resops.functional import ConvNorm
from resops.ops import convolution, convolution_table
from resops.ops.bottleneck import BottleneckFunction
from tests.dispatch import counted_calls
from tests.ops.residual_block_cases import (
    CONVOLUTIONS,
    DEFINITIONS,
    OPS,
    assert_near_to_float64,
    block,
    fresh,
    layer,
    reference_phases_as_native,
    results,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("native", "one_thread")

F64 = torch.float64
both_ops = pytest.mark.parametrize("op", OPS)
both_shortcuts = pytest.mark.parametrize(
    "projection", [False, True], ids=["identity", "projection"]
)
both_convolutions = pytest.mark.parametrize("how", CONVOLUTIONS)


def assert_equal_results(mine: dict[str, Tensor], its: dict[str, Tensor]) -> None:
    assert mine.keys() == its.keys()
    for name, t in mine.items():
        torch.testing.assert_close(t, its[name], rtol=1e-9, atol=1e-9, msg=name)


# ---- values and gradients, float64 --------------------------------------------------------------


@both_ops
@both_shortcuts
@both_convolutions
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize(
    ("activation", "recompute"),
    [
        ("relu", False),
        ("relu", True),
        ("silu", False),
        ("gelu", True),
        ("leaky_relu", False),
        (None, False),
    ],
)
def test_equal_to_the_definition(
    op: str, projection: bool, how: str, training: bool, activation: str | None, recompute: bool
) -> None:
    args = block(op, F64, projection=projection, training=training)
    copied = fresh(args)
    with CONVOLUTIONS[how]():
        mine = results(OPS[op], args, activation=activation, recompute=recompute)
    its = results(DEFINITIONS[op], copied, activation or "identity", 0.01)
    assert_equal_results(mine, its)


@both_convolutions
@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"conv_bias": True},
        {"conv_bias": True, "training": False},
        {"groups": 4},
        {"stride_in_first": True},
        {"dimensions": 1},
        {"dimensions": 3},
    ],
    ids=str,
)
def test_options_of_the_layers(how: str, options: dict[str, Any]) -> None:
    args = block("bottleneck", F64, projection=True, **options)
    copied = fresh(args)
    with CONVOLUTIONS[how]():
        mine = results(OPS["bottleneck"], args)
    assert_equal_results(mine, results(DEFINITIONS["bottleneck"], copied, "relu", 0.01))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@both_ops
def test_layouts(op: str, memory_format: torch.memory_format) -> None:
    args = block(op, F64, projection=True)
    args[0] = args[0].detach().contiguous(memory_format=memory_format).requires_grad_()
    its = results(DEFINITIONS[op], fresh(args), "relu", 0.01)
    mine = results(OPS[op], args)
    assert mine["y"].is_contiguous(memory_format=memory_format)
    assert mine["grad_x"].is_contiguous(memory_format=memory_format)
    assert_equal_results(mine, its)


@both_convolutions
@both_shortcuts
def test_any_subset_of_gradients(how: str, projection: bool) -> None:
    """Only those that are asked for, and the same as with all the others."""
    args = block("bottleneck", F64, projection=projection, conv_bias=True)
    full = results(OPS["bottleneck"], fresh(args))
    names = list(tensors_of(args))
    for wanted in [*[(name,) for name in names], *itertools.combinations(names[::3], 2)]:
        some = fresh(args)
        for name, t in tensors_of(some).items():
            t.requires_grad_(name in wanted)
        with CONVOLUTIONS[how]():
            found = results(OPS["bottleneck"], some)
        assert [n for n in found if n.startswith("grad_")] == [f"grad_{n}" for n in wanted]
        assert_equal_results(found, {name: full[name] for name in found})


@both_convolutions
def test_norms_in_training_and_frozen_ones_in_one_block(how: str) -> None:
    args = block("bottleneck", F64, projection=True)
    args[1], args[4] = args[1]._replace(training=False), args[4]._replace(training=False)
    copied = fresh(args)
    with CONVOLUTIONS[how]():
        mine = results(OPS["bottleneck"], args)
    assert_equal_results(mine, results(DEFINITIONS["bottleneck"], copied, "relu", 0.01))
    assert torch.equal(args[1].running_mean, copied[1].running_mean)  # not updated


def flat(op: str, args: list[Any], **kwargs: Any) -> tuple[Any, list[Tensor]]:
    """The op as a function of the tensors that have gradients. Without running statistics, which
    each of many calls would update."""
    layers = [a and a._replace(running_mean=None, running_var=None) for a in args[1:]]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        left = iter(parameters)
        replaced = [
            a and a._replace(conv_weight=next(left), weight=next(left), bias=next(left))
            for a in layers
        ]
        return OPS[op](x, *replaced, **kwargs)

    return call, list(tensors_of(args).values())


@both_shortcuts
def test_gradcheck_and_gradgradcheck(projection: bool) -> None:
    args: list[Any] = [torch.randn(2, 2, 3, 2, dtype=F64).requires_grad_()]
    args += [layer(2, 2, 3, F64), layer(2, 2, 1, F64)]
    args += [layer(2, 2, 1, F64) if projection else None]
    call, inputs = flat("basic_block", args, activation="silu")
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_double_backward_where_a_weight_depends_on_the_input() -> None:
    """A gradient penalty of a block whose weights are computed from its input."""

    def penalty(f: Any, *rest: Any) -> Tensor:
        torch.manual_seed(3)
        x, conv1, conv2, _ = block("basic_block", F64, projection=False)
        conv1 = conv1._replace(conv_weight=conv1.conv_weight * x.mean())
        y = f(x, conv1, conv2, None, *rest)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        return second

    mine = penalty(lambda *args: OPS["basic_block"](*args, activation="silu"))
    its = penalty(DEFINITIONS["basic_block"], "silu", 0.01)
    torch.testing.assert_close(mine, its, rtol=1e-8, atol=1e-8)


# ---- accuracy in the dtypes of training ---------------------------------------------------------


@both_ops
@both_shortcuts
@both_convolutions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_near_to_float64_as_torch(
    op: str, projection: bool, how: str, dtype: torch.dtype
) -> None:
    args = block(op, dtype, projection=projection)
    before = fresh(args)
    with CONVOLUTIONS[how]():
        mine = results(OPS[op], args, activation="silu")
    assert_near_to_float64(op, before, mine)


@both_ops
@both_shortcuts
def test_native_convolutions_are_as_near_to_float64(op: str, projection: bool) -> None:
    """Those that are chosen on a CPU: Winograd's algorithm, with prologues and sums, and matrix
    products. Winograd's announced bound for a convolution, 5e-5, is what is added per layer."""
    args = block(op, torch.float32, projection=projection, width=16)
    x = args[0].detach()
    # Of fewer images Winograd's algorithm has too few tiles.
    x = torch.cat([x, torch.randn_like(x)])
    args[0] = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    exact = results(DEFINITIONS[op], fresh(args, F64), "silu", 0.01)
    with counted_calls() as calls:
        mine = results(OPS[op], args, activation="silu")
    assert calls["conv_bn_act_forward"] >= 2 and calls["conv_bn_act_backward_data"] >= 2
    assert calls["conv_bn_act_backward_weight"] >= 2
    for name, truth in exact.items():
        error = float((mine[name].double() - truth).norm() / truth.norm())
        assert error <= 5e-5 * (len(args) - 1), (name, error)


# ---- what is saved ------------------------------------------------------------------------------


def kept_by(op: str, args: list[Any], f: Any) -> int:
    there = [t for a in args if a is not None for t in (a if isinstance(a, tuple) else (a,))]
    return saved_bytes(f, iter([t for t in there if isinstance(t, Tensor)]))


@both_ops
@both_shortcuts
@pytest.mark.parametrize("recompute", [False, True])
def test_only_raw_outputs_statistics_and_one_bit_are_saved(
    op: str, projection: bool, recompute: bool
) -> None:
    args = block(op, torch.float32, projection=projection)
    y = OPS[op](*args)
    outputs = []
    size = tuple(args[0].shape)
    shapes = [list(a.conv_weight.shape) for a in args[1:] if a is not None]
    for a in args[1:]:
        if a is None:
            continue
        source = size if a is not args[-1] else tuple(args[0].shape)
        c = torch.nn.functional.conv2d(
            torch.empty(source, device="meta"), a.conv_weight.to("meta"), None, a.stride, a.padding
        )
        size = tuple(c.shape)
        outputs.append(4 * c.numel())
    chain = len(args) - 2
    expected = sum(outputs[: chain - 1] if recompute else outputs)
    expected += 2 * 4 * sum(shape[0] for shape in shapes)  # mean and invstd
    expected += y.size(0) * y.size(1) * -(-y[0, 0].numel() // 8)  # the mask, contiguous planes
    assert kept_by(op, args, lambda: OPS[op](*args, recompute=recompute)) == expected


@both_ops
def test_a_smooth_activation_saves_no_residual(op: str) -> None:
    """It needs the shortcut's output again, and computes it from what is there."""
    args = block(op, torch.float32, projection=True)
    relu, silu = (
        kept_by(op, args, lambda act=act: OPS[op](*args, activation=act))
        for act in ("relu", "silu")
    )
    assert silu < relu


# ---- which ops run, and when the composition does -----------------------------------------------


def test_the_function_runs_and_its_phases_do() -> None:
    args = block("bottleneck", torch.float32, projection=True)
    with counted_calls() as calls:
        y = OPS["bottleneck"](*args)
        assert type(y.grad_fn).__name__ == f"{BottleneckFunction.__name__}Backward"
        y.sum().backward()
    # Of the backward pass: three norms of the chain and one of the shortcut; two of the chain's
    # activations are computed again.
    assert calls["batch_norm_forward"] == 4 and calls["batch_norm_backward"] == 4
    assert calls["batch_norm_apply"] == 2
    assert calls["aten::convolution"] == 4 and calls["aten::convolution_backward"] == 8


def test_with_fused_convolutions_no_activation_is_written() -> None:
    """Prologues, statistics and sums replace every pass over a tensor but one apply per norm."""
    args = block("bottleneck", torch.float32, projection=True)
    with reference_phases_as_native(), counted_calls() as calls:
        y = OPS["bottleneck"](*args)
        forward = calls.copy()
        y.sum().backward()
    assert forward["batch_norm_apply"] == 2  # the join and its residual
    assert forward["batch_norm_forward"] == forward["batch_norm_statistics"] == 0
    assert calls["batch_norm_apply"] == 2 and calls["batch_norm_backward"] == 2
    assert calls["batch_norm_backward_apply"] == 2


def test_evaluation_without_gradients_is_convolutions_only() -> None:
    args = block("bottleneck", torch.float32, projection=True, training=False)
    with torch.no_grad():
        OPS["bottleneck"](*args)
        with counted_calls() as calls:
            y = OPS["bottleneck"](*args)
        expected = DEFINITIONS["bottleneck"](*args, "relu", 0.01)
    assert calls["mkldnn::_convolution_pointwise"] == 4
    assert not any("batch_norm" in name for name in calls)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_training_without_gradients_updates_and_saves_nothing() -> None:
    args = block("bottleneck", F64, projection=True)
    copied = fresh(args)
    with torch.no_grad():
        y = OPS["bottleneck"](*args)
        expected = DEFINITIONS["bottleneck"](*copied, "relu", 0.01)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(args[1:], copied[1:], strict=True):
        torch.testing.assert_close(a.running_var, b.running_var)
    assert y.grad_fn is None


def test_the_backend_reference_is_the_definition() -> None:
    args = block("basic_block", torch.float32, projection=True)
    with resops.backend("reference"):
        y = OPS["basic_block"](*fresh(args))
    assert torch.equal(y, DEFINITIONS["basic_block"](*args, "relu", 0.01))


@both_convolutions
def test_under_autocast(how: str) -> None:
    """Convolutions in bfloat16, norms on their outputs with float32 parameters."""
    args = block("bottleneck", torch.float32, projection=True)
    copied = fresh(args)
    with torch.autocast("cpu", torch.bfloat16):
        with CONVOLUTIONS[how]():
            mine = results(OPS["bottleneck"], args, activation="silu")
        its = results(DEFINITIONS["bottleneck"], copied, "silu", 0.01)
    assert mine["y"].dtype == its["y"].dtype == torch.bfloat16
    for name, t in mine.items():
        assert t.dtype == its[name].dtype, name
        # Two orders of rounding to 8 bits, through four layers.
        assert float((t - its[name]).norm() / its[name].norm()) < 8 * 2.0**-8, name


def test_under_autocast_an_identity_shortcut_of_another_dtype_is_promoted() -> None:
    args = block("basic_block", torch.float32, projection=False)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = OPS["basic_block"](*args), DEFINITIONS["basic_block"](*args, "relu", 0.01)
    assert y.dtype == expected.dtype == torch.float32


# ---- surroundings -------------------------------------------------------------------------------


@both_ops
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_without_graph_breaks(op: str, backend: str) -> None:
    args = block(op, F64, projection=True)
    copied = fresh(args)
    compiled = torch.compile(OPS[op], fullgraph=True, backend=backend)
    for _ in range(3):
        mine, its = results(compiled, args), results(DEFINITIONS[op], copied, "relu", 0.01)
        assert_equal_results(mine, its)


def test_compiled_with_native_convolutions() -> None:
    """In float32, channels-last, the graph has the backend's convolutions."""
    args = block("bottleneck", torch.float32, projection=True, width=16)
    args[0] = args[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    copied = fresh(args)
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(OPS["bottleneck"], fullgraph=True, backend=recorded)
    mine = results(compiled, args, activation="silu")
    its = results(OPS["bottleneck"], copied, activation="silu")
    (graph,) = recorded.fw_graphs
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("resops.conv_bn_act_forward.default") >= 2
    for name, t in mine.items():
        torch.testing.assert_close(t, its[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("how", ["checkpoint", "reentrant checkpoint"])
def test_checkpointed(how: str) -> None:
    """Gradients as without; running statistics are updated twice, as torch's are."""
    from torch.utils.checkpoint import checkpoint

    args = block("bottleneck", F64, projection=True)
    copied = fresh(args)

    def checkpointed(f: Any) -> Any:
        return lambda *a: checkpoint(f, *a, use_reentrant=how.startswith("reentrant"))

    def wrapped(f: Any, given: list[Any]) -> dict[str, Any]:
        y = checkpointed(lambda x: f(x, *given[1:]))(given[0])
        y.square().sum().backward()
        found = {f"grad_{name}": t.grad for name, t in tensors_of(given).items()}
        return found | {"mean": given[1].running_mean, "var": given[3].running_var, "y": y.detach()}

    mine = wrapped(OPS["bottleneck"], args)
    definition = DEFINITIONS["bottleneck"]
    its = wrapped(lambda *a: definition(*a, "relu", 0.01), copied)
    assert_equal_results(mine, its)


def test_exported_as_pytorchs_own_ops() -> None:
    class Block(torch.nn.Module):
        def __init__(self, layers: list[ConvNorm]) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            return OPS["basic_block"](x, *self.layers)

    x, *layers = block("basic_block", torch.float32, projection=True, training=False)
    plain = [ConvNorm(*(t.detach() if isinstance(t, Tensor) else t for t in a)) for a in layers]
    program = torch.export.export(Block(plain), (x.detach(),))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets and not any("resops" in target for target in targets)
    expected = DEFINITIONS["basic_block"](x, *plain, "relu", 0.01)
    torch.testing.assert_close(program.module()(x.detach()), expected.detach())


def test_transforms_of_functions() -> None:
    x, conv1, conv2, shortcut = block("basic_block", F64, projection=True)
    conv1, conv2, shortcut = (
        a._replace(running_mean=None, running_var=None) for a in (conv1, conv2, shortcut)
    )

    def loss(t: Tensor) -> Tensor:
        return OPS["basic_block"](t, conv1, conv2, shortcut).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)


def test_an_input_changed_before_backward_is_noticed() -> None:
    args = block("basic_block", F64, projection=False)
    x = args[0].detach().clone().requires_grad_() * 1
    y = OPS["basic_block"](x, *args[1:])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_running_statistics_are_not_counted_as_versions() -> None:
    for how in CONVOLUTIONS.values():
        args = block("basic_block", F64, projection=False)
        before = args[1].running_mean.clone()
        with how():
            OPS["basic_block"](*args)
        assert args[1].running_mean._version == 0
        assert not torch.equal(args[1].running_mean, before)


def test_an_empty_batch() -> None:
    args = block("basic_block", F64, projection=False)
    x = torch.empty(0, 16, 9, 7, dtype=F64, requires_grad=True)
    y = OPS["basic_block"](x, *args[1:])
    y.sum().backward()
    assert y.shape == x.shape and x.grad is not None and x.grad.shape == x.shape


# ---- bad calls ----------------------------------------------------------------------------------


def changed(index: int, **fields: Any) -> list[Any]:
    args = block("bottleneck", torch.float32, projection=True)
    args[index] = args[index]._replace(**fields)
    return args


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "short weight of a norm": (
        lambda: changed(3, weight=torch.ones(15)),
        RuntimeError,
        "bottleneck, conv3: weight should contain 16 elements not 15",
    ),
    "running statistics of another dtype": (
        lambda: changed(4, running_mean=torch.zeros(16).double(), running_var=torch.ones(16)),
        RuntimeError,
        "bottleneck, shortcut: mixed dtype",
    ),
    "channels": (
        lambda: changed(2, conv_weight=torch.zeros(8, 4, 3, 3)),
        RuntimeError,
        r"bottleneck, conv2: Given groups=1, weight of size \[8, 4, 3, 3\]",
    ),
    "a weight of another dtype": (
        lambda: changed(2, conv_weight=torch.zeros(8, 8, 3, 3).bfloat16()),
        RuntimeError,
        "conv2: input and conv_weight should have one dtype",
    ),
    "dimensions": (
        lambda: changed(1, conv_weight=torch.zeros(8, 16, 1)),
        RuntimeError,
        "conv1: expected a 4-D conv_weight",
    ),
    "bias": (
        lambda: changed(1, conv_bias=torch.zeros(7)),
        RuntimeError,
        "conv1: .*expected bias to be 1-dimensional with 8 elements",
    ),
    "stride 0": (lambda: changed(2, stride=0), RuntimeError, "conv2: non-positive stride"),
    "padding": (lambda: changed(2, padding=-1), RuntimeError, "conv2: negative padding"),
    "padding text": (lambda: changed(2, padding="all"), ValueError, "conv2: padding must be"),
    "dilation": (lambda: changed(2, dilation=0), RuntimeError, "dilation should be greater"),
    "groups": (lambda: changed(2, groups=0), RuntimeError, "non-positive groups"),
    "numbers": (lambda: changed(2, stride=(1, 1, 1)), RuntimeError, "stride of 2 numbers"),
    "too large a kernel": (
        lambda: changed(2, conv_weight=torch.zeros(8, 8, 13, 3)),
        RuntimeError,
        "Kernel size can't be greater than actual input size",
    ),
    "the branch and its shortcut": (
        lambda: changed(4, stride=1),
        RuntimeError,
        r"the shortcut should have the size \[3, 16, 5, 4\] of the branch, but has \[3, 16, 9, 7\]",
    ),
    "eps": (lambda: changed(3, eps=0.0), ValueError, "conv3: batch_norm eps must be positive"),
    "no layer": (
        lambda: [*block("bottleneck", torch.float32, projection=False)[:3], torch.ones(2), None],
        TypeError,
        r"bottleneck\(\): argument 'conv3' must be ConvNorm, not Tensor",
    ),
    "no tensor": (
        lambda: changed(2, conv_weight=None),
        TypeError,
        "'conv2.conv_weight' must be Tensor",
    ),
    "one value per channel": (
        lambda: [torch.ones(1, 16, 1, 1), *block("bottleneck", torch.float32, projection=True)[1:]],
        ValueError,
        "conv1: Expected more than 1 value per channel",
    ),
    "integers": (
        lambda: [torch.ones(3, 16, 9, 7).int(), *changed(1)[1:]],
        NotImplementedError,
        "not implemented for torch.int32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_raise_before_a_statistic_is_touched(name: str) -> None:
    make, error, message = BAD[name]
    args = make()
    statistics: list[Any] = [a.running_mean for a in args[1:] if isinstance(a, ConvNorm)]
    before = [t.clone() for t in statistics]
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            OPS["bottleneck"](*args)
    assert all(torch.equal(a, b) for a, b in zip(statistics, before, strict=True))


def test_unknown_activation_and_convolutions() -> None:
    args = block("basic_block", torch.float32, projection=False)
    with pytest.raises(ValueError, match="activation must be one of"):
        OPS["basic_block"](*args, activation="tanh")
    with (
        pytest.raises(ValueError, match="convolutions must be one of auto, library, fused"),
        convolution.convolutions("winograd"),
    ):
        pass


# ---- the table of measured convolutions ---------------------------------------------------------


def row(**fields: Any) -> dict[str, Any]:
    return {
        "device": "cpu",
        "backend": "native",
        "phase": "forward",
        "dtype": "float32",
        "prologue": False,
        "input": [16, 9, 7],
        "weight": [8, 16, 1, 1],
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "batch": 32,
        "library_ms": 2.0,
        "fused_ms": 1.0,
        **fields,
    }


def test_what_was_measured_faster_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(), row(batch=256, fused_ms=3.0), row(phase="backward_data", prologue=True)]
    monkeypatch.setattr(convolution_table, "_table", convolution_table.table_of(rows))
    weight, geometry = torch.empty(8, 16, 1, 1), ((1, 1), (0, 0), (1, 1))

    def faster(phase: str, batch: int, prologue: bool = False, height: int = 9) -> bool:
        x = torch.empty(batch, 16, height, 7, device="meta")
        monkeypatch.setattr(convolution_table, "device_name", lambda kind, index: "cpu")
        how = (phase, "native", x, weight, geometry, prologue)
        return convolution_table.fused_is_faster(*how)

    assert faster("forward", 32) and faster("forward", 8) and faster("forward", 64)
    assert not faster("forward", 256) and not faster("forward", 1000)
    assert faster("backward_data", 256, prologue=True)
    assert not faster("backward_data", 32) and not faster("forward", 32, height=10)


def test_a_row_that_is_not_one() -> None:
    good = row()
    for bad, message in (
        ({k: v for k, v in good.items() if k != "fused_ms"}, "row 1 has no fused_ms"),
        ({**good, "phase": "sideways"}, "row 1 has the unknown phase 'sideways'"),
    ):
        with pytest.raises(ValueError, match=message):
            convolution_table.table_of([good, bad])


def test_the_library_is_taken_where_nothing_was_measured() -> None:
    assert convolution.wanted_convolutions() == "auto"
    args = block("bottleneck", torch.float32, projection=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution_table, "_table", {})
        with counted_calls() as calls:
            OPS["bottleneck"](*copy.copy(args))
    assert calls["aten::convolution"] == 4
