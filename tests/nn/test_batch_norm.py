"""BatchNormAct1d/2d/3d: what torch's and timm's layers do, with the activation and the residual.

Values are compared in float64, where any two honest orders of computation agree to 1e-12; the
numerics of the op itself are held to rule R in tests/ops.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from resops.nn import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from tests.dispatch import counted_calls
from tests.torchvision_ops import timm

LAYERS: dict[str, tuple[type[Any], type[Any], tuple[int, ...]]] = {
    "1d": (BatchNormAct1d, nn.BatchNorm1d, (5, 3, 7)),
    "1d, 2-D input": (BatchNormAct1d, nn.BatchNorm1d, (5, 3)),
    "2d": (BatchNormAct2d, nn.BatchNorm2d, (4, 3, 5, 6)),
    "3d": (BatchNormAct3d, nn.BatchNorm3d, (4, 3, 2, 5, 3)),
}
# act_layer, act_kwargs, the module that both stand for, and whether the op applies it itself.
ACTIVATIONS: dict[str, tuple[Any, dict[str, Any] | None, nn.Module, bool]] = {
    "relu": (nn.ReLU, None, nn.ReLU(), True),
    "leaky_relu": (nn.LeakyReLU, {"negative_slope": 0.2}, nn.LeakyReLU(0.2), True),
    "silu": (nn.SiLU, None, nn.SiLU(), True),
    "gelu": (nn.GELU, None, nn.GELU(), True),
    "gelu tanh": (nn.GELU, {"approximate": "tanh"}, nn.GELU("tanh"), False),
    "identity": (nn.Identity, None, nn.Identity(), True),
    "none": (None, None, nn.Identity(), True),
    "name": ("swish", None, nn.SiLU(), True),
    "prelu": (nn.PReLU, {"init": 0.1}, nn.PReLU(init=0.1), False),
    "tanh": (nn.Tanh, None, nn.Tanh(), False),
    "hardswish": ("hard_swish", None, nn.Hardswish(), False),
}


def filled(layer: nn.Module, seed: int = 1) -> Any:
    """The layer in float64, with weights and statistics that are not their initial values."""
    layer.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            t = getattr(layer, name)
            if t is not None:
                t.copy_(torch.rand(t.shape, generator=generator, dtype=t.dtype) + 0.5)
    return layer


def pair(name: str = "2d", **kwargs: Any) -> tuple[Any, Any, Tensor]:
    """Our layer, torch's with the same state, and an input of several standard deviations' mean."""
    ours_class, torch_class, size = LAYERS[name]
    ours = filled(ours_class(size[1], **kwargs))
    plain = {k: v for k, v in kwargs.items() if not k.startswith(("act", "apply", "in", "drop"))}
    theirs = filled(torch_class(size[1], **plain))
    x = torch.randn(size, dtype=torch.float64) + 3
    return ours, theirs, x


def assert_near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), (other, b) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other
        assert_near(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_norm_addition_activation(
    activation: str, with_residual: bool, training: bool, native: None
) -> None:
    act_layer, act_kwargs, act, fused = ACTIVATIONS[activation]
    ours, theirs, x = pair(act_layer=act_layer, act_kwargs=act_kwargs)
    act = copy.deepcopy(act).double()
    ours.train(training), theirs.train(training)
    residual = torch.randn_like(x) if with_residual else None
    inputs = [t.requires_grad_() for t in (x, residual) if t is not None]

    with counted_calls() as calls:
        y = ours(*inputs)
    z = theirs(x) if residual is None else theirs(x) + residual
    expected = act(z)
    assert_near(y, expected)
    assert calls["batch_norm_forward"] == 1
    if fused:  # nothing else touches the tensor
        assert {c for c in calls if "batch_norm" not in c} <= {"aten::add_"}

    grad_y = torch.randn_like(y)
    parameters = [p for _, p in ours.named_parameters()]
    grads = torch.autograd.grad(y, [*inputs, *parameters], grad_y)
    expected_grads = torch.autograd.grad(
        expected, [*inputs, *theirs.parameters(), *act.parameters()], grad_y
    )
    for a, b in zip(grads, expected_grads, strict=True):
        assert_near(a, b)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_near(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("learned", [True, False])
def test_prelu_is_part_of_the_op(learned: bool, native: None) -> None:
    """With a residual too, and where its slope is learned."""
    layer, _, x = pair(act_layer=nn.PReLU)
    layer.act.weight.requires_grad_(learned)
    for residual in (None, torch.randn_like(x)):
        with counted_calls() as calls:
            y = layer(x, residual)
        assert not any("prelu" in name for name in calls)
        assert calls["batch_norm_forward"] == 1 and y.requires_grad
    shared = BatchNormAct2d(3, act_layer=functools.partial(nn.PReLU, 3)).double()
    with counted_calls() as calls:
        shared(x)
    assert any("prelu" in name for name in calls)  # a slope for every channel


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_number_of_dimensions(layer: str, training: bool) -> None:
    ours, theirs, x = pair(layer)
    ours.train(training), theirs.train(training)
    residual = torch.randn_like(x)
    assert_near(ours(x), F.relu(theirs(x)))
    assert_near(ours(x, residual), F.relu(theirs(x) + residual))
    assert_same_state(ours, theirs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"track_running_stats": False, "affine": False},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"eps": 0.1},
    ],
    ids=str,
)
def test_settings_of_torch(kwargs: dict[str, Any]) -> None:
    """Three batches of different sizes in training, then evaluation."""
    ours, theirs, _ = pair(**kwargs)
    for n in (2, 5, 3):
        x = torch.randn(n, 3, 4, 4, dtype=torch.float64) * n + n
        assert_near(ours(x), F.relu(theirs(x)))
        assert_same_state(ours, theirs)
    ours.eval(), theirs.eval()
    assert_near(ours(x), F.relu(theirs(x)))
    assert_same_state(ours, theirs)


def test_statistics_switched_off_later() -> None:
    """torch reads the buffers in evaluation and leaves them alone in training."""
    ours, theirs, x = pair()
    ours.track_running_stats = theirs.track_running_stats = False
    for training in (True, False):
        ours.train(training), theirs.train(training)
        assert_near(ours(x), F.relu(theirs(x)))
        assert_same_state(ours, theirs)


def test_counts_batches_in_place() -> None:
    layer, _, x = pair()
    counter = layer.num_batches_tracked
    address, version = counter.data_ptr(), counter._version
    layer(x), layer(x)
    assert layer.num_batches_tracked is counter
    assert (int(counter), counter.data_ptr()) == (2, address)
    assert counter._version > version  # folded weights are kept by this


def test_one_value_per_channel() -> None:
    layer, _, _ = pair()
    before = {k: v.clone() for k, v in layer.state_dict().items() if k.startswith("running")}
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.ones(1, 3, 1, 1, dtype=torch.float64))
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in before.items())
    assert layer.eval()(torch.ones(1, 3, 1, 1, dtype=torch.float64)).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dims", range(6))
def test_number_of_dimensions_is_checked(layer: str, dims: int) -> None:
    ours, theirs, _ = pair(layer)
    x = torch.ones([2, 3, 2, 2, 2][:dims], dtype=torch.float64)
    message = None
    try:
        theirs._check_input_dim(x)
    except ValueError as error:
        message = str(error)
    if message is None:
        assert ours(x).shape == x.shape
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            ours(x)


@pytest.mark.parametrize("eps", [0.0, -1.0])
@pytest.mark.parametrize("layer", LAYERS)
def test_error_inputs_of_torch(layer: str, eps: float) -> None:
    """I: those of torch's ModuleInfo: eps that is not positive, in training."""
    for module in pair(layer, eps=eps)[:2]:
        with pytest.raises(ValueError, match="eps must be positive"):
            module(torch.ones(LAYERS[layer][2], dtype=torch.float64))


