"""batch_norm with PReLU: one op, whose slope is learned; against PyTorch's own in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from resops.functional import batch_norm_act
from tests.dispatch import counted_calls
from tests.fusion.blocks import assert_same_step, pair

SIZE = (3, 4, 5, 6)


def parameters(affine: bool = True, slope: float = 0.25) -> dict[str, Any]:
    """Channels of both signs of weight: z <= 0 is where xhat is large in some, small in others."""
    double = {"dtype": torch.float64}
    return {
        "weight": torch.tensor([1.2, -0.7, 0.0, 0.4], **double) if affine else None,
        "bias": torch.tensor([0.3, -0.2, 0.5, 0.0], **double) if affine else None,
        "negative_slope": torch.tensor([slope], **double),
    }


def statistics() -> tuple[Tensor, Tensor]:
    return torch.full((4,), 0.2).double(), torch.full((4,), 1.5).double()


def composed(
    x: Tensor, running: tuple[Tensor, Tensor], training: bool, p: dict[str, Any]
) -> Tensor:
    z = F.batch_norm(x, *running, p["weight"], p["bias"], training, 0.1, 1e-5)
    return F.prelu(z, p["negative_slope"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("slope", [0.25, 0.0, -0.5])
def test_equals_torch(training: bool, affine: bool, slope: float, native: None) -> None:
    x = torch.randn(SIZE, dtype=torch.float64) + 1
    grad = torch.randn_like(x)
    p = parameters(affine, slope)
    leaves = [t.requires_grad_() for t in (x, *p.values()) if t is not None]
    ours, theirs = statistics(), statistics()
    with counted_calls() as calls:
        y = batch_norm_act(x, *ours, training=training, activation="prelu", **p)
        grads = torch.autograd.grad(y, leaves, grad)
    assert calls["batch_norm_forward"] == calls["batch_norm_backward"] == 1
    assert not [name for name in calls if "prelu" in name]
    expected = composed(x, theirs, training, p)
    assert_near = torch.testing.assert_close
    assert_near(y, expected)
    for a, b in zip(grads, torch.autograd.grad(expected, leaves, grad), strict=True):
        assert_near(a, b)
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_derivatives(training: bool) -> None:
    x = torch.randn(SIZE, dtype=torch.float64, requires_grad=True)
    p = parameters()
    p = {k: v.requires_grad_() for k, v in p.items()}

    def function(
        x: Tensor, weight: Tensor, bias: Tensor, slope: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        p: dict[str, Any] = {"negative_slope": slope, "residual": residual}
        return batch_norm_act(x, *statistics(), weight, bias, training, activation="prelu", **p)

    residual = torch.randn_like(x).requires_grad_()
    for inputs in ((x, *p.values()), (x, *p.values(), residual)):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_slope_that_is_not_learned(native: None) -> None:
    """It is leaky_relu then, with a residual too."""
    x, residual = torch.randn(2, *SIZE, dtype=torch.float64)
    x.requires_grad_()
    p = parameters()
    with counted_calls() as calls:
        y = batch_norm_act(x, None, None, training=True, residual=residual, activation="prelu", **p)
    assert calls["batch_norm_forward"] == 1 and calls["aten::prelu"] == 0
    z = F.batch_norm(x, None, None, p["weight"], p["bias"], True) + residual
    torch.testing.assert_close(y, F.prelu(z, p["negative_slope"]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("slope", [0.25, 1.0, -0.5])
def test_slope_with_a_residual(slope: float, affine: bool, layout: str, native: None) -> None:
    """One op too: sizes that leave bits of the mask unused, in either layout."""
    memory_format = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
    tensors = torch.randn(3, *SIZE, dtype=torch.float64)
    x, residual, grad = (t.contiguous(memory_format=memory_format) for t in tensors)
    p = parameters(affine, slope)
    leaves = [t.requires_grad_() for t in (x, residual, *p.values()) if t is not None]
    with counted_calls() as calls:
        y = batch_norm_act(x, None, None, training=True, residual=residual, activation="prelu", **p)
        grads = torch.autograd.grad(y, leaves, grad)
    assert calls["batch_norm_forward"] == calls["batch_norm_backward"] == 1
    assert not [name for name in calls if "prelu" in name]
    z = F.batch_norm(x, None, None, p["weight"], p["bias"], True) + residual
    expected = F.prelu(z, p["negative_slope"])
    torch.testing.assert_close(y, expected)
    for a, b in zip(grads, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_slope_with_a_residual_of_another_dtype(native: None) -> None:
    """Both are promoted, as + does."""
    x, residual = torch.randn(SIZE), torch.randn(SIZE, dtype=torch.float64)
    slope = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)
    y = batch_norm_act(
        x, None, None, training=True, residual=residual, activation="prelu", negative_slope=slope
    )
    z = F.batch_norm(x.double(), None, None, training=True) + residual
    grads = [torch.autograd.grad(t.sum(), slope)[0] for t in (y, F.prelu(z, slope))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"activation": "prelu"}, TypeError, "negative_slope' must be Tensor, not float"),
        ({"activation": "prelu", "negative_slope": torch.ones(4)}, RuntimeError, "one element"),
        ({"negative_slope": torch.ones(1)}, TypeError, "'prelu' only, but got activation 'relu'"),
    ],
)
def test_bad_slopes(kwargs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        batch_norm_act(torch.randn(SIZE), None, None, training=True, **kwargs)


# ---- in fused models ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "pattern"),
    [
        (nn.BatchNorm2d(4), "Conv+BN+PReLU"),
        (nn.InstanceNorm2d(4, affine=True), "IN+PReLU"),
        (nn.GroupNorm(2, 4), "GN+PReLU"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fused(norm: nn.Module, pattern: str, native: None) -> None:
    fused, plain = pair(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.PReLU()))
    assert [entry.pattern for entry in resops.fuse_report(fused).fused] == [pattern]
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    assert_same_step(fused, plain, x)
    fused.eval(), plain.eval()
    assert_same_step(fused, plain, x)
    with torch.no_grad(), counted_calls() as calls:
        y = fused(x)
    assert calls["aten::prelu"] == 0
    torch.testing.assert_close(y, plain(x))
    fused.compile(fullgraph=True, backend="aot_eager")
    assert_same_step(fused, plain, x)


def test_a_slope_per_channel_is_left_alone() -> None:
    model = resops.fuse(nn.Sequential(nn.BatchNorm2d(4), nn.PReLU(4)))
    (entry,) = resops.fuse_report(model).skipped
    assert entry.reason.name == "UNSUPPORTED_ACTIVATION" and "PReLU with one slope" in entry.hint
