"""resops.fuse on blocks as users write them: the same numbers, and what must not be fused."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import resops
from resops.fusion import FuseError, Reason
from tests.dispatch import counted_calls
from tests.fusion.blocks import (
    PreActivation,
    Residual,
    assert_near,
    assert_same_state,
    assert_same_step,
    filled,
    fused_norms,
    pair,
    reasons,
    small_net,
)

IMAGE = (2, 3, 6, 7)


def image(*size: int) -> Tensor:
    return torch.randn(size or IMAGE, dtype=torch.float64)


# ---- numbers and calls --------------------------------------------------------------------------


def test_training_and_evaluation_stay_the_same(native: None) -> None:
    fused, plain = pair(small_net())
    for _ in range(2):
        assert_same_step(fused, plain, image())
    fused.eval(), plain.eval()
    assert_same_step(fused, plain, image())
    with torch.no_grad():
        x = image()
        assert_near(fused(x), plain(x))


def test_the_fused_ops_really_run(native: None) -> None:
    fused, _ = pair(small_net(), torch.float32)
    x = torch.randn(IMAGE)
    with counted_calls() as calls:
        fused(x)
    assert calls["batch_norm_forward"] == 5
    assert not {c for c in calls if "relu" in c or "silu" in c or c == "aten::native_batch_norm"}
    fused.eval()
    with torch.no_grad(), counted_calls() as calls:
        fused(x)
    assert calls["batch_norm_forward"] == 2  # those without a convolution before them
    assert calls["mkldnn::_convolution_pointwise"] == 3


def test_patterns_and_report() -> None:
    model = resops.fuse(small_net())
    report = resops.fuse_report(model)
    assert [(e.name, e.modules, e.pattern) for e in report.fused] == [
        ("", ("1",), "Conv+BN+LeakyReLU"),
        ("", ("8",), "BN+GELU"),
        ("3", ("3.bn1",), "Conv+BN+ReLU"),
        ("3", ("3.bn2",), "Conv+BN+add+ReLU"),
        ("4", ("4.bn",), "BN+SiLU+Conv"),
    ]
    assert report.skipped == ()
    assert str(report).startswith("5 of 5 norms fused")


def test_in_place_with_the_same_objects() -> None:
    model = small_net()

    def parts() -> list[dict[str, Any]]:
        named = (model.named_modules(), model.named_parameters(), model.named_buffers())
        return [dict(things) for things in named]

    before, keys, text = parts(), model.state_dict().keys(), repr(model)
    assert resops.fuse(model) is model
    for old, new in zip(before, parts(), strict=True):
        assert list(old) == list(new) and all(new[k] is v for k, v in old.items())
    assert model.state_dict().keys() == keys and repr(model) == text
    assert isinstance(model[3], Residual) and isinstance(model, nn.Sequential)


def test_unfuse_restores_the_classes() -> None:
    model = small_net()
    classes = [type(m) for m in model.modules()]
    attributes = [sorted(m.__dict__) for m in model.modules()]
    resops.fuse(model)
    assert [type(m) for m in model.modules()] != classes
    model(torch.randn(IMAGE))
    model.eval()(torch.randn(IMAGE))
    assert resops.unfuse(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    assert resops.unfuse(model) is model
    assert set(reasons(model).values()) == {"NOT_FUSED"}
    resops.fuse(model)
    assert len(fused_norms(model)) == 5


@pytest.mark.parametrize(
    ("size", "layers"),
    [
        ((4, 6), [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()]),
        ((4, 3, 9), [nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU()]),
        ((2, 3, 4, 5, 6), [nn.Conv3d(3, 5, 3), nn.BatchNorm3d(5), nn.SiLU()]),
        ((2, 4, 5, 6), [nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(inplace=True)]),
        ((2, 4, 5, 6), [nn.BatchNorm2d(4, affine=False, momentum=None), nn.ReLU()]),
        ((2, 4, 5, 6), [nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()]),
        ((2, 4, 5, 6), [nn.Conv2d(4, 6, 3, groups=2, dilation=2), nn.BatchNorm2d(6)]),
        ((2, 4, 5, 6), [nn.Conv2d(4, 6, 3, padding_mode="reflect", padding=1), nn.BatchNorm2d(6)]),
    ],
    ids=str,
)
def test_sequential(size: tuple[int, ...], layers: list[nn.Module]) -> None:
    fused, plain = pair(nn.Sequential(*copy.deepcopy(layers)))
    assert len(fused_norms(fused)) == 1
    assert_same_step(fused, plain, image(*size))
    fused.eval(), plain.eval()
    with torch.no_grad():
        x = image(*size)
        assert_near(fused(x), plain(x))
    assert_same_state(fused, plain)


class Functional(nn.Module):
    """Activations and additions as functions and methods."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.bn = form, nn.BatchNorm2d(4)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y = self.bn(x)
        match self.form:
            case "torch.relu":
                return torch.relu(y)
            case "F.relu_":
                return F.relu_(y)
            case "method":
                return y.relu()
            case "inplace keyword":
                return F.relu(y, inplace=True)
            case "leaky, slope by position":
                return F.leaky_relu(y, 0.3)
            case "leaky, add_":
                return F.leaky_relu(y.add_(skip), negative_slope=0.3)
            case "torch.add":
                return F.silu(torch.add(skip, y))
            case "no activation":
                return skip + y
            case "broadcast":
                return torch.relu(y + skip[:1, :, :1])
        raise AssertionError(self.form)


