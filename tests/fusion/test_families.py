"""Every family of convolutional networks of torchvision and timm, fused against unfused.

Outputs in evaluation, and gradients in training with every ReLU replaced by SiLU (a whole network
has no tolerance for the step of a ReLU's derivative), in float64; state dicts; and the report, in
which every norm stands exactly once. One member of each family; a few of them in the normal run.
"""

from __future__ import annotations

import copy
import gc
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resops
from resops.fusion import layers
from tests.fusion.blocks import filled
from tests.torchvision_ops import timm, torchvision

pytestmark = [pytest.mark.models, pytest.mark.usefixtures("one_thread")]

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
    return int(config["input_size"][-1]) if config.get("fixed_input_size") else 96


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


def families() -> list[str]:
    """The smallest network of every family of timm that has batch norms or group norms."""
    found = []
    for module in timm().list_modules():
        names = timm().list_models(module=module, pretrained=False)
        if not names:
            continue
        sizes = {}
        for name in names[:6]:
            with torch.device("meta"):
                try:
                    model = timm().create_model(name)
                except (RuntimeError, NotImplementedError):  # its initialisation needs real data
                    continue
            norms = [m for m in model.modules() if layers.norm_kind(m) is not None]
            if norms:
                sizes[name] = sum(p.numel() for p in model.parameters())
        if sizes:
            found.append(min(sizes, key=lambda n: sizes[n]))
    return found


@pytest.mark.exhaustive
@pytest.mark.timeout(4 * 3600)
def test_timm() -> None:
    """All families, one after the other; what is wrong is told at the end (with -s, at once)."""
    wrong = []
    names = families()
    assert len(names) > 30
    for name in names:
        begin = time.monotonic()
        try:
            check(f"timm {name}", 0)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__} {str(error)[:300]}")
        result = wrong[-1] if wrong and wrong[-1].startswith(f"{name}:") else name
        print(f"{time.monotonic() - begin:6.1f} s  {result}", flush=True)
        gc.collect()  # modules and their graphs refer to each other, and hold gigabytes
    assert not wrong, "\n".join(wrong)
