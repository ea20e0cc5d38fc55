"""Instance norm and group norm with residual and activation, against torch's in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from resops.nn.instance_norm import group_normalize, instance_normalize
from tests.dispatch import counted_calls

NORMS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "instance 1d": (nn.InstanceNorm1d(4, affine=True), instance_normalize, (3, 4, 9)),
    "instance 2d": (nn.InstanceNorm2d(4, affine=True), instance_normalize, (3, 4, 5, 6)),
    "instance 3d": (nn.InstanceNorm3d(4), instance_normalize, (3, 4, 5, 2, 3)),
    "instance, no batch": (nn.InstanceNorm2d(4), instance_normalize, (4, 5, 6)),
    "group 2d": (nn.GroupNorm(2, 4), group_normalize, (3, 4, 5, 6)),
    "group 3d": (nn.GroupNorm(4, 4, eps=0.1), group_normalize, (3, 4, 5, 2, 3)),
    "group, no affine": (nn.GroupNorm(1, 4, affine=False), group_normalize, (3, 4, 5, 6)),
}


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Torch has no such memory format for three dimensions.
LAYOUTS = [(name, "contiguous") for name in NORMS] + [
    (name, "channels_last") for name, (_, _, size) in NORMS.items() if len(size) in FORMATS
]


def assert_near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_equals_torch(name: str, layout: str, with_residual: bool) -> None:
    norm, function, size = NORMS[name]
    norm = copy.deepcopy(norm).double()
    for p in norm.parameters():
        nn.init.normal_(p)
    x = torch.randn(size, dtype=torch.float64) + 3
    if layout == "channels_last":
        x = x.contiguous(memory_format=FORMATS[len(size)])
    residual = torch.randn_like(x) if with_residual else None
    inputs = [t.requires_grad_() for t in (x, residual) if t is not None]
    expected = norm(x) if residual is None else norm(x) + residual
    expected = F.leaky_relu(expected, 0.2)
    y = function(norm, x, residual, "leaky_relu", 0.2)
    assert_near(y, expected)
    grad = torch.randn_like(y)
    leaves = [*inputs, *norm.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        assert_near(ours, theirs)
    with torch.no_grad(), counted_calls() as calls:
        assert_near(function(norm, x, residual, "leaky_relu", 0.2), expected)
    assert calls["batch_norm_forward"] == 1 and calls["aten::leaky_relu"] == 0


def test_one_value_per_instance() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
        instance_normalize(nn.InstanceNorm2d(3), torch.ones(2, 3, 1, 1), None, "relu", 0.0)


@pytest.mark.parametrize(
    ("norm", "conv", "size", "pattern"),
    [
        (nn.InstanceNorm3d(4, affine=True), nn.Conv3d(3, 4, 3), (2, 3, 5, 5, 5), "IN+LeakyReLU"),
        (nn.InstanceNorm2d(4), nn.Conv2d(3, 4, 3), (2, 3, 5, 5), "IN+LeakyReLU"),
        (nn.GroupNorm(2, 4), nn.Conv3d(3, 4, 3), (2, 3, 5, 5, 5), "GN+LeakyReLU"),
        (nn.GroupNorm(2, 4), nn.Conv2d(3, 4, 3), (2, 3, 5, 5), "GN+LeakyReLU"),
    ],
    ids=str,
)
def test_fused(norm: nn.Module, conv: nn.Module, size: tuple[int, ...], pattern: str) -> None:
    plain = nn.Sequential(conv, norm, nn.LeakyReLU(0.1, inplace=True)).double()
    fused = resops.fuse(copy.deepcopy(plain))
    assert [entry.pattern for entry in resops.fuse_report(fused).fused] == [pattern]
    x = torch.randn(size, dtype=torch.float64)
    for training in (True, False):
        fused.train(training), plain.train(training)
        assert_near(fused(x), plain(x))
        with torch.no_grad():
            assert_near(fused(x), plain(x))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), plain(x))


def test_with_running_statistics_it_is_left_alone() -> None:
    model = resops.fuse(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.ReLU()))
    (entry,) = resops.fuse_report(model).skipped
    assert entry.reason.name == "UNSUPPORTED_NORM" and "with running statistics" in entry.hint