@pytest.mark.parametrize(
    "form",
    [
        "torch.relu",
        "F.relu_",
        "method",
        "inplace keyword",
        "leaky, slope by position",
        "leaky, add_",
        "torch.add",
        "no activation",
    ],
)
def test_functions_and_methods(form: str) -> None:
    fused, plain = pair(Functional(form))
    assert fused_norms(fused) == ["bn"]
    with counted_calls() as calls:
        fused(image(2, 4, 3, 3), image(2, 4, 3, 3))
    assert not {"aten::relu", "aten::leaky_relu", "aten::silu", "aten::add"} & set(calls)
    plain.load_state_dict(fused.state_dict())
    for training in (True, False):
        fused.train(training), plain.train(training)
        x, skip = image(2, 4, 3, 3), image(2, 4, 3, 3)
        assert_near(fused(x, skip), plain(x, skip))


def test_a_residual_of_another_size_is_broadcast() -> None:
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return F.leaky_relu(self.bn(x) + skip, 0.3)

    fused, plain = pair(Join())
    assert fused_norms(fused) == ["bn"]
    for size in ((1, 4, 1, 1), (4, 1, 1), (2, 4, 3, 3)):
        assert_same_step(fused, plain, image(2, 4, 3, 3), image(*size))


def test_join_of_two_norms() -> None:
    """relu(bn1(x) + bn2(x)): each norm is in one step."""

    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.main(x) + self.shortcut(x))

    fused, plain = pair(Join())
    report = resops.fuse_report(fused)
    assert {e.pattern: e.modules for e in report.fused} == {
        "Conv+BN": ("main.1",),
        "Conv+BN+add+ReLU": ("shortcut.1",),
    }
    assert_same_step(fused, plain, image(2, 4, 5, 5))
    fused.eval(), plain.eval()
    with torch.no_grad():
        x = image(2, 4, 5, 5)
        assert_near(fused(x), plain(x))


# ---- what must be left alone --------------------------------------------------------------------


