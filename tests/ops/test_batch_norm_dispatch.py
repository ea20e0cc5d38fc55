"""Battery F: registration, fake kernels, torch.compile, backends. Each test names its row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resops
from resops.functional import batch_norm_act
from resops.nn import BatchNormAct2d
from tests.dispatch import counted_calls, native_calls
from tests.ops.batch_norm_oracle import SMOOTH, random_case
from tests.tensors import in_layout

pytestmark = pytest.mark.usefixtures("native")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPS = [
    "batch_norm_statistics",
    "batch_norm_apply",
    "batch_norm_forward",
    "batch_norm_backward_reduce",
    "batch_norm_backward_apply",
    "batch_norm_backward",
]


def op_arguments(
    op: str,
    x: Tensor,
    activation: str,
    training: bool,
    residual: bool,
    affine: bool,
    requires_grad: bool,
) -> tuple[Any, ...]:
    """Arguments with which ``op`` can be called."""
    case = random_case(x, residual=residual, affine=affine, training=training)
    ops, act = torch.ops.resops, (activation, 0.1)
    if op == "batch_norm_statistics":
        return (x.requires_grad_(requires_grad),)
    _, mean, invstd, mask = ops.batch_norm_forward(
        x,
        case.residual,
        case.weight,
        case.bias,
        None if training else case.running_mean,
        None if training else case.running_var,
        training,
        0.1,
        1e-5,
        *act,
    )
    if requires_grad:
        for t in (x, case.residual, case.weight, case.bias):
            if t is not None:
                t.requires_grad_()
    tensors = (x, case.residual, case.weight, case.bias)
    if op == "batch_norm_apply":
        return (*tensors, mean, invstd, *act)
    if op == "batch_norm_forward":
        return (*tensors, case.running_mean, case.running_var, training, 0.1, 1e-5, *act)
    kept = case.residual if activation in SMOOTH else None
    saved = (case.grad_y, x, kept, mask, case.weight, case.bias, mean, invstd)
    if op == "batch_norm_backward_reduce":
        return (*saved, *act)
    if op == "batch_norm_backward_apply":
        means = (mean, invstd) if training else (None, None)
        return (*saved, *means, *act, True, residual)
    return (*saved, training, *act, [True, residual, affine, affine])


SHAPES = [(2, 6, 3, 5), (4, 6), (3, 6, 5), (2, 6, 2, 3, 2), (2, 6, 1, 1), (2, 1, 3, 4)]
FLAGS = list(itertools.product(["relu", "silu"], [True, False], [False, True], [True, False]))


# Wherever an argument requires grad, torch warns that the op has no derivative: see below.
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "padded_contiguous"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype, layout: str, requires_grad: bool) -> None:
    """F: torch.library.opcheck on every registered op in each layout and dtype, with and without
    requires_grad: four times SUCCESS (schema, autograd registration, fake kernel, AOT dispatch).
    Shapes and flags take turns."""
    turn = OPS.index(op) + 5 * DTYPES.index(dtype) + 7 * len(layout) + 3 * requires_grad
    activation, training, residual, affine = FLAGS[turn % len(FLAGS)]
    x = in_layout(torch.randn(SHAPES[turn % len(SHAPES)]).to(dtype), layout)
    arguments = op_arguments(op, x, activation, training, residual, affine, requires_grad)
    result = torch.library.opcheck(getattr(torch.ops.resops, op).default, arguments)
    assert len(result) == 4 and all(v == "SUCCESS" for v in result.values()), result


def test_the_op_alone_does_not_cut_the_graph_in_silence() -> None:
    """D: the derivative belongs to the autograd.Function. Backward through the op itself warns."""
    x = torch.randn(2, 6, 3, 5, requires_grad=True)
    arguments = op_arguments("batch_norm_forward", x, "relu", True, False, False, True)
    y = torch.ops.resops.batch_norm_forward(*arguments)[0]
    assert y.requires_grad
    with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
        y.sum().backward()


def test_schemas() -> None:
    """The ops are registered with these names, and only the forward pass writes to an argument."""
    registered = {
        s.name.removeprefix("resops::")
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("resops::batch_norm")
        and not s.name.startswith("resops::batch_norm_act_max_pool")
    }
    assert registered == {*OPS, "batch_norm_backward_formulas"}
    for op in OPS:
        schema = getattr(torch.ops.resops, op).default._schema
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        expected = ["running_mean", "running_var"] if op == "batch_norm_forward" else []
        assert written == expected, op


def test_meta_tensors() -> None:
    """C, F: shapes, dtypes and strides without data."""
    x = torch.empty(2, 6, 3, 5, device="meta", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    vectors = [torch.empty(6, device="meta") for _ in range(4)]
    y, mean, invstd, mask = torch.ops.resops.batch_norm_forward(
        x, x, *vectors, True, 0.1, 1e-5, "relu", 0.0
    )
    assert y.device.type == "meta" and y.stride() == x.stride() and y.dtype == x.dtype
    assert mean.dtype == invstd.dtype == torch.float32 and mask.shape == (2 * 6 * 3 * 5 // 8 + 1,)


@pytest.mark.parametrize("where", ["meta", "mixed"])
def test_unfitting_devices(where: str) -> None:
    """F: tensors of another device than the input's: a clear error."""
    x = torch.randn(2, 6, 3, 5)
    other = torch.empty(6, device="meta")
    statistics = (other, other) if where == "meta" else (torch.zeros(6), torch.ones(6))
    weight = None if where == "meta" else other
    with pytest.raises((RuntimeError, NotImplementedError), match=r"device"):
        batch_norm_act(x, *statistics, weight=weight)


