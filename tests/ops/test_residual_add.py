"""residual_add: values, layouts, special values, determinism. See residual_add_oracle.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resops
from resops.functional import residual_add
from resops.reference import residual_add as reference
from tests.ops.batch_norm_oracle import ACTIVATIONS, bits
from tests.ops.residual_add_oracle import (
    WEIGHTINGS,
    ResidualAddCase,
    random_case,
    run_functional,
    run_native,
    run_ops,
)
from tests.tensors import LAYOUTS, STRANGE_LAYOUTS, Guarded, guarded, in_layout, lazy_zeros

pytestmark = pytest.mark.usefixtures("native")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CAPABLE = pytest.mark.usefixtures("capability")


# ---- rule R -------------------------------------------------------------------------------------


@CAPABLE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_rule_R(weighting: str, dtype: torch.dtype) -> None:
    """Every weighting, dtype, activation and instruction set, in both layouts; L is a multiple of
    16, of 8 and of nothing."""
    shapes = [(3, 5, 7, 3), (2, 16, 5, 2), (4, 6, 4)]
    for i, activation in enumerate(ACTIVATIONS):
        x = torch.randn(shapes[i % 3]).to(dtype)
        layout = "channels_last" if i % 2 else "contiguous"
        case = random_case(in_layout(x, layout), weighting, seed=i, activation=activation)
        case.check(run_native(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighting", ["scalars", "per_sample_complement", "gate"])
def test_weights_in_the_dtype_of_the_data(weighting: str, dtype: torch.dtype) -> None:
    """16-bit weights, and 16-bit gradients of them."""
    x = torch.randn(3, 5, 7, 3).to(dtype)
    for activation in ("identity", "relu", "silu"):
        case = random_case(x, weighting, weight_dtype=dtype, activation=activation)
        case.check(run_native(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """x, residual, gate and gradient, each in that layout while the others are in another."""
    shape = (3, 4, 5, 6)
    for i, name in enumerate(["x", "residual", "alpha", "grad_y"]):
        for other in ("contiguous", "channels_last"):
            values = {n: torch.randn(shape).to(dtype) for n in ("x", "residual", "alpha", "grad_y")}
            tensors = {n: in_layout(t, layout if n == name else other) for n, t in values.items()}
            beta = torch.rand(3, 1, 1, 1, dtype=torch.float64).to(dtype) if i % 2 else "complement"
            case = ResidualAddCase(
                **tensors, beta=beta, activation=ACTIVATIONS[i]
            ).with_decided_signs()
            case.check(run_native(case))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second"])
@pytest.mark.parametrize(
    "shape",
    [(5,), (4, 3), (2, 3, 5), (2, 3, 4, 2, 3), (2, 2, 3, 2, 2, 2), (2, 3, 1, 1), (2, 1, 3, 3)],
)
def test_dimensions(shape: tuple[int, ...], layout: str) -> None:
    """Any number of dimensions from one on; sizes of one, where two layouts are one."""
    for weighting in ("constants", "per_sample", "gate_complement"):
        x = torch.randn(shape)
        x = in_layout(x, layout) if len(shape) > 1 else x
        case = random_case(x, weighting, activation="relu")
        case.check(run_native(case))


@CAPABLE
@pytest.mark.parametrize("seed", range(40))
def test_fuzz_with_guard_bands(seed: int) -> None:
    """Random calls, each tensor inside NaN margins of its own layout and alignment: rule R holds
    and no input, margin or gap is written to."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    spatial = [pick([1, 2, 3, 5, 8, 17]) for _ in range(pick([0, 1, 2, 2, 3]))]
    shape = (pick([1, 2, 3, 9]), pick([1, 2, 3, 8, 16, 33]), *spatial)
    dtype = DTYPES[seed % 4]
    layouts = ["contiguous", "channels_last", *STRANGE_LAYOUTS]

    def guard(values: Tensor) -> Guarded:
        return guarded(values, pick(layouts), pick(range(17)))

    x = torch.randn(shape, generator=generator).to(dtype)
    case = random_case(x, pick(list(WEIGHTINGS)), seed=seed, activation=ACTIVATIONS[seed % 5])
    guards = {
        name: guard(t) if t.shape == x.shape else guarded(t, "contiguous", 3)
        for name, t in case.tensors().items()
    }
    for name, g in guards.items():
        setattr(case, name, g.tensor)
    case.check(run_native(case))
    for g in guards.values():
        g.assert_untouched()