class Odd(nn.Module):
    """relu(bn(x)) in a way that must not be replaced."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.bn, self.relu = form, nn.BatchNorm2d(4), nn.ReLU()
        self.register_buffer("calls", torch.zeros(()))
        self.last: Any = None

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return getattr(self, "_" + self.form)(x)

    def _used_twice(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return self.relu(y) * y

    def _called_twice(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.relu(self.bn(x))))


class Strange(Odd):
    """The same with one argument: what it does is what cannot be followed."""

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "_" + self.form)(x)

    def _value(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x)) if x.sum() > 0 else x

    def _isinstance(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x if isinstance(x, Tensor) else x[0]))

    def _is_tensor(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x if torch.is_tensor(x) else x[0]))

    def _mode(self, x: Tensor) -> Tensor:
        return F.dropout(self.relu(self.bn(x)), 0.5, self.training)

    def _gradients(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(x))
        return y if torch.is_grad_enabled() else y + 1

    def _random(self, x: Tensor) -> Tensor:
        return x if random.random() < 2 else self.relu(self.bn(x))

    def _torch_random(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x)) if torch.rand(()) < 0.5 else x

    def _no_grad(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.relu(self.bn(x))

    def _autocast(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.relu(self.bn(x))

    def _checkpoint(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.relu(self.bn(x)), x, use_reentrant=False)

    def _sets_an_attribute(self, x: Tensor) -> Tensor:
        self.last = self.relu(self.bn(x))
        return self.last

    def _makes_a_tensor(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x)) + torch.arange(3.0)

    def _overwrites(self, x: Tensor) -> Tensor:
        shortcut, y = x, self.bn(x)
        x *= 2
        return self.relu(y) + shortcut

    def _overwrites_the_shortcut(self, x: Tensor) -> Tensor:
        x += self.bn(self.relu(x))
        return self.relu(x)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Odd("used_twice"), "UNTRACEABLE"),
        (Strange("used_twice"), "NOTHING_BESIDE"),
        (Strange("called_twice"), "SHARED"),
        (Strange("value"), "UNTRACEABLE"),
        (Strange("isinstance"), "UNTRACEABLE"),
        (Strange("is_tensor"), "UNTRACEABLE"),
        (Strange("mode"), "MODES_DIFFER"),
        (Strange("gradients"), "MODES_DIFFER"),
        (Strange("random"), "UNTRACEABLE"),
        (Strange("torch_random"), "UNTRACEABLE"),
        (Strange("no_grad"), "UNTRACEABLE"),
        (Strange("autocast"), "UNTRACEABLE"),
        (Strange("checkpoint"), "UNTRACEABLE"),
        (Strange("sets_an_attribute"), "UNTRACEABLE"),
        (Strange("makes_a_tensor"), "UNTRACEABLE"),
        (Strange("overwrites_the_shortcut"), "NOTHING_BESIDE"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.form,
)
def test_a_block_that_cannot_be_followed_is_left_as_it_is(block: Odd, reason: str) -> None:
    cls, attributes = type(block), dict(block.__dict__)
    random_states = random.getstate(), torch.get_rng_state()
    resops.fuse(block)
    assert random.getstate() == random_states[0]
    assert torch.equal(torch.get_rng_state(), random_states[1])
    assert type(block) is cls
    assert {k: v for k, v in block.__dict__.items() if not k.startswith("_resops")} == attributes
    assert reasons(block) == {"bn": reason}
    (entry,) = resops.fuse_report(block).skipped
    assert entry.name == "" and entry.hint.startswith(entry.reason.hint)


class SubBatchNorm(nn.BatchNorm2d):
    pass


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *args: None)
    return module


def parametrized(module: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    return module


def with_sparse_weight(norm: nn.BatchNorm2d) -> nn.Module:
    norm.weight = nn.Parameter(torch.ones(4).to_sparse())
    return norm


def on_a_device_without_kernels(norm: Callable[..., nn.Module]) -> nn.Module:
    """Tensors that only say so: no such device is needed."""
    with FakeTensorMode():
        return norm(4, device="xpu")


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([with_hook(nn.BatchNorm2d(4)), nn.ReLU()], Reason.HOOKS),
        ([nn.BatchNorm2d(4), with_hook(nn.ReLU())], Reason.HOOKS),
        ([parametrized(nn.BatchNorm2d(4)), nn.ReLU()], Reason.PARAMETRIZED),
        ([SubBatchNorm(4), nn.ReLU()], Reason.SUBCLASS),
        ([nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()], Reason.DROPOUT_BETWEEN),
        ([nn.BatchNorm2d(4), nn.Tanh()], Reason.UNSUPPORTED_ACTIVATION),
        ([nn.BatchNorm2d(4), nn.GELU("tanh")], Reason.UNSUPPORTED_ACTIVATION),
        ([nn.LayerNorm(3), nn.ReLU()], Reason.UNSUPPORTED_NORM),
        ([nn.BatchNorm2d(4), nn.MaxPool2d(2)], Reason.NOTHING_BESIDE),
        ([nn.BatchNorm2d(4, dtype=torch.complex64), nn.ReLU()], Reason.UNSUPPORTED_DTYPE),
        ([with_sparse_weight(nn.BatchNorm2d(4)), nn.ReLU()], Reason.UNSUPPORTED_LAYOUT),
        ([on_a_device_without_kernels(nn.BatchNorm2d), nn.ReLU()], Reason.UNSUPPORTED_DEVICE),
        ([resops.nn.BatchNormAct2d(4)], Reason.ALREADY_FUSED),
    ],
    ids=str,
)
def test_reasons(layers: list[nn.Module], reason: Reason) -> None:
    model = nn.Sequential(*layers)
    resops.fuse(model)
    (entry,) = resops.fuse_report(model).skipped
    assert (entry.name, entry.modules, entry.reason) == ("", ("0",), reason)
    assert entry.hint.startswith(reason.hint)
    assert type(model) is nn.Sequential


def test_a_norm_that_is_not_called() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.unused, self.act = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.act(self.norm(x))
            return y

    block = resops.fuse(Block())
    assert fused_norms(block) == ["norm"]
    (entry,) = resops.fuse_report(block).skipped
    assert (entry.modules, entry.reason) == (("unused",), Reason.NOT_CALLED)
    assert entry.hint == Reason.NOT_CALLED.hint


def test_every_reason_has_a_hint() -> None:
    assert all(len(reason.hint) > 10 for reason in Reason)


def test_shared_norm() -> None:
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Sequential(norm, nn.ReLU()), nn.Sequential(norm, nn.SiLU()))
    assert reasons(resops.fuse(model)) == {"0.0": "SHARED"}
    model = nn.Sequential(norm, nn.ReLU(), norm, nn.ReLU())
    assert reasons(resops.fuse(model)) == {"0": "SHARED"}


@pytest.mark.parametrize("act", [nn.Tanh, nn.Hardswish, nn.ReLU, nn.Identity])
def test_a_norm_with_an_activation_of_its_own(act: Any) -> None:
    """What the op does not have runs after it, also where the norm is folded into a convolution."""
    norm = resops.nn.SyncBatchNormAct(4, act_layer=act)  # kept fused by convert_sync_batchnorm
    fused, plain = pair(nn.Sequential(nn.Conv2d(3, 4, 3), norm))
    assert fused_norms(fused) == ["1"]
    assert_same_step(fused, plain, image())
    fused.eval(), plain.eval()
    with torch.no_grad():
        x = image()
        assert_near(fused(x), plain(x))
    fused[1].act.register_forward_hook(lambda module, args, y: y + 1)
    plain[1].act.register_forward_hook(lambda module, args, y: y + 1)
    with torch.no_grad():
        assert_near(fused(x), plain(x))


class TwoNames(nn.Module):
    """As nnU-Net's blocks: every layer is an attribute, and in a list that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()
        self.layers = nn.Sequential(self.norm, self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_norm_with_two_names_in_one_place() -> None:
    fused, plain = pair(nn.Sequential(TwoNames(), TwoNames()))
    names = [name for name, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert fused_norms(fused) == names == ["0.norm", "1.norm"]
    assert_same_step(fused, plain, image(2, 4, 3, 3))
    for model in (fused, plain):  # its place is in the list
        model[0].layers[0] = nn.Tanh()
    assert_same_step(fused, plain, image(2, 4, 3, 3))


def test_filter() -> None:
    seen = []

    def chosen(module: nn.Module, name: str) -> bool:
        seen.append((type(module), name))
        return not name.startswith("3")

    model = resops.fuse(small_net(), module_filter_fn=chosen)
    assert reasons(model) == {"3.bn1": "FILTERED", "3.bn2": "FILTERED"}
    assert len(fused_norms(model)) == 3
    assert (nn.BatchNorm2d, "3.bn1") in seen and (PreActivation, "4") in seen


def test_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    model = resops.fuse(small_net(), verbose=True)
    assert capsys.readouterr().out.strip() == str(resops.fuse_report(model))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_backend_of_the_report(backend: str, native: None) -> None:
    model = resops.fuse(small_net())
    with resops.backend(backend):
        assert {entry.backend for entry in resops.fuse_report(model).fused} == {backend}


# ---- changes after fuse -------------------------------------------------------------------------


def add_hook(model: Any) -> Any:
    return model[3].bn1.register_forward_hook(lambda module, args, y: y + 1)


def replace_norm(model: Any) -> None:
    model[3].bn1 = nn.Identity()


def replace_activation(model: Any) -> None:
    model[3]._modules["relu"] = nn.Tanh()


def parametrize(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model[3].bn1, "weight", nn.Tanh())


def change_slope(model: Any) -> None:
    model[2].negative_slope = 0.7


def change_eps(model: Any) -> None:
    model[1].eps = 0.5


def append(model: Any) -> None:
    model.append(nn.Tanh())


def replace_forward(model: Any) -> None:
    model[3].relu.forward = torch.tanh


def change_gelu(model: Any) -> None:
    model[9].approximate = "tanh"


CHANGES = [
    add_hook,
    replace_norm,
    replace_activation,
    parametrize,
    change_slope,
    change_eps,
    append,
    replace_forward,
    change_gelu,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_after_fuse_are_seen(change: Any) -> None:
    """What a user does to a layer later has the effect that it has on the plain model."""
    fused, plain = pair(small_net())
    for model in (fused, plain):
        change(model)
    for training in (True, False):
        fused.train(training), plain.train(training)
        assert_same_step(fused, plain, image())
        with torch.no_grad():
            x = image()
            assert_near(fused(x), plain(x))


def test_a_dropout_of_nothing_is_looked_through() -> None:
    """As MONAI's blocks have it; one that drops something later is seen."""
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.0), nn.ReLU()]
    fused, plain = pair(nn.Sequential(*layers))
    assert [entry.pattern for entry in resops.fuse_report(fused).fused] == ["Conv+BN+ReLU"]
    for p in (0.0, 0.5):
        fused[2].p = plain[2].p = p
        results = []
        for model in (fused, plain):
            torch.manual_seed(1)
            results.append(model(torch.ones(IMAGE, dtype=torch.float64) * torch.rand(6, 7)))
        assert_near(*results)


def test_an_attribute_that_the_forward_looked_at() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.twice = nn.BatchNorm2d(4), False

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.bn(x))
            return 2 * y if self.twice else y

    fused, plain = pair(Switch())
    for model in (fused, plain):
        model.twice = True
    assert_same_step(fused, plain, image(2, 4, 3, 3))


