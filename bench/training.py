"""One training loop for every comparison of how networks learn, and what it trains them for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
BORDER = 4  # pixels by which an image is moved at most (He et al., arXiv:1512.03385, section 4.2)


class Schedule(NamedTuple):
    """SGD with momentum 0.9; the rate rises linearly and then goes down to 0 as a cosine.

    (Adam would blow up differences of rounding: it moves a weight with a small gradient as far as
    any other.)
    """

    epochs: int
    batch: int
    peak_rate: float
    warm_up_epochs: float
    weight_decay: float = 1e-4

    def rate(self, step: int, per_epoch: int) -> float:
        """The share of the peak rate."""
        decay = 0.5 * (1 + math.cos(math.pi * step / (self.epochs * per_epoch)))
        return min(1.0, (step + 1) / max(self.warm_up_epochs * per_epoch, 1)) * decay


@dataclass
class Curve:
    """One run: the loss of every step; training loss, test loss and test metric of every epoch."""

    steps: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    metric: list[float] = field(default_factory=list)


class Task(Protocol):
    """Data, a loss and a metric."""

    metric: str  # its name; the higher, the better

    def steps(self, batch: int) -> int:
        """In an epoch."""

    def epoch(self, batch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Batches of training data."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """A number."""

    def test(self, model: nn.Module) -> tuple[float, float]:
        """Loss and metric of the data held back."""


@dataclass(frozen=True)
class Classification:
    """Images (K, C, H, W) and labels (K,), for training and for the test.

    Attributes:
        flip: turn half of the training images over, left to right.
        border: move them by so many pixels at most, with zeros coming in.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    flip: bool = False
    border: int = 0
    metric = "accuracy"

    def steps(self, batch: int) -> int:
        """Whole batches only."""
        return len(self.labels) // batch

    def epoch(self, batch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Every image at most once, in random order."""
        order = torch.randperm(len(self.labels), generator=generator)
        order = order[: self.steps(batch) * batch].to(self.images.device)
        for chosen in order.split(batch):
            x = self._augmented(self.images[chosen], generator)
            yield x.contiguous(memory_format=torch.channels_last), self.labels[chosen]

    def _augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.flip:
            over = torch.rand(len(x), generator=generator).to(x.device) < 0.5
            x = torch.where(over.view(-1, 1, 1, 1), x.flip(3), x)
        if self.border:
            H, W = x.shape[2:]
            places = torch.randint(2 * self.border + 1, (len(x), 2), generator=generator).tolist()
            wide = F.pad(x, [self.border] * 4)
            crops = zip(wide, places, strict=True)
            x = torch.stack([image[:, i : i + H, j : j + W] for image, (i, j) in crops])
        return x

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(output, target)

    def test(self, model: nn.Module) -> tuple[float, float]:
        """Loss and the share of right answers."""
        batches = zip(self.test_images.split(500), self.test_labels.split(500), strict=True)
        losses, right = 0.0, 0
        for images, labels in batches:
            logits = model(images.contiguous(memory_format=torch.channels_last))
            losses += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
        return losses / len(self.test_labels), right / len(self.test_labels)


def train(
    model: nn.Module,
    task: Task,
    schedule: Schedule,
    seed: int,
    after_epoch: Callable[[Curve], None] = lambda curve: None,
) -> Curve:
    """Train from the model's weights; ``seed`` is of the order and augmentation of the data."""
    curve, generator = Curve(), torch.Generator().manual_seed(seed)
    per_epoch = task.steps(schedule.batch)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=schedule.peak_rate,
        momentum=0.9,
        weight_decay=schedule.weight_decay,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule.rate(step, per_epoch)
    )
    for _ in range(schedule.epochs):
        model.train()
        for x, target in task.epoch(schedule.batch, generator):
            optimizer.zero_grad(set_to_none=True)
            loss = task.loss(model(x), target)
            loss.backward()
            optimizer.step()
            rates.step()
            curve.steps.append(loss.item())
        curve.training.append(fmean(curve.steps[-per_epoch:]))
        model.eval()
        with torch.inference_mode():
            test_loss, metric = task.test(model)
        curve.loss.append(test_loss)
        curve.metric.append(metric)
        after_epoch(curve)
    return curve