# ---- exact data: nothing skipped, repeated or misplaced -----------------------------------------

LENGTHS = [*range(1, 18), 31, 32, 33, 127, 2047, 2048, 2049, 32767, 32768, 32769, 70001]


@CAPABLE
@pytest.mark.parametrize("weighting", ["plain", "scalar_complement", "per_samples", "gate"])
def test_every_length(weighting: str) -> None:
    """Integers, whose sums are exact in any order: each element is there once, at every length
    of a sample, in the last vector as in the first, in the mask and in the sums."""
    for length in LENGTHS:
        samples = 3 if length < 40 else 2
        x, residual, gate = torch.randint(-8, 9, (3, samples, length)).float()
        grad_y = torch.randint(-2, 3, (samples, length)).float()
        case = random_case(x, weighting, residual=residual, grad_y=grad_y, activation="relu")
        for name in ("alpha", "beta"):
            weight = getattr(case, name)
            if isinstance(weight, Tensor):
                exact = gate if weight.shape == x.shape else torch.randint(-4, 5, weight.shape)
                setattr(case, name, exact.float())
        ours, defined = run_ops(case), run_ops(case, reference)
        assert ours.keys() == defined.keys()
        for name, t in ours.items():
            assert torch.equal(t, defined[name]), f"{name}, L = {length}"


@CAPABLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 256, 256), (1, 8388617)], ids=str)
def test_large_outputs_that_bypass_the_caches(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """16 MB and more, aligned or with a remainder: the same bits as PyTorch's own ops."""
    generator = torch.Generator().manual_seed(1)
    x = torch.empty(shape, dtype=dtype)
    residual, grad_y = torch.empty_like(x), torch.empty_like(x)
    for t in (x, residual, grad_y):
        t.copy_(
            torch.randint(-9, 10, (99991,), generator=generator).repeat(84)[: t.numel()].view(shape)
        )
    assert x.nbytes >= 2**24
    y, mask = torch.ops.resops.residual_add_forward(
        x, residual, None, None, 1.0, 1.0, False, "relu", 0.0
    )
    assert torch.equal(y, F.relu(x + residual))
    grads = torch.ops.resops.residual_add_backward(
        grad_y,
        None,
        None,
        None,
        None,
        1.0,
        -2.0,
        False,
        mask,
        "relu",
        0.0,
        [True, True, False, False],
    )
    g = grad_y * (x + residual > 0)
    assert torch.equal(grads[0], g) and torch.equal(grads[1], -2 * g)


@pytest.mark.parametrize("which", ["x", "residual", "alpha", "grad_y"])
def test_offset_beyond_int32(which: str) -> None:
    """A: few elements, but stride * index > 2^31: gigabytes of addresses, of which little is
    touched."""
    shape, step = (3, 2, 5, 4), 2**30 + 12345
    memory = lazy_zeros(2 * step + 1000, torch.bfloat16)
    far = memory.as_strided(shape, (step, 3, 40, 7))
    case = random_case(torch.randn(shape).bfloat16(), "gate", activation="relu")
    far.copy_(getattr(case, which))
    setattr(case, which, far)
    case.check(run_native(case))


@pytest.mark.slow
def test_more_than_2_31_elements() -> None:
    """64-bit offsets: the gradient of a scalar sums zeros that only the last element is not in."""
    numel = 2**31 + 24
    x, grad_y = lazy_zeros(numel, torch.bfloat16), lazy_zeros(numel, torch.bfloat16)
    x[-1], grad_y[-1] = 3.0, 5.0
    one = torch.ones(1)
    *_, grad_alpha, _ = torch.ops.resops.residual_add_backward(
        grad_y.view(2, -1), x.view(2, -1), None, one, None, 1.0, 1.0, False, None, "identity", 0.0,
        [False, False, True, False],
    )  # fmt: skip
    assert grad_alpha.item() == 15.0


# ---- degenerate sizes ---------------------------------------------------------------------------


@CAPABLE
@pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 3, 4, 5), (4, 0), (4, 2, 0, 3), (0, 0, 2)])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_values(weighting: str, shape: tuple[int, ...]) -> None:
    """Empty outputs; the gradient of a weight that is summed over nothing is 0."""
    for activation in ("identity", "relu", "silu"):
        case = random_case(torch.randn(shape), weighting, activation=activation)
        out = run_native(case)
        for name, t in out.items():
            assert torch.equal(t, torch.zeros_like(t)), name
        assert out["y"].shape == out["grad_x"].shape == shape