def test_arguments_that_were_not_followed() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor, skip: Any, scale: float = 1.0, *, shift: Any = None) -> Tensor:
            y = F.relu(self.bn(x) if skip is None else self.bn(x) + skip) * scale
            return y if shift is None else y + shift

    fused, plain = pair(Optional())
    assert fused_norms(fused) == ["bn"]
    x, skip = image(2, 4, 3, 3), image(2, 4, 3, 3)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, skip), {}),
        ((x, None), {}),
        ((x, skip, 2.0), {}),
        ((x, skip), {"shift": skip}),
        ((x,), {"skip": skip, "scale": 3.0}),
    ]
    for args, kwargs in calls:
        assert_near(fused(*args, **kwargs), plain(*args, **kwargs))
    assert_same_state(fused, plain)
    with pytest.raises(TypeError, match="skip"):
        fused(x)


# ---- bad input ----------------------------------------------------------------------------------


def assert_unchanged(model: nn.Module, act: Any) -> None:
    classes = [type(m) for m in model.modules()]
    attributes = [dict(m.__dict__) for m in model.modules()]
    act()
    assert [type(m) for m in model.modules()] == classes
    assert [dict(m.__dict__) for m in model.modules()] == attributes


@pytest.mark.parametrize("function", [resops.fuse, resops.unfuse, resops.fuse_report])
def test_not_a_module(function: Any) -> None:
    with pytest.raises(TypeError, match=r"expects an nn\.Module, but got dict"):
        function({})


