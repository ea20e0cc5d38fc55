"""Battery C: memory layouts and aliasing. Each test names the case that it stands for.

torch's own batch norm gets dense copies: with a permuted gradient of shape (1, 2, 1, 2) its CPU
backward (2.13) is wrong. Only ours gets the strange strides.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resops.functional import batch_norm_act
from tests.ops.batch_norm_oracle import (
    ACTIVATIONS,
    BatchNormCase,
    bits,
    expected_strides,
    random_case,
    run_functional,
    run_native,
    run_ops,
)
from tests.tensors import (
    DENSE_LAYOUTS,
    EXPANDED_LAYOUTS,
    LAYOUTS,
    STRANGE_LAYOUTS,
    guarded,
    in_layout,
)

pytestmark = pytest.mark.usefixtures("native")

SHAPES = [(13, 7), (3, 6, 9), (3, 19, 5, 7), (2, 5, 2, 3, 4)]
HALF = [torch.bfloat16, torch.float16]


@functools.cache
def plain_case(shape: tuple[int, ...], dtype: torch.dtype) -> BatchNormCase:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(4)) + 1).to(dtype)
    return random_case(x, residual=True, activation="relu").with_decided_signs()


@pytest.mark.parametrize("which", ["x", "residual", "grad_y"])
@pytest.mark.parametrize("layout", [*DENSE_LAYOUTS, *STRANGE_LAYOUTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_strange_strides_of_one_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, which: str
) -> None:
    """C: x sliced, permuted, padded, with NaN in the gaps: no NaN leaks, and rule R holds."""
    case = plain_case(shape, dtype)
    guard = guarded(getattr(case, which), layout, offset=1)
    case = replace(case, **{which: guard.tensor})
    case.check(run_native(case))
    guard.assert_untouched()


@pytest.mark.parametrize("layout", STRANGE_LAYOUTS)
@pytest.mark.parametrize("residual_layout", ["contiguous", "channels_last", "padded_contiguous"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "all_reversed"])
def test_strange_strides_of_all_tensors(
    layout: str, residual_layout: str, grad_layout: str
) -> None:
    """C: x, residual and grad_y each in a layout of its own."""
    plain = plain_case((3, 19, 5, 7), torch.float32)
    assert plain.residual is not None and plain.grad_y is not None
    case = replace(
        plain,
        x=in_layout(plain.x, layout),
        residual=in_layout(plain.residual, residual_layout),
        grad_y=in_layout(plain.grad_y, grad_layout),
    )
    case.check(run_native(case))


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(None, None, 2), slice(1, -1)),
        (slice(1, None), slice(2, -1), slice(None), slice(None, -2)),
        (slice(None, None, 2), slice(0, 16), slice(1, 3), slice(2, 3)),
    ],
)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_slices_of_nan(
    index: tuple[slice, ...], format: torch.memory_format, capability: str
) -> None:
    """C: x[:, ::2, 1:-1] and the like of a tensor that is NaN everywhere else."""
    whole = torch.full((5, 20, 6, 7), math.nan).contiguous(memory_format=format)
    part = whole[index]
    part.copy_(torch.randn(part.shape) + 3)
    grad = torch.full_like(whole, math.nan)[index].copy_(torch.randn(part.shape))
    residual = torch.full_like(whole, math.nan)[index].copy_(torch.randn(part.shape))
    case = random_case(part, residual=residual, grad=grad, activation="relu")
    decided = case.with_decided_signs().grad_y
    assert decided is not None
    grad.copy_(decided)
    before = bits(whole)
    case.check(run_native(case))
    assert torch.equal(bits(whole), before)


@pytest.mark.parametrize("layout", EXPANDED_LAYOUTS)
@pytest.mark.parametrize("which", ["x", "residual", "grad_y"])
def test_expanded(which: str, layout: str, capability: str) -> None:
    """C: x expanded in the batch (stride 0): right, and grad_x dense; so with other tensors."""
    if which == "x" and layout == "expanded":
        layout = "expanded_batch"  # one value everywhere: test_constant_channel
    case = random_case(torch.randn(3, 19, 5, 7), residual=True, activation="relu")
    case = replace(case, **{which: in_layout(getattr(case, which), layout)})
    if which != "grad_y":
        case = case.with_decided_signs()
    else:  # an expanded gradient cannot be zeroed in places: no sign may be near undecided
        case = replace(case, activation="identity")
    out = run_native(case)
    case.check(out)
    for name in ("y", "grad_x", "grad_residual"):
        t = out[name]
        assert t is not None and 0 not in t.stride(), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_gradient_of_a_sum(activation: str, layout: str, capability: str) -> None:
    """C: y.sum().backward(), whose gradient has stride 0, equals the materialised gradient."""
    x = in_layout(torch.randn(3, 19, 5, 7), layout)
    case = random_case(x, residual=True, activation=activation, grad=False)
    grads = []
    for materialised in (False, True):
        leaf = x.clone().requires_grad_()
        weight = case.weight.clone().requires_grad_()  # type: ignore[union-attr]
        y = batch_norm_act(
            leaf, None, None, weight, case.bias, True, residual=case.residual, activation=activation
        )
        y.backward(torch.ones_like(y)) if materialised else y.sum().backward()
        grads.append((leaf.grad, weight.grad))
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


# ---- the layout of the outputs ------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*DENSE_LAYOUTS, *STRANGE_LAYOUTS, *EXPANDED_LAYOUTS])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_strides_are_those_of_torch(shape: tuple[int, ...], layout: str) -> None:
    """C: channels_last and channels_last_3d, training and evaluation: y and grad_x keep the input's
    memory format, as torch's do. 3-D channels-last, which torch makes contiguous, is kept too."""
    for training in (True, False):
        x = in_layout(torch.randn(shape), layout)
        mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
        leaf = x.detach().requires_grad_()
        y = batch_norm_act(leaf, mean, var, training=training)
        (grad_x,) = torch.autograd.grad(y, leaf, torch.randn(shape))
        with torch.no_grad():
            of_torch = F.batch_norm(x, mean, var, training=training)
        if len(shape) == 3 and layout == "channels_last":
            assert y.stride() == grad_x.stride() == x.stride()
        else:
            assert y.stride() == of_torch.stride() == grad_x.stride()
        assert y.stride() == expected_strides(x)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("residual", [False, True])