@CAPABLE
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1, 1), (3, 1), (1, 7), (1, 3, 1, 1)])
def test_sizes_of_one(shape: tuple[int, ...]) -> None:
    """Where a weight fits several kinds, which one it is taken for makes no difference."""
    x, residual, grad_y = torch.randn(3, *shape)
    sizes = {(), (1,), shape, (shape[0],), (shape[0], *[1] * (len(shape) - 1))}
    for size in sizes:
        weight = torch.randn(size)
        for beta in (0.5, "complement"):
            case = ResidualAddCase(x, residual, weight, beta, "gelu", grad_y=grad_y)
            case.check(run_native(case))


def test_a_vector_of_n_weights_goes_by_samples() -> None:
    """Also where PyTorch's broadcasting would go by the last dimension."""
    x, residual, weight = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4)
    expected = weight.view(4, 1) * x + residual
    torch.testing.assert_close(residual_add(x, residual, weight), expected)
    with resops.backend("reference"):
        torch.testing.assert_close(residual_add(x, residual, weight), expected)


# ---- special values -----------------------------------------------------------------------------


@CAPABLE
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan(dtype: torch.dtype, activation: str) -> None:
    """NaN from either side, under every activation, in every lane; neighbours are not touched."""
    for length in (1, 17):
        for lane in range(length):
            x, residual = torch.ones(1, length, dtype=dtype), torch.zeros(1, length, dtype=dtype)
            (x if lane % 2 else residual)[0, lane] = math.nan
            y = residual_add(x, residual, activation=activation)
            assert y.isnan()[0, lane] and y.isnan().sum() == 1


@CAPABLE
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_at_zero_and_nan(dtype: torch.dtype, activation: str) -> None:
    """0 and -0 block the gradient (slope at leaky_relu), NaN lets it pass; a blocked gradient is 0
    even where grad_y is NaN or inf."""
    z = torch.tensor([[0.0, -0.0, math.nan, 1e-30, -1e-30, 1.0, -math.inf, math.inf, -1.0, -1.0]])
    x = z.to(dtype).requires_grad_()
    residual = torch.full_like(x, -0.0).requires_grad_()
    grad = torch.full_like(x, 2.0)
    blocked = 0.0
    if activation == "relu":
        grad[0, 8], grad[0, 9] = math.nan, math.inf
    else:
        blocked = 0.5
    y = residual_add(x, residual, activation=activation, negative_slope=0.25)
    y.backward(grad)
    tiny = 2.0 if dtype != torch.float16 else blocked  # 1e-30 is 0 in float16
    expected = [blocked, blocked, 2, tiny, blocked, 2, blocked, 2, blocked, blocked]
    for leaf in (x, residual):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.tensor([expected]).to(dtype))