def test_already_fused() -> None:
    model = resops.fuse(small_net())

    def again() -> None:
        for part in (model, model[3], nn.Sequential(model)):
            with pytest.raises(ValueError, match=r"already fused.*resops\.unfuse"):
                resops.fuse(part)

    assert_unchanged(model, again)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "DataParallel"),
        (torch.compile, r"torch\.compile"),
        (lambda m: (m.compile(), m)[1], r"torch\.compile"),
        (lambda m: torch.jit.trace(m.eval(), torch.randn(IMAGE)), "ScriptModule"),
        (lambda m: nn.Sequential(m).append(torch.compile(m)), r"torch\.compile .*at '1'"),
    ],
    ids=["DataParallel", "compile", "compiled in place", "jit", "inside"],
)
def test_wrapped(wrap: Any, message: str) -> None:
    model = wrap(small_net())

    def refused() -> None:
        with pytest.raises(ValueError, match=message + ".*fuse the model first, wrap it after"):
            resops.fuse(model)

    assert_unchanged(model, refused)


def test_strict() -> None:
    assert len(fused_norms(resops.fuse(small_net(), strict=True))) == 5
    model = nn.Sequential(small_net(), nn.BatchNorm1d(5))

    def refused() -> None:
        with pytest.raises(FuseError, match=r"1: nothing beside it"):
            resops.fuse(model, strict=True)

    assert_unchanged(model, refused)


