"""The phases of a convolution, as the reference defines them, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resops.reference import conv_bn_act as phases
from resops.reference.activation import activate
from resops.reference.batch_norm import batch_norm_backward_reduce
from tests.tensors import in_layout

GEOMETRIES = [
    # kernel, stride, padding, dilation
    ((1, 1), [1, 1], [0, 0], [1, 1]),
    ((1, 1), [2, 2], [0, 0], [1, 1]),
    ((3, 3), [1, 1], [1, 1], [1, 1]),
    ((3, 3), [2, 2], [1, 1], [1, 1]),
    ((5, 3), [1, 2], [2, 0], [1, 2]),
]


def random(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


@pytest.mark.parametrize("prologue", ["identity", "relu", "silu"])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES)
def test_phases_are_the_derivatives_of_the_definition(
    kernel: tuple[int, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    prologue: str,
) -> None:
    """The gradient through batch norm, prologue and convolution, put together from the phases."""
    x = random(2, 5, 9, 11).requires_grad_()
    gamma, beta = random(5).requires_grad_(), random(5).requires_grad_()
    weight = random(4, 5, *kernel).requires_grad_()
    normalised = F.batch_norm(x, None, None, gamma, beta, True, 0.1, 1e-5)
    y = F.conv2d(activate(normalised, prologue, 0.01), weight, None, stride, padding, dilation)
    grad_y = random(*y.shape)
    expected = torch.autograd.grad(y, (x, gamma, beta, weight), grad_y)

    geometry = (stride, padding, dilation)
    with torch.no_grad():
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        invstd = torch.rsqrt(var + 1e-5)
        scale, shift = gamma * invstd, beta - mean * gamma * invstd
        before = (scale, shift, prologue, 0.01)
        out, out_mean, out_var = phases.conv_bn_act_forward(
            [x[:, :2], x[:, 2:]], *before, weight, None, None, "identity", 0.01, *geometry, True
        )
        torch.testing.assert_close(out, y)
        torch.testing.assert_close((out_var, out_mean), torch.var_mean(y, (0, 2, 3), correction=0))
        g, sum_g, sum_g_xhat = phases.conv_bn_act_backward_data(
            grad_y, weight, list(x.shape), x, *before, mean, invstd, None, *geometry
        )
        count = x.numel() // 5
        xhat = (x - mean[:, None, None]) * invstd[:, None, None]
        terms = sum_g[:, None, None] + xhat * sum_g_xhat[:, None, None]
        grad_x = scale[:, None, None] * (g - terms / count)
        grad_weight = phases.conv_bn_act_backward_weight(
            grad_y, [x], *before, list(weight.shape), *geometry
        )
    for mine, its in zip((grad_x, sum_g_xhat, sum_g, grad_weight), expected, strict=True):
        torch.testing.assert_close(mine, its)


def test_evaluation_epilogue() -> None:
    x, weight, bias, residual = (
        random(2, 5, 6, 7),
        random(4, 5, 3, 3),
        random(4),
        random(2, 4, 6, 7),
    )
    geometry = ([1, 1], [1, 1], [1, 1])
    y, mean, var = phases.conv_bn_act_forward(
        [x], None, None, "identity", 0.0, weight, bias, residual, "relu", 0.0, *geometry, False
    )
    torch.testing.assert_close(y, F.relu(F.conv2d(x, weight, bias, padding=1) + residual))
    assert mean.numel() == var.numel() == 0


def test_gradient_of_a_plain_input_with_another_one_added() -> None:
    x, weight = random(2, 5, 6, 7).requires_grad_(), random(4, 5, 3, 3)
    y = F.conv2d(x, weight, None, 2, 1)
    grad_y, addend = random(*y.shape), random(*x.shape)
    g, *sums = phases.conv_bn_act_backward_data(
        grad_y,
        weight,
        list(x.shape),
        *(None, None, None, "identity", 0.0, None, None, addend),
        *([2, 2], [1, 1], [1, 1]),
    )
    torch.testing.assert_close(g, torch.autograd.grad(y, x, grad_y)[0] + addend)
    assert all(s.numel() == 0 for s in sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_and_sums_are_those_of_the_rounded_values(dtype: torch.dtype) -> None:
    x = random(2, 5, 6, 7).to(dtype)
    weight = random(4, 5, 1, 1).to(dtype)
    scale, shift = torch.rand(5), torch.randn(5)
    geometry = ([1, 1], [0, 0], [1, 1])
    y, mean, var = phases.conv_bn_act_forward(
        [x], scale, shift, "relu", 0.0, weight, None, None, "identity", 0.0, *geometry, True
    )
    assert y.dtype == dtype and mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean, y.float().mean((0, 2, 3)))
    torch.testing.assert_close(var, y.float().var((0, 2, 3), correction=0))
    grad_y = random(*y.shape).to(dtype)
    statistics = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    mean, invstd = statistics[1], torch.rsqrt(statistics[0])
    g, *sums = phases.conv_bn_act_backward_data(
        grad_y, weight, list(x.shape), x, scale, shift, "relu", 0.0, mean, invstd, None, *geometry
    )
    assert g.dtype == dtype
    expected = batch_norm_backward_reduce(
        g, x, None, None, None, None, mean, invstd, "identity", 0.0
    )
    for mine, its in zip(sums, expected, strict=True):
        torch.testing.assert_close(mine, its)


# ---- as ops -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("phase", ["forward", "backward_data", "backward_weight"])
def test_schemas_are_the_signatures_of_the_reference(phase: str) -> None:
    name = f"conv_bn_act_{phase}"
    declared = getattr(torch.ops.resops, name).default._schema
    inferred = torch.library.infer_schema(getattr(phases, name), mutates_args=())
    expected = torch._C.parse_schema(f"resops::{name}{inferred}")
    assert [(a.name, str(a.type)) for a in declared.arguments] == [
        (a.name, str(a.type)) for a in expected.arguments
    ]
    assert len(declared.returns) == len(expected.returns)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("sizes", [(9,), (9, 11), (5, 6, 7), (1, 1), (0, 5)])
def test_fake_outputs_are_channels_last_and_of_the_right_size(sizes: tuple[int, ...]) -> None:
    n = len(sizes)
    x = torch.empty(2, 5, *sizes, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(4, 5, *[3] * n, dtype=torch.bfloat16, device="meta")
    geometry = ([2] * n, [3] * n, [1] * n)
    before = (None, None, "identity", 0.0)
    ops = torch.ops.resops
    y, mean, var = ops.conv_bn_act_forward(
        [x], *before, weight, None, None, "identity", 0.0, *geometry, True
    )
    expected = phases.convolution(x, weight, None, (2,) * n, (3,) * n, (1,) * n, groups=1)
    assert y.shape == expected.shape and y.dtype == x.dtype
    assert mean.shape == var.shape == (4,) and mean.dtype == torch.float32
    g, *sums = ops.conv_bn_act_backward_data(
        y, weight, list(x.shape), None, *before, None, None, None, *geometry
    )
    assert g.shape == x.shape and all(s.numel() == 0 for s in sums)
    grad_weight = ops.conv_bn_act_backward_weight(y, [x], *before, list(weight.shape), *geometry)
    assert grad_weight.shape == weight.shape
    for t in (y, g, grad_weight):
        assert t.movedim(1, -1).is_contiguous()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "padded_contiguous"])
@pytest.mark.parametrize("phase", ["forward", "backward_data", "backward_weight"])
def test_opcheck(phase: str, layout: str) -> None:
    """F: schema, autograd registration, fake kernel with its strides, AOT dispatch; dtypes and
    kernels, by Winograd's algorithm, as a product of matrices and by the library, take turns."""
    turn = ("contiguous", "channels_last", "padded_contiguous").index(layout)
    turn += ("forward", "backward_data", "backward_weight").index(phase)
    dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[turn % 4]
    kernel, padding = ((3, 1), (1, 0), (2, 1))[turn % 3]
    x = in_layout(torch.randn(2, 16, 9, 8).to(dtype), layout).requires_grad_()
    weight = (torch.randn(12, 16, kernel, kernel) / 12).to(dtype).requires_grad_()
    geometry = ([1, 1], [padding, padding], [1, 1])
    with torch.no_grad():
        grad_y = torch.randn_like(phases.convolution(x, weight, None, 1, padding, 1, 1))
    vectors = [torch.rand(16, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(4)]
    before = (*vectors[:2], "relu", 0.0)
    arguments = {
        "forward": ([x], *before, weight, None, None, "identity", 0.0, *geometry, True),
        "backward_data": (
            *(grad_y, weight, list(x.shape), x, *before),
            *(*vectors[2:], None, *geometry),
        ),
        "backward_weight": (grad_y, [x], *before, list(weight.shape), *geometry),
    }[phase]
    op = getattr(torch.ops.resops, f"conv_bn_act_{phase}").default
    result = torch.library.opcheck(op, arguments)
    assert len(result) == 4 and all(v == "SUCCESS" for v in result.values()), result
