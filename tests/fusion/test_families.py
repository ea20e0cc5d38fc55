"""Every family of convolutional networks of torchvision and timm, fused against unfused.

Outputs in evaluation, and gradients in training with every ReLU replaced by SiLU (a whole network
has no tolerance for the step of a ReLU's derivative), in float64; state dicts; and the report, in
which every norm stands exactly once. One member of each family; a few of them in the normal run.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resops
from resops.fusion import layers, measured
from tests.fusion.blocks import filled
from tests.torchvision_ops import timm, torchvision

pytestmark = [pytest.mark.models, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def _small_images_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slower fused on images as small as these is fused all the same."""
    for name in ("DENSE_BLOCK", "DENSE_LAYER"):
        monkeypatch.setattr(measured, name, measured.LeastPixels(0, 0))


# Name, and how many of its norms are fused at least.
QUICK = {
    "torchvision resnet18": 20,
    "torchvision densenet121": 121,
    "torchvision mobilenet_v2": 52,
    "torchvision regnet_y_400mf": 53,
    "timm resnet18": 20,
    "timm resnetv2_50": 49,
    "timm densenet121": 121,
    "timm efficientnet_b0": 49,
}
TORCHVISION = [
    "convnext_tiny",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "vgg11_bn",
    "wide_resnet50_2",
]


def create(name: str) -> Any:
    package, _, model = name.partition(" ")
    if package == "timm":
        return timm().create_model(model, num_classes=10)
    kwargs = {"aux_logits": False} if model in ("googlenet", "inception_v3") else {}
    return getattr(torchvision().models, model)(num_classes=10, **kwargs)


def size_of(model: Any) -> int:
    """A small image that the network still takes.

    Inception's last maps have to have more than one pixel: the statistics of two values, ninety
    times, make rounding errors large.
    """
    if type(model).__name__ == "Inception3":
        return 192
    config = getattr(model, "default_cfg", {})
    if config.get("fixed_input_size"):
        return int(config["input_size"][-1])
    return max(96, int(config.get("min_input_size", (0,))[-1]))


def smooth(model: nn.Module) -> None:
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) in (nn.ReLU, nn.ReLU6):
                setattr(module, name, nn.SiLU())


def relative_error(a: Any, b: Any) -> float:
    pairs = list(zip(a, b, strict=True)) if isinstance(a, list | tuple) else [(a, b)]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def assert_report_is_complete(model: nn.Module) -> int:
    report = resops.fuse_report(model)
    fused = [name for entry in report.fused for name in entry.modules]
    skipped = [name for entry in report.skipped for name in entry.modules]
    norms = [name for name, m in model.named_modules() if layers.is_norm(m)]
    assert sorted(fused + skipped) == sorted(norms)
    assert all(entry.hint for entry in report.skipped)
    return len(fused)


def check(name: str, at_least: int) -> None:
    torch.manual_seed(0)
    model = filled(create(name)).double()
    for dropout in model.modules():
        if "drop" in type(dropout).__name__.lower() and hasattr(dropout, "p"):
            dropout.p = 0.0
    smooth(model)
    plain = copy.deepcopy(model)
    resops.fuse(model)
    assert assert_report_is_complete(model) >= at_least
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)
    size = size_of(model)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    model.eval(), plain.eval()
    with torch.no_grad():
        assert relative_error(model(x), plain(x)) < 1e-10
    grads: list[list[Tensor]] = []
    for network in (model, plain):
        network.train()
        torch.manual_seed(1)
        y = network(x)
        y = y[0] if isinstance(y, list | tuple) else y
        y.square().sum().backward()
        grads.append([p.grad for p in network.parameters() if p.grad is not None])
    scale = max(float(g.abs().max()) for g in grads[1])
    for a, b in zip(*grads, strict=True):
        # A gradient that is mathematically zero (a bias before a norm) is rounding only.
        assert float((a - b).norm()) <= 1e-8 * float(b.norm()) + 1e-10 * scale
    for (key, a), (_, b) in zip(
        model.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", QUICK)
def test_quick(name: str) -> None:
    check(name, QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    check(f"torchvision {name}", 0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every file of timm's models, where those tests are wanted: timm takes seconds to
    import."""
    if "family" in metafunc.fixturenames:
        wanted = "not exhaustive" not in metafunc.config.option.markexpr
        metafunc.parametrize("family", timm().list_modules() if wanted else [])


def smallest_with_norms(family: str) -> str | None:
    """Of the models of a file of timm that have norms which could be fused, the one with the
    fewest parameters; None if there is none."""
    sizes = {}
    for name in timm().list_models(module=family):
        with torch.device("meta"):
            try:
                model = timm().create_model(name)
            except (RuntimeError, NotImplementedError):  # its initialisation needs real data
                continue
        if any(layers.norm_kind(m) is not None for m in model.modules()):
            sizes[name] = sum(p.numel() for p in model.parameters())
    return min(sizes, key=lambda name: sizes[name], default=None)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)  # the largest take minutes, and machines are shared
def test_timm(family: str) -> None:
    """Split it with -k, by names of timm's files: -k "resnet or densenet"."""
    name = smallest_with_norms(family)
    if name is None:
        pytest.skip("no model has a norm that could be fused")
    try:
        check(f"timm {name}", 0)
    finally:
        gc.collect()  # modules and their graphs refer to each other, and hold gigabytes
