"""Battery E: running statistics and module state. Each test names the case that it stands for."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from resops.functional import batch_norm_act, conv_bn_act
from resops.nn import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, Conv2dNormActivation
from tests.accuracy import UNIT_ROUNDOFF, Exact, assert_rule_R, to_numpy
from tests.dispatch import counted_calls, native_calls
from tests.ops.batch_norm_oracle import bits, random_case, run_native

pytestmark = pytest.mark.usefixtures("native")

# Our layer, torch's, and a shape.
LAYERS: list[tuple[Any, Any, tuple[int, ...]]] = [
    (BatchNormAct1d, nn.BatchNorm1d, (6, 5)),
    (BatchNormAct1d, nn.BatchNorm1d, (6, 5, 7)),
    (BatchNormAct2d, nn.BatchNorm2d, (6, 5, 3, 4)),
    (BatchNormAct3d, nn.BatchNorm3d, (6, 5, 2, 3, 4)),
]
layers = pytest.mark.parametrize(("ours", "torchs", "shape"), LAYERS)


# ---- the op -------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_training_without_running_statistics(affine: bool, capability: str) -> None:
    """E: running_mean = running_var = None, training: the input's bits unchanged, no statistics
    written anywhere."""
    case = random_case(torch.randn(4, 5, 3, 3), running=False, affine=affine)
    out = run_native(case)  # which compares every argument with what it was
    assert out["running_mean"] is None and out["running_var"] is None
    case.check(out)


@pytest.mark.parametrize("f", [batch_norm_act, F.batch_norm])
@pytest.mark.parametrize("training", [True, False])
def test_only_one_running_statistic(f: Callable[..., Tensor], training: bool) -> None:
    """E: only one of running_mean and running_var: an error, torch's own class."""
    x = torch.randn(4, 5, 3, 3)
    for mean, var in ((torch.zeros(5), None), (None, torch.ones(5))):
        if training:
            message = "running_mean and running_var must either both be None or neither be None"
            with pytest.raises(ValueError, match=message):
                f(x, mean, var, training=True)
        else:
            name = "running_var" if mean is not None else "running_mean"
            with pytest.raises(RuntimeError, match=f"{name} must be defined in evaluation mode"):
                f(x, mean, var, training=False)


def test_failed_call_leaves_the_statistics() -> None:
    """A call that raises has changed nothing."""
    mean, var = torch.full((5,), 0.5), torch.full((5,), 2.0)
    x = torch.randn(4, 5, 3, 3)
    for bad in ({"weight": torch.ones(4)}, {"residual": torch.zeros(4, 5, 3, 2)}, {"eps": -1.0}):
        with pytest.raises((RuntimeError, ValueError)):
            batch_norm_act(x, mean, var, training=True, **bad)
    assert torch.equal(mean, torch.full((5,), 0.5)) and torch.equal(var, torch.full((5,), 2.0))


def test_statistics_are_updated_once() -> None:
    """One call is one update, with and without gradients, and backward is none."""
    x = torch.randn(4, 5, 3, 3) + 3
    expected = F.batch_norm
    for requires_grad in (False, True):
        ours = torch.zeros(5), torch.ones(5)
        theirs = torch.zeros(5), torch.ones(5)
        y = batch_norm_act(x.clone().requires_grad_(requires_grad), *ours, training=True)
        expected(x, *theirs, training=True)
        if requires_grad:
            y.sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