# ---- backends -----------------------------------------------------------------------------------


def test_backends() -> None:
    """ "auto" takes the native kernels; "reference" runs plain PyTorch; one that cannot, by name,
    raises."""
    x = torch.randn(4, 5, 3, 3)
    results = {}
    for name in ("auto", "native", "reference"):
        with resops.backend(name), counted_calls() as calls:
            assert resops.get_backend() == name
            results[name] = batch_norm_act(x, None, None, training=True)
        expected = {} if name == "reference" else {"batch_norm_forward": 1}
        assert native_calls(calls) == expected, name
    assert resops.get_backend() == "auto"
    assert torch.equal(results["auto"], results["native"])
    torch.testing.assert_close(results["auto"], results["reference"])
    with resops.backend("triton"), pytest.raises(resops.BackendError, match=r"triton.*batch_norm"):
        batch_norm_act(x, None, None, training=True)
    with pytest.raises(ValueError, match="backend must be one of"):
        resops.set_backend("cudnn")
    with pytest.raises(ValueError, match="backend must be one of"), resops.backend("Native"):
        pass
    assert issubclass(resops.BackendError, RuntimeError)


def test_backend_is_restored_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), resops.backend("reference"):
        raise ZeroDivisionError
    assert resops.get_backend() == "auto"


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """The joint of a residual network: everything that must survive a compiler."""

    def __init__(self, act_layer: Any = nn.ReLU) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = BatchNormAct2d(4, act_layer=act_layer)
        self.bn2 = BatchNormAct2d(4, momentum=0.3, act_layer=act_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv(self.bn1(x)), x)