def test_evaluation_is_the_same_in_both_layouts(dtype: torch.dtype, residual: bool) -> None:
    """C: same data NCHW and channels_last, evaluation, 16-bit: equal (torch was off by 1.1)."""
    case = random_case(
        torch.randn(4, 19, 7, 9).to(dtype), residual=residual, training=False, activation="relu"
    )
    other = replace(
        case,
        x=case.x.contiguous(memory_format=torch.channels_last),
        residual=None if case.residual is None else in_layout(case.residual, "channels_last"),
    )
    a, b = run_native(case), run_native(other)
    for name in ("y", "grad_x", *(["grad_residual"] if residual else [])):
        one, two = a[name], b[name]
        assert one is not None and two is not None and torch.equal(one, two), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_channels_last_backward_leaves_nothing_uninitialised(
    dtype: torch.dtype, capability: str
) -> None:
    """C: 16-bit channels_last backward with use_deterministic_algorithms(True), which fills empty
    memory with NaN, as every test here does: no NaN."""
    assert torch.are_deterministic_algorithms_enabled() and torch.empty(9).isnan().all()
    for shape, activation in itertools.product([(2, 3, 5, 7), (4, 64, 8, 8)], ACTIVATIONS):
        x = in_layout(torch.randn(shape).to(dtype), "channels_last")
        case = random_case(x, residual=True, activation=activation)
        for name, t in run_ops(case).items():
            assert t is not None and not t.isnan().any(), name


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape", [(6, 5, 1, 1), (6, 1, 4, 3), (1, 1, 4, 3), (1, 5, 1, 4), (1, 5, 4, 1)]
)
def test_singleton_dimensions(
    shape: tuple[int, ...], format: torch.memory_format, capability: str
) -> None:
    """C: NC11, N1HW, 11HW in both formats, and singletons cut out of larger tensors, whose strides
    mean nothing: right data, and torch's output strides."""
    N, C, H, W = shape
    plain = torch.randn(shape).contiguous(memory_format=format)
    larger = torch.full((N + 1, C + 2, H + 2, W + 3), math.nan).contiguous(memory_format=format)
    cut = larger[1:, 1 : C + 1, 1 : H + 1, 2 : W + 2].copy_(plain)
    for x in (plain, cut):
        for residual in (False, True):
            case = random_case(x, residual=residual, activation="relu").with_decided_signs()
            out = run_native(case)
            case.check(out)
            y, grad_x = out["y"], out["grad_x"]
            assert y is not None and grad_x is not None
            stride = F.batch_norm(x, None, None, training=True).stride()
            assert y.stride() == stride == grad_x.stride()


@pytest.mark.parametrize("x_stride", [(2, 1, 2, 1), (4, 2, 2, 1), (4, 1, 4, 1), (1, 1, 1, 1)])
def test_permuted_gradient_of_a_tiny_tensor(x_stride: tuple[int, ...]) -> None:
    """C: the gradient of shape (1, 2, 1, 2) for which torch's own CPU backward is wrong."""
    x = torch.randn(1, 2, 1, 2)
    grad = torch.randn(1, 2, 2, 1).transpose(2, 3).contiguous().permute(0, 3, 2, 1)
    case = random_case(x, grad=grad)
    case.check(run_native(case))
    if x_stride != (1, 1, 1, 1):
        memory = torch.full((16,), math.nan)
        odd = memory.as_strided((1, 2, 1, 2), x_stride).copy_(x)
        case = random_case(odd, grad=grad)
        case.check(run_native(case))