@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU])
def test_wrong_residual(act: type[nn.Module]) -> None:
    layer, _, x = pair(act_layer=act)
    with pytest.raises(RuntimeError, match="residual should have the size"):
        layer(x, x[:, :, 1:])


# ---- timm ----------------------------------------------------------------------------------------


@pytest.mark.models
def test_signature_of_timm() -> None:
    ours = inspect.signature(BatchNormAct2d).parameters
    theirs = inspect.signature(timm().layers.BatchNormAct2d).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@pytest.mark.models
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"apply_act": False},
        {"act_layer": nn.PReLU},
        {"act_layer": "leaky_relu", "act_kwargs": {"negative_slope": 0.3}},
        {"act_layer": "hard_swish", "inplace": False},
        {"act_layer": nn.SiLU, "drop_layer": nn.Identity},
        {"drop_layer": nn.Dropout, "act_layer": nn.GELU},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_is_timms_layer(kwargs: dict[str, Any], training: bool) -> None:
    ours = filled(BatchNormAct2d(3, **kwargs)).train(training)
    theirs = filled(timm().layers.BatchNormAct2d(3, **kwargs)).train(training)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.manual_seed(3)
    y = ours(x.clone())
    torch.manual_seed(3)
    assert_near(y, theirs(x.clone()))