def test_backend_that_is_not_there() -> None:
    model = small_net()

    def refused() -> None:
        with pytest.raises(resops.BackendError, match=r"Triton|triton"), resops.backend("triton"):
            resops.fuse(model)

    from resops import _dispatch

    if _dispatch.unavailable_reason("triton", "batch_norm") is None:
        with resops.backend("triton"):
            resops.fuse(model)
        assert set(reasons(model).values()) == {"BACKEND_MISSING"}
    else:
        assert_unchanged(model, refused)
    with pytest.raises(ValueError, match="backend must be one of"), resops.backend("fastest"):
        pass


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(small_net(), Residual())
    swap, swapped = resops.fusion.blocks.swap_class, []

    def swap_twice(block: nn.Module, cls: type) -> None:
        swapped.append(block)
        if len(swapped) == 3:
            raise RuntimeError("no")
        swap(block, cls)

    def refused() -> None:
        monkeypatch.setattr(resops.fusion.fusing, "swap_class", swap_twice)
        with pytest.raises(RuntimeError, match="no"):
            resops.fuse(model)

    assert_unchanged(model, refused)
    assert len(swapped) == 5  # two there, one that failed, two back

    def interrupted(module: nn.Module, name: str) -> bool:
        raise KeyboardInterrupt

    def stopped() -> None:
        with pytest.raises(KeyboardInterrupt):
            resops.fuse(model, module_filter_fn=interrupted)

    assert_unchanged(model, stopped)


# ---- patterns of the user -----------------------------------------------------------------------


class ListBlock(nn.Module):
    """Takes a tensor or a list, which fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Any) -> Tensor:
        x = x if isinstance(x, Tensor) else torch.cat(x, 1)
        return self.conv(F.relu(self.bn(x)))


def test_register_pattern() -> None:
    assert reasons(resops.fuse(ListBlock())) == {"bn": "UNTRACEABLE"}

    def forward(block: Any, x: Any) -> Any:
        return block.conv(F.relu(block.bn(torch.cat(x, 1))))

    resops.register_pattern(ListBlock, forward, accepts=lambda x: isinstance(x, list))
    with contextlib.ExitStack() as stack:
        stack.callback(resops.fusion.patterns._patterns.pop, ListBlock)
        fused, plain = pair(ListBlock())
        assert fused_norms(fused) == ["bn"]
        parts = [image(2, 1, 3, 3), image(2, 3, 3, 3)]
        with counted_calls() as calls:
            y = fused(parts)
        assert calls["aten::relu"] == 0
        assert_near(y, plain(parts))
        x = image(2, 4, 3, 3)
        assert_near(fused(x), plain(x))  # by the original forward
        assert_same_state(fused, plain)


@pytest.mark.parametrize("args", [(int, lambda block: None), (ListBlock, 3), (ListBlock(), print)])
def test_register_pattern_of_nothing(args: Any) -> None:
    with pytest.raises(TypeError, match="must be a"):
        resops.register_pattern(*args)


def test_residual_is_filled() -> None:
    """The data of these tests: an identity shortcut and statistics that matter."""
    model = filled(Residual().double().eval())
    x = image(2, 4, 3, 3)
    assert bool(((model(x) - x).abs() > 0.1).any())


class Overwriting(nn.Module):
    """Names of one tensor: what an in-place operation changes is seen under both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.late = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        shortcut = x
        y = self.bn(self.conv(x))
        shortcut *= 2
        z = x - 3
        self.late(z)
        return F.relu(y + z) + x


@pytest.mark.parametrize("training", [True, False])
def test_what_is_overwritten_in_between(training: bool) -> None:
    """The convolution reads x before it is overwritten, although the step runs after it."""
    fused, plain = pair(Overwriting().train(training))
    report = resops.fuse_report(fused)
    assert [entry.pattern for entry in report.fused] == ["BN+add+ReLU"]
    with torch.no_grad():
        x = image(2, 4, 3, 3)
        assert_near(fused(x), plain(x))
