"""Training on scikit-learn's digits: does a network learn the same with resops as with torch.nn?

A small ResNet of the CIFAR form (He et al., arXiv:1512.03385, section 4.2: 3x3 stem, three stages
of 16, 32 and 64 channels) is built twice, of stock torch.nn modules and of resops layers. For every
seed both start from the same weights (the ``state_dict`` of one is loaded into the other with
``strict=True``) and see the same batches in the same order; the images are the 1797 bundled 8x8
digits, a quarter of them held back as the test set.

Rounding differs, and training amplifies it, so the two runs of one seed drift apart as two runs of
eager PyTorch do when only the order of a sum differs. That drift was measured between channels-last
and contiguous eager, and the limits are set by it. What has to agree:

1. the loss of each of the first ``EARLY`` steps, within 1e-3 of its value (measured: 7e-5): a wrong
   gradient, update or running statistic shows here;
2. the training loss of every epoch, averaged over the seeds, within 5 % + 0.01 (measured: 0.002);
3. the final test loss, averaged over the seeds, within 0.02 (measured: 0.001);
4. the final test accuracy, averaged over the seeds, within one percentage point (measured: 0.4;
   two standard errors of a binomial count of 3 x 449 images at 98.5 % are 0.7 points);
5. and both networks must have learnt: accuracy of 95 % or more, or the comparison says nothing.

It runs on one thread: the layers are so small that more are slower, for both.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.session import EAGER, RESOPS, Session, channels_last
from bench.timing import threads
from bench.training import Classification, Curve, Schedule, train
from resops.nn import BatchNormAct2d

WIDTHS = (16, 32, 64)
EARLY = 8
EARLY_TOLERANCE = 1e-3
TRAINING_TOLERANCE = (0.05, 0.01)  # relative, absolute
LOSS_TOLERANCE = 0.02
ACCURACY_TOLERANCE = 0.01
LEARNT = 0.95
BATCH, PEAK_RATE, WARM_UP_EPOCHS = 64, 0.05, 2


class StockBlock(nn.Module):
    """The basic block of stock modules."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + identity, inplace=True)


class ResopsBlock(nn.Module):
    """The same block of resops layers: no addition and no ReLU of its own."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = BatchNormAct2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = BatchNormAct2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, BatchNormAct2d(channels, apply_act=False))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), identity)


class DigitsResNet(nn.Module):
    """A CIFAR-form ResNet with one block per stage, for images of shape (N, 1, 8, 8)."""

    def __init__(self, provider: str) -> None:
        super().__init__()
        block: Callable[..., nn.Module] = StockBlock if provider == EAGER else ResopsBlock
        self.conv1 = nn.Conv2d(1, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0]) if provider == EAGER else BatchNormAct2d(WIDTHS[0])
        self.act = nn.ReLU(inplace=True) if provider == EAGER else nn.Identity()
        before = (WIDTHS[0], *WIDTHS)
        self.blocks = nn.Sequential(
            *(block(before[i], width, 1 if i == 0 else 2) for i, width in enumerate(WIDTHS))
        )
        self.fc = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def task(device: torch.device | None = None) -> Classification:
    """The digits, pixels 0 to 1; every fourth is held back."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1).to(device)
    labels = torch.from_numpy(bunch.target).long().to(device)
    test = torch.arange(len(labels), device=device) % 4 == 3
    return Classification(images[~test], labels[~test], images[test], labels[test])


def agreement(eager: list[Curve], ours: list[Curve]) -> dict[str, tuple[float, float]]:
    """The criteria above: name to (found, allowed); all hold where found <= allowed."""
    early = max(
        abs(b - a) / abs(a)
        for one, two in zip(eager, ours, strict=True)
        for a, b in zip(one.steps[:EARLY], two.steps[:EARLY], strict=True)
    )
    relative, absolute = TRAINING_TOLERANCE
    epochs = [
        (abs(fmean(mine) - fmean(theirs)), relative * fmean(theirs) + absolute)
        for theirs, mine in zip(
            zip(*(curve.training for curve in eager), strict=True),
            zip(*(curve.training for curve in ours), strict=True),
            strict=True,
        )
    ]
    losses, accuracies = (
        [fmean(getattr(curve, key)[-1] for curve in curves) for curves in (eager, ours)]
        for key in ("loss", "metric")
    )
    return {
        "loss of the first steps": (early, EARLY_TOLERANCE),
        "training loss, worst epoch": max(epochs, key=lambda pair: pair[0] / pair[1]),
        "test loss": (abs(losses[1] - losses[0]), LOSS_TOLERANCE),
        "test accuracy": (abs(accuracies[1] - accuracies[0]), ACCURACY_TOLERANCE),
        "test error, both have learnt": (1 - min(accuracies), 1 - LEARNT),
    }


def run(session: Session, epochs: int = 8, seeds: int = 3) -> None:
    """Train every seed with both, one step of the progress bar each; check; record the curves."""
    data = task(session.device)
    schedule = Schedule(epochs, BATCH, PEAK_RATE, WARM_UP_EPOCHS)
    curves: dict[str, list[Curve]] = {EAGER: [], RESOPS: []}
    for seed in range(seeds):
        with session.step(f"training on digits, seed {seed}") as in_time:
            if not in_time:
                continue
            torch.manual_seed(seed)
            models = {provider: DigitsResNet(provider) for provider in curves}
            models[RESOPS].load_state_dict(models[EAGER].state_dict(), strict=True)
            for provider, model in models.items():
                channels_last(model, session.device)
                with threads(1):
                    curves[provider].append(train(model, data, schedule, seed))
    if not curves[EAGER]:
        return
    for name, (found, allowed) in agreement(curves[EAGER], curves[RESOPS]).items():
        detail = f"found {found:.3g}, allowed {allowed:.3g}"
        session.check(f"digits: {name}", found <= allowed, found / allowed, detail, "digits")
    row: dict[str, Any] = {"suite": "digits", "case": "digits", "metric": "curves"}
    row["curves"] = {
        provider: {
            name: [[round(v, 5) for v in getattr(curve, key)] for curve in runs]
            for name, key in (("training", "training"), ("loss", "loss"), ("accuracy", "metric"))
        }
        for provider, runs in curves.items()
    }
    session.report.add(row)
