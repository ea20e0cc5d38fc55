"""Instance norm and group norm with residual and activation, against torch's in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from resops.nn import GroupNormAct, InstanceNormAct2d, InstanceNormAct3d
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
        y = function(norm, x, residual, "leaky_relu", 0.2)
    assert_near(y, expected)
    assert y.stride() == expected.stride()
    # PyTorch's group norm knows channels-last.
    own = not (isinstance(norm, nn.GroupNorm) and layout == "channels_last")
    assert calls["batch_norm_forward"] == own and calls["aten::leaky_relu"] == (not own)


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


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("fused", [False, True], ids=["layer", "fuse"])
def test_running_statistics(fused: bool, momentum: Any) -> None:
    """They are updated in training and used in evaluation, as torch's are."""
    kwargs = {"affine": True, "track_running_stats": True, "momentum": momentum}
    plain = nn.Sequential(nn.InstanceNorm2d(3, **kwargs), nn.SiLU()).double()
    if fused:
        model = resops.fuse(copy.deepcopy(plain))
        assert len(resops.fuse_report(model).fused) == 1
    else:
        model = nn.Sequential(InstanceNormAct2d(3, act_layer="silu", **kwargs)).double()
        model.load_state_dict(plain.state_dict(), strict=True)
    for training in (True, True, False):
        model.train(training), plain.train(training)
        x = torch.randn(4, 3, 5, 6, dtype=torch.float64) + 2
        with counted_calls() as calls:
            y = model(x)
        assert calls["batch_norm_forward"] == 1 and calls["aten::silu"] == 0
        assert_near(y, plain(x))
    for key, value in plain.state_dict().items():
        assert_near(model.state_dict()[key], value)


LAYERS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "instance 2d": (InstanceNormAct2d(4, affine=True), nn.InstanceNorm2d(4, affine=True), (4, 5)),
    "instance 3d": (InstanceNormAct3d(4), nn.InstanceNorm3d(4), (3, 4, 2)),
    "group 2d": (GroupNormAct(4, 2), nn.GroupNorm(2, 4), (4, 5)),
    "group 3d": (GroupNormAct(4, group_size=4), nn.GroupNorm(1, 4), (3, 4, 2)),
}


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Identity])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, act: Any) -> None:
    """Norm, residual and activation as torch's layers one after the other, with their keys."""
    layer, norm, spatial = LAYERS[name]
    layer, norm = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
    layer.act = act()
    for p in norm.parameters():
        nn.init.normal_(p)
    layer.load_state_dict(norm.state_dict(), strict=True)
    norm.load_state_dict(layer.state_dict(), strict=True)
    x, residual = (torch.randn(2, 4, *spatial, dtype=torch.float64) for _ in range(2))
    with torch.no_grad(), counted_calls() as calls:
        y, joined = layer(x), layer(x, residual)
    assert calls["batch_norm_forward"] == 2 and calls["aten::relu"] == 0
    assert_near(y, act()(norm(x)))
    assert_near(joined, act()(norm(x) + residual))
    x.requires_grad_(), residual.requires_grad_()
    results = [
        torch.autograd.grad(z.square().sum(), [x, residual, *m.parameters()])
        for z, m in ((layer(x, residual), layer), (act()(norm(x) + residual), norm))
    ]
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


def test_a_layer_with_a_dropout() -> None:
    layer = InstanceNormAct2d(3, drop_layer=nn.Dropout).double().eval()
    x, residual = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    assert_near(layer(x, residual), F.relu(F.instance_norm(x) + residual))
    layer.train().drop = nn.Dropout(1.0)
    assert_near(layer(x, residual), F.relu(residual))


def test_layers_are_one_op_already() -> None:
    model = resops.fuse(nn.Sequential(GroupNormAct(4, 2), InstanceNormAct3d(4), nn.ReLU()))
    reasons = [entry.reason.name for entry in resops.fuse_report(model).skipped]
    assert reasons == ["ALREADY_FUSED"] * 2


def test_group_size() -> None:
    with pytest.raises(ValueError, match="divisible by group_size, but got 6 and 4"):
        GroupNormAct(6, group_size=4)