# ---- the layers ---------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_layer_equals_torch(
    ours: Any,
    torchs: Any,
    shape: tuple[int, ...],
    affine: bool,
    track: bool,
    momentum: float | None,
) -> None:
    """E, B: training steps, then evaluation (where track_running_stats=False uses batch
    statistics): outputs by rule R's floor, equal buffers, also with momentum=None (the plain mean
    of the batches' statistics, which differ in size here)."""
    kwargs = {"affine": affine, "track_running_stats": track, "momentum": momentum}
    a, b = ours(shape[1], **kwargs), torchs(shape[1], **kwargs)
    if affine:
        for layer in (a, b):
            nn.init.constant_(layer.weight, 1.5)
            nn.init.constant_(layer.bias, -0.25)
    # Two float32 evaluations of one formula at |y| of about 5: 16 roundings.
    tolerance = {"rtol": 16 * 2.0**-24, "atol": 16 * 5 * 2.0**-24}
    for step in range(3):
        size = (shape[0] - 2 * (step == 1), *shape[1:])  # a smaller batch in between
        x = torch.randn(size) * (step + 1) + step
        with counted_calls() as calls:
            y = a(x)
        assert native_calls(calls) == {"batch_norm_forward": 1}
        torch.testing.assert_close(y, F.relu(b(x)), **tolerance)
    assert set(a.state_dict()) == set(b.state_dict())
    for name, buffer in b.state_dict().items():
        torch.testing.assert_close(a.state_dict()[name], buffer)
    a.eval(), b.eval()
    x = torch.randn(shape) + 1
    torch.testing.assert_close(a(x), F.relu(b(x)), **tolerance)