@CAPABLE
def test_a_dropped_branch_is_multiplied_by_zero() -> None:
    """As in PyTorch: 0 * inf is NaN; the gradient of a dropped branch is exactly 0."""
    x = torch.randn(3, 5).requires_grad_()
    with torch.no_grad():
        x[0, 0] = math.inf
    residual = torch.randn(3, 5)
    alpha = torch.tensor([0.0, 0.0, 2.0])
    y = residual_add(x, residual, alpha)
    assert y[0, 0].isnan() and torch.equal(y[0, 1:], residual[0, 1:])
    assert torch.equal(y[1], residual[1])
    y[:, 1:].sum().backward()
    assert x.grad is not None and torch.equal(x.grad[:2], torch.zeros(2, 5))


@CAPABLE
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_huge_weights(activation: str) -> None:
    """Finite gradients from a weight near the largest number, missing lanes included."""
    x, residual = torch.full((1, 17), 1e-30), torch.zeros(1, 17)
    alpha = torch.tensor([3e38], requires_grad=True)
    residual_add(x, residual, alpha, activation=activation).sum().backward()
    assert alpha.grad is not None
    torch.testing.assert_close(alpha.grad, torch.tensor([17e-30]))


def test_new_tensors() -> None:
    """y is never x or residual, and backward does not write into grad_y."""
    x, residual = torch.randn(4, 4, requires_grad=True), torch.zeros(4, 4, requires_grad=True)
    y = residual_add(x, residual, 1.0, 0.0)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    grad_y = torch.randn(4, 4)
    before = grad_y.clone()
    y.backward(grad_y)
    assert x.grad is not None and residual.grad is not None
    x.grad.add_(1)
    residual.grad.add_(1)
    assert torch.equal(grad_y, before)


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["scalars", "per_sample_complement", "gate_per_sample"])
def test_same_bits_for_any_number_of_threads(weighting: str) -> None:
    case = random_case(torch.randn(3, 16, 61, 67), weighting, activation="silu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            results.append(run_ops(case))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, t in results[0].items():
            if t.dtype != torch.uint8:
                assert torch.equal(bits(t), bits(other[name])), name


# ---- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("second", DTYPES, ids=str)
def test_mixed_dtypes_are_promoted(first: torch.dtype, second: torch.dtype, backend: str) -> None:
    """As + and * would: by x, residual and gates; a scalar has no say and is widened."""
    x, residual = torch.randn(3, 4).to(first), torch.randn(3, 4).to(second)
    both = torch.promote_types(first, second)
    with resops.backend(backend):
        y = residual_add(x, residual)
        assert y.dtype == both
        torch.testing.assert_close(y, x + residual)
        gate = torch.rand(3, 4).to(second).requires_grad_()
        y = residual_add(x, x, gate, "complement")
        assert y.dtype == both
        y.sum().backward()
        assert gate.grad is not None and gate.grad.dtype == second
        scalar = torch.rand(1).to(torch.bfloat16).requires_grad_()
        if both != torch.float16:
            y = residual_add(x, residual, scalar)
            assert y.dtype == both
            y.sum().backward()
            assert scalar.grad is not None and scalar.grad.dtype == torch.bfloat16


# ---- the definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference(activation: str, weighting: str) -> None:
    """The definition itself, by autograd and as the two passes, obeys rule R."""
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(3, 4, 5, 2).to(dtype).to(memory_format=torch.channels_last)
        case = random_case(x, weighting, activation=activation)
        with resops.backend("reference"):
            case.check(run_functional(case))
        passes = run_ops(case, reference)
        passes.pop("mask")
        case.check(passes)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 3), (2, 4, 2, 3, 3)])
def test_mask_of_reference_and_kernel(shape: tuple[int, ...], layout: str) -> None:
    """Bit for bit, padding included, in the memory order of y."""
    case = random_case(in_layout(torch.randn(shape), layout), activation="leaky_relu")
    ours, defined = run_ops(case), run_ops(case, reference)
    assert torch.equal(ours["mask"], defined["mask"])
    assert torch.equal(
        reference.unpack_mask(ours["mask"], ours["y"]), ~(case.x + case.residual <= 0)
    )
