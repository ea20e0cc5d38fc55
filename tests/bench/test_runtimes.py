"""Inference beside other runtimes: one that is missing is named, and wrong outputs are an error."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import resops
from bench.models import runtimes
from bench.models.stock_unet import StockUNet

pytestmark = pytest.mark.usefixtures("native", "one_thread")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str) -> dict[str, nn.Module]:
        conv = nn.Conv2d(3, 4, 1)
        return {"eager": conv, "resops": conv}

    monkeypatch.setattr(runtimes, "create", create)
    monkeypatch.setattr(runtimes, "SIZE", {"tiny": 4})
    providers = {k: runtimes.PROVIDERS[k] for k in ("eager", "onnxruntime", "openvino")}
    monkeypatch.setattr(runtimes, "PROVIDERS", providers)


def test_missing_packages_are_named(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    row = runtimes.measure("tiny", 1, 0.0)
    assert row["over resops, the best rival"] is None
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"{name} is left out: {name} is not installed: pip install {name}"
        for name in ("onnxruntime", "openvino")
    ]


def test_a_wrong_provider_is_an_error(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, images: torch.Tensor, threads: int) -> runtimes.Call:
        return lambda: 1.01 * model(images)

    monkeypatch.setattr(runtimes, "PROVIDERS", {"wrong": wrong})
    with pytest.raises(AssertionError, match="outputs are wrong"):
        runtimes.measure("tiny", 1, 0.0)


def test_the_stock_unet_has_our_state() -> None:
    with torch.device("meta"):
        state = StockUNet().state_dict()
        ours = resops.models.create_model("unet").state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in ours.items()}
