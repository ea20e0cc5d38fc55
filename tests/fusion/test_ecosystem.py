"""What else people do with a model goes on working after resops.fuse."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import resops
from resops.fusion import explaining
from tests.dispatch import counted_calls
from tests.fusion.blocks import (
    Residual,
    assert_near,
    assert_same_state,
    assert_same_step,
    fused_norms,
    pair,
    small_net,
)


def image(samples: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(samples, 3, 6, 7, dtype=dtype)


def assert_is_fused(model: nn.Module) -> None:
    with counted_calls() as calls:
        model(image())
    assert calls["batch_norm_forward"] == 5
    assert not [name for name in calls if name == "aten::native_batch_norm"]


# ---- copies -------------------------------------------------------------------------------------


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies_are_fused(copied: Any) -> None:
    fused, plain = pair(small_net())
    fused.eval()
    with torch.no_grad():
        fused(image())  # folded convolutions are not copied
    other = copied(fused.train())
    assert fused_norms(other) == fused_norms(fused)
    assert [type(a) for a in other.modules()] == [type(b) for b in fused.modules()]
    if copied is not copy.copy:
        assert_same_step(other, plain, image())
    assert_is_fused(other)


def test_a_pickle_keeps_the_filter() -> None:
    model = resops.fuse(small_net(), module_filter_fn=lambda m, name: name != "3.bn1")
    other = pickle.loads(pickle.dumps(model))
    assert resops.fuse_report(other) == resops.fuse_report(model)
    assert len(fused_norms(other)) == 4


def test_a_changed_block_stays_changed_in_its_copies() -> None:
    model = resops.fuse(small_net()).double()
    model[3].relu = nn.Tanh()
    x = image()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_near(other(x), model(x))


def test_state_dict_with_weights_only() -> None:
    fused, plain = pair(small_net())
    assert_same_step(fused, plain, image())
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    fresh = small_net().double()
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same_state(fresh, fused)
    fused.load_state_dict(fresh.state_dict(), strict=True, assign=True)
    assert_same_step(fused, fresh, image())


def test_meta_device() -> None:
    with torch.device("meta"):
        model = small_net()
    resops.fuse(model)
    assert len(fused_norms(model)) == 5
    assert model(torch.empty(2, 3, 6, 7, device="meta")).shape == (2, 5)
    model.to_empty(device="cpu").load_state_dict(small_net().state_dict())
    assert_is_fused(model.double())


# ---- training -----------------------------------------------------------------------------------


def test_an_optimizer_from_before_goes_on() -> None:
    plain = small_net().double()
    fused = copy.deepcopy(plain)
    results = []
    for model in (fused, plain):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        if model is fused:
            resops.fuse(model)
        torch.manual_seed(1)
        for _ in range(3):
            for _ in range(2):  # gradients are accumulated
                model(image()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model)
    assert_same_state(*results)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    fused, plain = pair(small_net())

    class Checkpointed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.model, x, use_reentrant=reentrant)

    assert_same_step(Checkpointed(fused), Checkpointed(plain), image())


def test_checkpointing_with_one_update_of_the_statistics() -> None:
    fused, plain = pair(small_net())
    x = image()
    y = checkpoint(fused, x, use_reentrant=False, context_fn=resops.checkpoint_context_fn)
    expected = plain(x)  # not checkpointed
    assert isinstance(y, Tensor)
    for t in (y, expected):
        t.square().sum().backward()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert_near(a.grad, b.grad)
    assert_same_state(fused, plain)


@pytest.mark.parametrize("frozen", ["statistics", "norms", "first layers"])
def test_freezing(frozen: str) -> None:
    fused, plain = pair(small_net())
    for model in (fused, plain):
        for name, module in model.named_modules():
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if frozen == "statistics" and norm:
                module.eval()
            elif (frozen == "norms" and norm) or (frozen == "first layers" and name in "012"):
                module.requires_grad_(False)
    assert_same_step(fused, plain, image())


def test_tied_weights() -> None:
    first, second = Residual(), Residual()
    second.bn1.weight = first.bn1.weight
    second.conv2.weight = first.conv1.weight
    fused, plain = pair(nn.Sequential(first, second))
    assert_same_step(fused, plain, torch.randn(2, 4, 5, 5, dtype=torch.float64))


def test_averaged_models_and_their_statistics() -> None:
    fused, plain = pair(small_net())
    averages = []
    for model in (fused, plain):
        torch.manual_seed(1)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for _ in range(2):
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.1
            average.update_parameters(model)
        update_bn([image() for _ in range(3)], average)
        averages.append(average)
    assert_same_state(*averages)
    assert_is_fused(averages[0])


def test_forward_hooks_of_blocks() -> None:
    fused, plain = pair(small_net())
    seen: dict[str, list[Tensor]] = {"fused": [], "plain": []}
    for model, name in ((fused, "fused"), (plain, "plain")):
        for layer in (model, model[3], model[5]):
            layer.register_forward_hook(lambda m, args, y, name=name: seen[name].append(y))
        model[3].register_full_backward_hook(lambda m, a, b, name=name: seen[name].append(b[0]))
    assert_same_step(fused, plain, image())
    assert len(seen["fused"]) == 4
    for a, b in zip(*seen.values(), strict=True):
        assert_near(a, b)
    assert_is_fused(fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """The dtypes are those of the plain model, and so is the distance from float64."""
    fused, plain = pair(small_net(), torch.float32)
    x = image(8, torch.float32)
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", dtype):
        y, expected = fused(x), plain(x)
    assert y.dtype == expected.dtype
    # The plain model rounds between the layers, this one less often; twice is rule R's factor.
    assert bool((y - exact).norm() <= 2 * (expected - exact).norm())
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fused.parameters())


def test_grad_scaler() -> None:
    fused, plain = pair(small_net())
    for model in (fused, plain):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(model(image()).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same_state(fused, plain)


# ---- transforms ---------------------------------------------------------------------------------


def test_functional_call_and_func_grad() -> None:
    fused, plain = pair(small_net())
    x = image()
    state = {k: v.detach().clone() for k, v in plain.named_parameters()}

    def loss(model: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(model, parameters, (x,))
        return y.square().sum()

    for model in (fused, plain):
        model.eval()  # torch.func.grad refuses updates of buffers
    grads = [torch.func.grad(lambda p, m=m: loss(m, p))(state) for m in (fused, plain)]
    for name, ours in grads[0].items():
        assert_near(ours, grads[1][name])
    with torch.no_grad():
        changed = {k: v * 1.1 for k, v in state.items()}
        assert_near(loss(fused, changed), loss(plain, changed))
        assert_near(loss(fused, state), loss(plain, state))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile(dynamic: bool | None) -> None:
    """Without graph breaks, in training and evaluation, for batches of any size."""
    torch._dynamo.reset()
    fused, plain = pair(small_net())
    compiled = torch.compile(fused, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for training in (True, False):
        fused.train(training), plain.train(training)
        for samples in (2, 5, 3):
            x = image(samples)
            y, expected = compiled(x), plain(x)
            assert_near(y, expected)
            grads = [
                torch.autograd.grad(t.square().sum(), list(m.parameters()))
                for t, m in ((y, fused), (expected, plain))
            ]
            for a, b in zip(*grads, strict=True):
                assert_near(a, b)
    assert_same_state(fused, plain)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    fused, plain = pair(small_net())
    compiled = torch.compile(fused, fullgraph=True)
    x = image()
    assert_near(compiled(x), plain(x))
    assert_same_state(fused, plain)


# ---- explain and fold ---------------------------------------------------------------------------


def test_explain(native: None) -> None:
    fused, _ = pair(small_net())
    before = copy.deepcopy(fused.state_dict())
    told = resops.explain(fused, image())
    assert [(p.name, p.path) for p in told.paths] == [
        (name, "native") for name in ("1", "3.bn1", "3.bn2", "4.bn", "8")
    ]
    assert "Conv+BN+add+ReLU" in str(told)
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items())
    with resops.backend("reference"):
        assert {p.path for p in resops.explain(fused, image()).paths} == {"reference"}
    fused.eval()
    with torch.no_grad():
        paths = [p.path for p in resops.explain(fused, image()).paths]
    assert paths == ["folded into the convolution"] * 3 + ["native"] * 2


def test_explain_says_why() -> None:
    fused, _ = pair(small_net())
    fused[3].bn1.register_forward_hook(lambda *args: None)
    fused[4].bn.eps = 0.1  # read at every call
    told = {p.name: p for p in resops.explain(fused, image()).paths}
    assert told["3"].path == "original forward" and told["3"].why == "bn1 has hooks"
    assert told["4.bn"].path == "native"
    fused = resops.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    (path,) = resops.explain(fused, torch.randn(2, 3, 6, 8)[..., ::2]).paths
    assert path.why == "the input is not dense and is copied"
    with pytest.raises(ValueError, match=r"call resops\.fuse\(model\) first"):
        resops.explain(small_net())


def test_explain_tells_what_computes_a_convolution_off_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors of another device that hold nothing; the reasons of a GPU by themselves."""
    said = "convolution: training: convolutions and their gradients are meta's"
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    layer = resops.nn.Conv2dNormActivation(3, 8)
    for model in (resops.fuse(plain), layer):
        (path,) = resops.explain(model.to("meta"), torch.empty(2, 3, 8, 8, device="meta")).paths
        assert said in path.why
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    conv = nn.Conv2d(8, 8, 3)
    with FakeTensorMode():
        x = torch.empty(2, 8, 5, 7, device="cuda")
        told = explaining._convolution_path(conv, x, "relu", folded=True)
        assert told.startswith("convolution: cuDNN's convolution with bias and relu; ")
        assert told.endswith("only where the backend 'native' was chosen by name")
        told = explaining._convolution_path(conv, x, "relu", folded=False)
        assert told == "convolution: training: convolutions and their gradients are cuDNN's"


@pytest.mark.parametrize("fuse", [True, False])
def test_fold(fuse: bool) -> None:
    fused, plain = pair(small_net())
    for model in (fused, plain):
        model[3].conv1.weight.requires_grad_(False)
        model.eval()
    source = fused if fuse else plain
    before = copy.deepcopy(source.state_dict())
    folded = resops.fold(source)
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())
    norms = [n for n, m in folded.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms == ["4.bn", "8"]  # no convolution comes before them
    assert all(type(m).__module__.split(".")[0] != "resops" for m in folded.modules())
    assert not folded[3].conv1.weight.requires_grad and folded[3].conv2.weight.requires_grad
    x = image()
    assert_near(folded(x), plain(x))


def test_fold_refuses_training() -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        resops.fold(small_net())
    with pytest.raises(TypeError, match=r"expects an nn\.Module"):
        resops.fold(3)  # type: ignore[type-var]