def compare_training(backend: str, dynamic: bool | None, act_layer: Any, sizes: list[int]) -> None:
    """Three SGD steps of one block, compiled as one graph and eager: equal statistics, counters,
    gradients and parameters."""
    torch.manual_seed(0)
    eager, compiled = Block(act_layer), Block(act_layer)
    compiled.load_state_dict(eager.state_dict())
    run = torch.compile(compiled, backend=backend, fullgraph=True, dynamic=dynamic)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (eager, compiled)]
    for size in sizes:
        x = torch.randn(size, 4, 6, 6).contiguous(memory_format=torch.channels_last)
        outputs = []
        modules: list[Any] = [eager, run]
        for module, optimizer in zip(modules, optimizers, strict=True):
            optimizer.zero_grad()
            y = module(x)
            y.square().mean().backward()
            optimizer.step()
            outputs.append(y)
        # The same kernels on the same data; the convolution may sum in another order.
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(
        eager.state_dict().items(), compiled.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert compiled.bn1.num_batches_tracked == len(sizes)


def test_compile_inductor(fresh_dynamo: None) -> None:
    """F: torch.compile(fullgraph=True), 3 training steps through Inductor: running statistics,
    num_batches_tracked and gradients = eager."""
    compare_training("inductor", None, nn.ReLU, [5, 5, 5])


@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.SiLU, None])
def test_compile_dynamic_shapes(act_layer: Any, fresh_dynamo: None) -> None:
    """F: dynamic shapes, batches of three sizes, one graph."""
    compare_training("aot_eager", True, act_layer, [5, 3, 8])


def test_compile_cumulative_average(fresh_dynamo: None) -> None:
    """B: momentum=None compiled, two batches of different size: the plain mean of the batches'
    statistics. The counter is read, so this is more than one graph, as with torch's layer."""
    layer: Any = BatchNormAct2d(3, momentum=None)
    run = torch.compile(layer, backend="aot_eager")
    batches = [torch.randn(8, 3, 4, 4) + 5, torch.randn(2, 3, 4, 4) * 3 - 5]
    for x in batches:
        run(x)
    for name, statistic in (("running_mean", Tensor.mean), ("running_var", Tensor.var)):
        expected = torch.stack([statistic(x.double(), (0, 2, 3)) for x in batches]).mean(0)
        torch.testing.assert_close(layer.get_buffer(name), expected.float())


def test_compile_runs_the_native_op(fresh_dynamo: None) -> None:
    """F: the compiled graph contains the fused op, once a call, and no decomposition of it."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    from torch._dynamo.backends.common import aot_autograd

    run = torch.compile(
        lambda x, m, v: batch_norm_act(x, m, v, training=True),
        backend=aot_autograd(fw_compiler=backend, bw_compiler=backend),
        fullgraph=True,
    )
    mean, var = torch.zeros(5), torch.ones(5)
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    run(x, mean, var).sum().backward()
    text = "\n".join(graphs)
    assert "resops.batch_norm_forward" in text and "resops.batch_norm_backward" in text
    assert "native_batch_norm" not in text and "aten.var" not in text
    assert not torch.equal(mean, torch.zeros(5)) and not torch.equal(var, torch.ones(5))
    expected = torch.zeros(5), torch.ones(5)
    batch_norm_act(x.detach(), *expected, training=True)
    assert torch.equal(mean, expected[0]) and torch.equal(var, expected[1])


def test_compile_evaluation_and_backend_switch(fresh_dynamo: None) -> None:
    """F: evaluation, compiled, follows a later change of backend."""
    run = torch.compile(
        lambda x, m, v: batch_norm_act(x, m, v), backend="aot_eager", fullgraph=True
    )
    x, mean, var = torch.randn(4, 5, 3, 3), torch.rand(5), torch.rand(5) + 0.5
    eager = batch_norm_act(x, mean, var)
    assert torch.equal(run(x, mean, var), eager)
    with resops.backend("reference"):
        torch.testing.assert_close(run(x, mean, var), eager)


def test_export() -> None:
    """Export emits plain ATen, so that the program runs without this package."""
    block = Block().eval()
    x = torch.randn(2, 4, 6, 6)
    program = torch.export.export(block, (x,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not any("resops" in target for target in targets), targets
    with torch.no_grad():
        # Two float32 evaluations, |y| of a few units.
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-5, atol=1e-5)


def test_flop_counter_and_profiler_do_not_break() -> None:
    """The op runs under other dispatch modes: a FLOP counter counts the convolution around it."""
    from torch.utils.flop_counter import FlopCounterMode

    block = Block()
    x = torch.randn(2, 4, 6, 6)
    with FlopCounterMode(display=False) as counter:
        block(x).sum().backward()
    assert counter.get_total_flops() > 0
