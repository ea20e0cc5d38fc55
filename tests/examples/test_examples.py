"""The examples: they learn, what they write resumes exactly, and wrong folders are named."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.torchvision_ops import torchvision

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHORT = ["--steps", "3", "--batch-size", "2", "--crop", "32", "--width", "4"]
SHORT_RESNET = ["--model", "resnet20", "--size", "32", "--batch-size", "4", "--workers", "0"]
SHORT_RESNET += ["--lr", "1"]


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


def same_checkpoints(one: Path, other: Path) -> bool:
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    return a["epoch"] == b["epoch"] and all(
        torch.equal(t, b["model"][key]) for key, t in a["model"].items()
    )


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Noise with bright squares, and where they are."""
    numbers = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(5):
        mask = np.zeros((40, 48), dtype=bool)
        for top, left in numbers.integers(0, 30, (4, 2)):
            mask[top : top + 9, left : left + 9] = True
        grey = (mask * 120 + numbers.integers(0, 80, mask.shape)).astype(np.uint8)
        Image.fromarray(grey).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "masks" / f"{i}.png")
    return tmp_path


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Two classes of images: reddish and bluish ones."""
    numbers = np.random.default_rng(0)
    for part, count in (("train", 9), ("val", 3)):
        for channel, name in ((0, "red"), (2, "blue")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = numbers.integers(0, 120, (36, 40, 3))
                pixels[..., channel] += 130
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def test_segmentation(
    squares: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three epochs at once, and one and then two: the same weights, bit by bit."""
    main = example("segment_unet", monkeypatch).main
    arguments = ["--data", str(squares), *SHORT, "--epochs", "3", "--dropout", "0.1"]
    whole, parts = squares / "whole.pt", squares / "parts.pt"
    best = main([*arguments, "--checkpoint", str(whole)])
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 3 and losses[2] < losses[0]
    monkeypatch.setattr(example("training", monkeypatch).EarlyStopping, "stops", True)
    main([*arguments, "--checkpoint", str(parts)])
    assert torch.load(parts, weights_only=True)["epoch"] == 0
    monkeypatch.undo()
    main = example("segment_unet", monkeypatch).main
    assert main([*arguments, "--checkpoint", str(parts), "--resume"]) == best
    assert same_checkpoints(whole, parts)


@pytest.mark.models
def test_classification(
    colours: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every augmentation and regulariser at once; a resumed run is the same, bit by bit."""
    torchvision()
    main = example("train_resnet", monkeypatch).main
    mixing = ["--mixup", "0.2", "--cutmix", "1.0", "--rand-augment", "9", "--dropout", "0.1"]
    arguments = [str(colours), *SHORT_RESNET, *mixing, "--epochs", "2", "--warmup", "1"]
    whole, parts = colours / "whole.pt", colours / "parts.pt"
    main([*arguments, "--checkpoint", str(whole)])
    assert "epoch 1: loss" in capsys.readouterr().out
    monkeypatch.setattr(example("training", monkeypatch).EarlyStopping, "stops", True)
    main([*arguments, "--checkpoint", str(parts)])
    monkeypatch.undo()
    main = example("train_resnet", monkeypatch).main
    main([*arguments, "--checkpoint", str(parts), "--resume"])
    assert same_checkpoints(whole, parts)


def test_early_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = example("training", monkeypatch).EarlyStopping(2)
    improved = [stopping.improved(metric) for metric in (0.5, 0.6, 0.6, 0.1)]
    assert improved == [True, True, False, False] and stopping.stops
    again = example("training", monkeypatch).EarlyStopping(2)
    again.load_state_dict(stopping.state_dict())
    assert again.stops and again.best == 0.6
    never = example("training", monkeypatch).EarlyStopping(0)
    assert not [never.improved(0.0) for _ in range(9)][-1] and not never.stops


def test_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    training = example("training", monkeypatch)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    rates = []
    for epoch in range(5):
        training.set_learning_rate(optimizer, epoch, 5, 0.8, warmup=1)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.4, 0.8, 0.8 * (2 + 2**0.5) / 4, 0.4, 0.8 * (2 - 2**0.5) / 4])


def test_what_decays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    decays, others = example("training", monkeypatch).weight_decay_groups(model, 0.1)
    assert decays["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert [len(group["params"]) for group in (decays, others)] == [1, 3]


def test_wrong_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="has 0 images with masks"):
        example("segment_unet", monkeypatch).main(["--data", str(tmp_path)])
    torchvision()
    with pytest.raises(SystemExit, match="has to have the folders train/ and val/"):
        example("train_resnet", monkeypatch).main([str(tmp_path)])
    with pytest.raises(SystemExit, match="there is no checkpoint"):
        example("training", monkeypatch).load(tmp_path / "x.pt", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("name", ["segment_unet", "train_resnet"])
def test_two_processes(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """torchrun: both processes train, one of them prints and writes, and they resume."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "tests.examples.with_torchvision", str(EXAMPLES / f"{name}.py")]
    if name == "segment_unet":
        command += ["--data", str(request.getfixturevalue("squares")), *SHORT]
    else:
        command += [str(request.getfixturevalue("colours")), *SHORT_RESNET]
    command += ["--sync-bn", "--checkpoint", str(tmp_path / "two.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(EXAMPLES)
    for more in (["--epochs", "1"], ["--epochs", "2", "--resume"]):
        done = subprocess.run(
            [*command, *more],
            cwd=EXAMPLES.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("loss") == 1, done.stdout