def test_drop_layer_comes_before_residual_and_activation() -> None:
    layer, theirs, x = pair(drop_layer=lambda: nn.Dropout(0.5))
    residual = torch.randn_like(x)
    torch.manual_seed(3)
    y = layer(x, residual)
    torch.manual_seed(3)
    assert_near(y, F.relu(F.dropout(theirs(x), 0.5) + residual))


def test_activation_can_be_replaced() -> None:
    layer, theirs, x = pair()
    layer.act = nn.Tanh()
    assert_near(layer(x), torch.tanh(theirs(x)))
    layer.act = nn.Identity()
    assert_near(layer(x), theirs(x))


def test_hooks_on_the_activation_run() -> None:
    layer, theirs, x = pair()
    seen = []
    handle = layer.act.register_forward_hook(lambda module, args, y: seen.append(y))
    y = layer(x, x)
    assert seen[0] is y
    assert_near(y, F.relu(theirs(x) + x))
    handle.remove()
    with counted_calls() as calls:
        layer(x, x)
    assert calls["aten::relu_"] == calls["aten::relu"] == 0


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"act_layer must be .* relu.* but got 'rellu'"):
        BatchNormAct2d(3, act_layer="rellu")


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_state_dict_loads_both_ways(layer: str) -> None:
    ours, theirs, x = pair(layer)
    theirs(x), theirs(x)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(ours, theirs)
    ours(x)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(ours, theirs)


def test_loads_a_state_without_num_batches_tracked() -> None:
    """What nn.BatchNorm2d saved before its version 2."""
    ours, theirs, _ = pair()
    old = theirs.state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    ours.load_state_dict(old, strict=True)
    assert_same_state(ours, theirs)


def copies(layer: nn.Module) -> dict[str, nn.Module]:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return {
        "copy": copy.copy(layer),
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(file, weights_only=False),
        "share_memory": copy.deepcopy(layer).share_memory(),
    }


def test_copies_compute_the_same() -> None:
    layer, _, x = pair(act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": 0.3})
    layer(x)
    layer.eval()
    for name, other in copies(layer).items():
        assert torch.equal(other(x, x), layer(x, x)), name
        assert repr(other) == repr(layer)


def test_made_on_meta_and_moved() -> None:
    layer = BatchNormAct2d(3, device="meta", dtype=torch.float64)
    assert layer.weight.is_meta and layer.weight.dtype == torch.float64
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.running_var, torch.ones(3, dtype=torch.float64))


def test_functional_call_uses_what_it_is_given() -> None:
    layer, theirs, x = pair()
    state = {k: v.clone() for k, v in filled(nn.BatchNorm2d(3), seed=7).state_dict().items()}
    y = torch.func.functional_call(layer, state, (x,))
    expected = torch.func.functional_call(theirs, {k: v.clone() for k, v in state.items()}, (x,))
    assert_near(y, F.relu(expected))
    assert_same_state(layer, theirs)  # neither was trained


def test_is_a_norm_of_torch() -> None:
    """What walks over a model and looks for norms finds these."""
    for ours, theirs, _ in LAYERS.values():
        assert issubclass(ours, theirs)
    layer = BatchNormAct2d(3)
    assert "3, eps=1e-05, momentum=0.1, affine=True" in repr(layer) and "ReLU" in repr(layer)
    with torch.no_grad():
        layer(torch.randn(4, 3, 2, 2))
        torch.optim.swa_utils.update_bn([torch.ones(2, 3, 2, 2)], layer)
    assert torch.equal(layer.running_mean, torch.ones(3))


def test_autocast_keeps_the_layer_in_float32() -> None:
    layer: Any = BatchNormAct2d(3)
    x = torch.randn(4, 3, 5, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, x)
    assert y.dtype == torch.bfloat16 and layer.running_mean.dtype == torch.float32


def test_the_reference_is_the_twin() -> None:
    layer, _, x = pair()
    twin = copy.deepcopy(layer)
    with resops.backend("reference"), counted_calls() as calls:
        expected = twin(x, x)
    assert calls["aten::native_batch_norm"] == 1 and calls["batch_norm_forward"] == 0
    assert_near(layer(x, x), expected)
    assert_same_state(layer, twin)


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_compiled_without_graph_breaks(act: type[nn.Module]) -> None:
    """Three training steps and one evaluation under torch.compile equal the eager ones."""
    layer, _, x = pair(act_layer=act)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(3):
        results = []
        for module in (compiled, eager):
            y = module(x + step, x)
            y.square().sum().backward()
            results.append(y)
        assert_near(*results)
        assert_near(layer.weight.grad, eager.weight.grad)
        assert_same_state(layer, eager)
    layer.eval(), eager.eval()
    assert_near(compiled(x, x), eager(x, x))