def test_momentum_none_is_the_plain_mean() -> None:
    """B: momentum=None, two batches of different size: the plain mean of the batches' statistics,
    not weighted by their samples, with unbiased variances."""
    layer = BatchNormAct2d(3, momentum=None)
    batches = [torch.randn(8, 3, 4, 4) + 5, torch.randn(2, 3, 4, 4) * 3 - 5]
    for x in batches:
        layer(x)
    mean = torch.stack([x.double().mean((0, 2, 3)) for x in batches]).mean(0)
    var = torch.stack([x.double().var((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean.float())
    torch.testing.assert_close(layer.running_var, var.float())


@layers
def test_num_batches_tracked(ours: Any, torchs: Any, shape: tuple[int, ...]) -> None:
    """E: num_batches_tracked is incremented in place, in training only; also for an empty batch."""
    layer = ours(shape[1])
    counter = layer.num_batches_tracked
    address = counter.data_ptr()
    for _ in range(3):
        layer(torch.randn(shape))
    layer(torch.randn(0, *shape[1:]))
    layer.eval()
    layer(torch.randn(shape))
    assert layer.num_batches_tracked is counter and counter.data_ptr() == address
    assert counter.item() == 4 and counter.dtype == torch.int64
    frozen = ours(shape[1], track_running_stats=False)
    assert frozen.num_batches_tracked is None


@layers
def test_state_dict_both_ways(ours: Any, torchs: Any, shape: tuple[int, ...]) -> None:
    """E: strict state_dict both ways, and an old one without num_batches_tracked."""
    a, b = ours(shape[1]), torchs(shape[1])
    with torch.no_grad():
        b.weight.uniform_()
        b.running_mean.uniform_()
    a.load_state_dict(b.state_dict(), strict=True)
    for name, t in b.state_dict().items():
        assert torch.equal(a.state_dict()[name], t)
    b.load_state_dict(a.state_dict(), strict=True)
    old = {k: v for k, v in b.state_dict().items() if k != "num_batches_tracked"}
    a.num_batches_tracked.fill_(7)
    a.load_state_dict(old, strict=True)  # version 1 files had no such buffer
    of_torch = torchs(shape[1])
    of_torch.num_batches_tracked.fill_(7)
    of_torch.load_state_dict(old, strict=True)
    assert a.num_batches_tracked == of_torch.num_batches_tracked


def trained_layer() -> BatchNormAct2d:
    layer = BatchNormAct2d(5, act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": 0.3})
    with torch.no_grad():
        layer.weight.uniform_()
    layer(torch.randn(4, 5, 3, 3) + 2)
    return layer.eval()


def saved_and_loaded(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = BatchNormAct2d(5, act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": 0.3}).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        copy.copy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        saved_and_loaded,
        lambda layer: copy.deepcopy(layer).share_memory(),
    ],
    ids=["deepcopy", "copy", "pickle", "save", "share_memory"],
)
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    """E: deepcopy, pickle, torch.save, share_memory: the same output."""
    layer = trained_layer()
    x, residual = torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3)
    expected = layer(x, residual)
    other = copied(layer)
    assert torch.equal(other(x, residual), expected)
    other.train()
    assert torch.equal(other(x, residual), copy.deepcopy(layer).train()(x, residual))


def test_deepcopy_is_independent() -> None:
    layer: Any = trained_layer()
    other = copy.deepcopy(layer).train()
    before = layer.running_mean.clone()
    other(torch.randn(4, 5, 3, 3) + 100)
    assert torch.equal(layer.running_mean, before)
    assert not torch.equal(other.running_mean, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_another_dtype(dtype: torch.dtype) -> None:
    """E: .to(dtype) moves parameters and statistics as torch's layer does."""
    a, b = BatchNormAct2d(5).to(dtype), nn.BatchNorm2d(5).to(dtype)
    x = torch.randn(4, 5, 3, 3).to(dtype)
    y, expected = a(x), F.relu(b(x))
    assert y.dtype == dtype
    # Two results of one formula, |y| of about 4, each rounded to dtype and to float32 before that.
    atol = 4 * (2 * UNIT_ROUNDOFF[dtype] + 16 * UNIT_ROUNDOFF[torch.float32])
    torch.testing.assert_close(y, expected, rtol=0, atol=atol)
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert p.dtype == q.dtype, name


def test_wrong_number_of_dimensions() -> None:
    """E: the layers raise torch's errors for a wrong number of dimensions."""
    for ours, torchs, good in LAYERS:
        for n in range(1, 7):
            x = torch.randn((2, 5, 3, 3, 3, 3)[:n])
            try:
                torchs(5)(x)
            except ValueError as error:
                with pytest.raises(ValueError, match=str(error).split(" (got")[0]):
                    ours(5)(x)
            except RuntimeError:
                pass
            else:
                ours(5)(x)
        assert good


def test_convert_sync_batchnorm_is_documented() -> None:
    """E: torch's converter makes a plain SyncBatchNorm of any subclass and so loses activation and
    residual. The documentation of the layer says so."""
    assert "convert_sync_batchnorm" in (BatchNormAct2d.__doc__ or "")


def test_functional_call_and_hooks() -> None:
    """E: functional_call replaces parameters; forward hooks see the fused output."""
    layer = trained_layer()
    x = torch.randn(4, 5, 3, 3)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["weight"] = state["weight"] * 2
    doubled = torch.func.functional_call(layer, state, (x,))
    with torch.no_grad():
        layer.weight.mul_(2)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    assert torch.equal(layer(x), doubled) and torch.equal(seen[0], doubled)


# ---- conv + batch norm, folded ------------------------------------------------------------------


def fold_case(
    dtype: torch.dtype,
    *,
    groups: int = 1,
    conv_bias: bool = False,
    affine: bool = True,
    eps: float = 1e-5,
    channels_last: bool = True,
    **conv: Any,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)
    C_in, C = 8, 12

    def draw(*size: int, shift: float = 0.0) -> Tensor:
        return (torch.randn(size, generator=generator) + shift).to(dtype)

    x = draw(2, C_in, 9, 9)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "input": x.contiguous(memory_format=torch.channels_last) if channels_last else x,
        "conv_weight": draw(C, C_in // groups, 3, 3),
        "conv_bias": draw(C) if conv_bias else None,
        "running_mean": draw(C, shift=2.0).to(parameters),
        "running_var": draw(C).abs().to(parameters) + 0.1,
        "weight": draw(C).to(parameters) if affine else None,
        "bias": draw(C).to(parameters) if affine else None,
        "groups": groups,
        "eps": eps,
        **conv,
    }


def folded_exact(case: dict[str, Any], residual: Tensor | None) -> Exact:
    """bn(conv(x)) in float64, and the absolute values of its terms."""
    c = {k: v.double() if isinstance(v, Tensor) else v for k, v in case.items()}
    names = ("stride", "padding", "dilation", "groups")
    geometry = {k: c[k] for k in names if k in c}

    def column(t: Any, default: float) -> Tensor:
        if not isinstance(t, Tensor):
            return torch.tensor(default, dtype=torch.float64)
        return t.view(1, -1, 1, 1)

    scale = column(c["weight"], 1.0) * torch.rsqrt(column(c["running_var"], 1.0) + c["eps"])
    shift = column(c["conv_bias"], 0.0) - column(c["running_mean"], 0.0)
    conv = F.conv2d(c["input"], c["conv_weight"], **geometry)
    z = (conv + shift) * scale + column(c["bias"], 0.0)
    # abs of every term: A = |w| conv |x| for the convolution, kappa = 0.
    absolute = F.conv2d(c["input"].abs(), c["conv_weight"].abs(), **geometry)
    terms = absolute + column(c["conv_bias"], 0.0).abs() + column(c["running_mean"], 0.0).abs()
    terms = terms * scale.abs() + column(c["bias"], 0.0).abs()
    if residual is not None:
        z, terms = z + residual.double(), terms + residual.double().abs()
    return Exact(z.relu().numpy(), terms.numpy())


FOLD_FLAGS: list[dict[str, Any]] = [
    {},
    {"conv_bias": True},
    {"affine": False},
    {"eps": 0.3, "conv_bias": True},
    {"groups": 4},
    {"groups": 4, "conv_bias": True, "affine": False},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": "same"},
    {"padding": "valid", "channels_last": False},
    {"padding": (0, 2), "stride": (2, 1), "channels_last": False, "groups": 2},
]


@pytest.mark.parametrize("flags", FOLD_FLAGS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_folding(dtype: torch.dtype, with_residual: bool, flags: dict[str, Any]) -> None:
    """E: conv+BN folding: groups, bias present or None, affine=False, eps, dtype: equals
    bn(conv(x)) within rule R, against torch's composition as the yardstick."""
    case = fold_case(dtype, **flags)
    composed = F.conv2d(
        case["input"],
        case["conv_weight"],
        case["conv_bias"],
        **{k: case[k] for k in ("stride", "padding", "dilation", "groups") if k in case},
    )
    residual = torch.randn_like(composed) if with_residual else None
    names = ("running_mean", "running_var", "weight", "bias", "eps")
    of_torch = F.batch_norm(composed, **{name: case[name] for name in names})
    of_torch = F.relu(of_torch if residual is None else of_torch + residual)
    with counted_calls() as calls, torch.no_grad():
        ours = conv_bn_act(**case, residual=residual)
    assert not any("batch_norm" in name for name in calls), calls
    assert ours.dtype == dtype and ours.stride() == of_torch.stride()
    exact = folded_exact(case, residual)
    value, terms = (to_numpy(torch.from_numpy(a), dtype) for a in (exact.value, exact.terms))
    # The folded weight is rounded to the dtype once: one more unit roundoff of every term, which
    # the 2u of the rule for the rounded output and torch's own rounding of conv(x) leave room for.
    assert_rule_R("y", ours, of_torch, Exact(value, terms), dtype)


def test_folding_needs_constant_statistics() -> None:
    """E: folding refuses training mode: batch statistics are used, and updated."""
    case = fold_case(torch.float32)
    mean = case["running_mean"]
    assert isinstance(mean, Tensor)
    before = mean.clone()
    with counted_calls() as calls, torch.no_grad():
        conv_bn_act(**case, training=True)
    assert native_calls(calls) == {"batch_norm_forward": 1}
    assert not torch.equal(mean, before)


def test_folding_leaves_gradients_alone() -> None:
    """E: a gradient that is asked for in evaluation is that of the composition."""
    case = fold_case(torch.float32, conv_bias=True)
    leaves = [
        case[k].requires_grad_() for k in ("input", "conv_weight", "conv_bias", "weight", "bias")
    ]
    grads = torch.autograd.grad(conv_bn_act(**case).square().sum(), leaves)
    z = F.conv2d(*(case[k] for k in ("input", "conv_weight", "conv_bias")))
    y = F.relu(
        F.batch_norm(z, *(case[k] for k in ("running_mean", "running_var", "weight", "bias")))
    )
    for a, b in zip(grads, torch.autograd.grad(y.square().sum(), leaves), strict=True):
        # Sums of thousands of float32 products, most of them of the size of the largest gradient.
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("change", ["weight", "conv.weight", "running_var", "eps", "conv.data"])
def test_folded_weights_follow_their_sources(change: str) -> None:
    """E: what is folded is kept until something that went into it changes."""
    block = Conv2dNormActivation(8, 12, 3).eval()
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    conv: Any = block[0]
    norm: Any = block[1]

    def composed() -> Tensor:
        with resops.backend("reference"):
            return block(x)

    with torch.no_grad():
        torch.testing.assert_close(block(x), composed(), rtol=1e-5, atol=1e-5)
        if change == "weight":
            norm.weight.mul_(2)
        elif change == "conv.weight":
            conv.weight.mul_(3)
        elif change == "running_var":
            norm.train()(torch.randn(2, 12, 9, 9) * 4)
            norm.eval()
        elif change == "eps":
            norm.eps = 0.7
        else:
            conv.weight.data[:] += 0.5  # leaves no trace in a version counter
        # Nine times eight float32 products of order 1, twice rounded: 1e-5 is a hundred roundings.
        torch.testing.assert_close(block(x), composed(), rtol=1e-5, atol=1e-5)


def test_folded_block_keeps_its_parameters() -> None:
    """E: folding keeps requires_grad and state_dict, and training goes on after evaluation."""
    block = Conv2dNormActivation(8, 12, 3)
    x = torch.randn(2, 8, 9, 9)
    names = list(block.state_dict())
    block.eval()
    with torch.no_grad():
        block(x)
    assert list(block.state_dict()) == names
    assert all(p.requires_grad for p in block.parameters())
    block.train()
    block(x).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_layer_argument_combinations_reach_the_op() -> None:
    """Every fused activation of a layer is one call of the native op, with or without residual."""
    x = torch.randn(4, 5, 3, 3)
    activations: dict[Any, Any] = {
        nn.ReLU: F.relu,
        functools.partial(nn.LeakyReLU, negative_slope=0.2): functools.partial(
            F.leaky_relu, negative_slope=0.2
        ),
        nn.SiLU: F.silu,
        nn.GELU: F.gelu,
        None: lambda z: z,
    }
    for (layer, f), residual in itertools.product(activations.items(), (None, torch.randn_like(x))):
        ours = BatchNormAct2d(5, act_layer=layer)
        with counted_calls() as calls:
            y = ours(x, residual)
        assert native_calls(calls) == {"batch_norm_forward": 1}, layer
        z = F.batch_norm(x, None, None, training=True)
        expected = f(z if residual is None else z + residual)
        torch.testing.assert_close(y, expected)


def test_frozen_statistics_in_training() -> None:
    """Evaluation mode with gradients (frozen batch norm) leaves every buffer as it is."""
    layer = trained_layer()
    before = {k: bits(v) for k, v in layer.state_dict().items() if v.dtype.is_floating_point}
    x = torch.randn(4, 5, 3, 3, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    for k, v in before.items():
        assert torch.equal(bits(layer.state_dict()[k]), v), k
    case = random_case(x.detach(), training=False)
    case = replace(case, grad_y=torch.ones_like(x))
    case.check(run_native(case))