# ---- aliasing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 3)])
def test_output_is_a_new_tensor(shape: tuple[int, ...], activation: str | None) -> None:
    """C: out-of-place promise: evaluation with weight 1, mean 0 and var 1 is the identity, and
    still y is a new tensor."""
    x = torch.rand(shape) + 1
    before = x.clone()
    mean, var = torch.zeros(3), torch.ones(3)
    y = batch_norm_act(x, mean, var, eps=0.0, activation=activation)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    y.neg_()
    y.relu_()
    assert torch.equal(x, before)


def test_backward_does_not_write_into_grad_y(capability: str) -> None:
    """C: backward must not write into grad_out, nor into what was saved."""
    for activation, residual in itertools.product(ACTIVATIONS, [False, True]):
        case = random_case(torch.randn(3, 19, 5, 7), residual=residual, activation=activation)
        run_native(case)  # which compares every argument with what it was


def test_one_tensor_as_x_and_residual(capability: str) -> None:
    """C: x added to its own normalisation: both gradients arrive in the one leaf."""
    x = torch.randn(3, 5, 4, 4).requires_grad_()
    y = batch_norm_act(x, None, None, None, None, True, residual=x, activation="silu")
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    case = random_case(
        x.detach(), residual=x.detach(), affine=False, running=False, grad=grad_y, activation="silu"
    )
    separate = run_functional(case)
    a, b = separate["grad_x"], separate["grad_residual"]
    assert x.grad is not None and a is not None and b is not None
    torch.testing.assert_close(x.grad, a + b)


def test_parameters_that_are_views() -> None:
    """C: weight, bias and running statistics with strides: a slice of a larger vector."""
    case = random_case(torch.randn(6, 5, 3, 3))

    def spread(t: Tensor | None) -> Tensor:
        assert t is not None
        memory = torch.full((3 * t.numel() + 1,), math.nan)
        return memory[1::3].copy_(t)

    names = ("weight", "bias", "running_mean", "running_var")
    strided = replace(case, **{name: spread(getattr(case, name)) for name in names})
    assert strided.weight is not None and strided.weight.stride() == (3,)
    a, b = run_ops(case), run_ops(strided)
    for name, t in a.items():
        other = b[name]
        assert t is None or (other is not None and torch.equal(t, other)), name
    # The running statistics are updated where they are, and nothing between them.
    mean = strided.running_mean
    assert mean is not None
    base = mean._base if mean._base is not None else mean
    batch_norm_act(case.x, mean, strided.running_var, training=True)
    expected = a["running_mean"]
    assert expected is not None and torch.equal(mean, expected)
    assert base.isnan().sum() == base.numel() - 5


def test_fake_strides_are_the_real_ones() -> None:
    """C: fake/meta strides = eager strides, for every layout (opcheck does it per op and dtype)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for shape, layout in itertools.product([*SHAPES, (6, 5, 1, 1), (6, 1, 4, 3)], LAYOUTS):
        x = in_layout(torch.randn(shape), layout)
        C = shape[1]
        tensors = [x, x.clone(), torch.ones(C), torch.zeros(C), torch.zeros(C), torch.ones(C)]
        flags = (True, 0.1, 1e-5, "relu", 0.01)
        real = torch.ops.resops.batch_norm_forward(*tensors, *flags)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in tensors]
            fake = torch.ops.resops.batch_norm_forward(*fakes, *flags)
        for a, b in zip(real, fake, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride(), (
                shape,
                layout,
            )


# ---- outputs that bypass the caches -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [False, True])
def test_large_outputs_equal_small_ones(
    residual: bool, layout: str, dtype: torch.dtype, capability: str
) -> None:
    """Outputs of 16 MB and more are written past the caches. In evaluation every element is its
    own: the result for the whole batch has the bits of the results for its parts."""
    per_image = 20 * 208 * 208  # 20 channels, not a multiple of 16; 208 * 208 is
    N = math.ceil(17 * 2**20 / (per_image * torch.empty(0, dtype=dtype).element_size()))
    generator = torch.Generator().manual_seed(5)
    small = torch.randn(3, 20, 208, 208, generator=generator).to(dtype)

    def big(shift: int) -> Tensor:
        images = [small[(i + shift) % 3].roll(i, 0) for i in range(N)]
        t = torch.stack(images)
        return t if layout == "contiguous" else t.contiguous(memory_format=torch.channels_last)

    x, grad_y = big(0), big(1)
    assert x.nbytes >= 16 * 2**20
    case = random_case(
        x, residual=big(2) if residual else False, training=False, activation="relu", grad=grad_y
    )
    whole = run_ops(case)
    for part in (slice(0, 1), slice(N // 2, N // 2 + 1), slice(N - 1, N)):
        piece = replace(
            case,
            x=x[part],
            residual=None if case.residual is None else case.residual[part],
            grad_y=grad_y[part],
        )
        small_out = run_ops(piece)
        for name in ("y", "grad_x", *(["grad_residual"] if residual else [])):
            a, b = whole[name], small_out[name]
            assert a is not None and b is not None and torch.equal(a[part], b), name
    assert whole["y"] is not None and not whole["y"].isnan().any()
