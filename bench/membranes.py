"""Segmenting membranes: does a U-Net learn the same with resops' kernels as with plain PyTorch?

    python -m bench.membranes --data FOLDER

FOLDER has one .npz file or several, each with arrays ``images`` and ``membrane`` of (K, H, W): grey
values, and what is not 0 where there is a membrane (for instance the sections of the ISBI 2012
challenge, of which the U-Net's paper reports). Without a folder the images are drawn: bright cells
with dark membranes, and noise.

For every seed the same network (``resops.models.unet``, narrow) is trained twice from the same
weights on the same crops in the same order, once with the backend ``native`` and once with
``reference``, which is PyTorch's own ops. A fifth of the images is held back, and the metric is the
intersection over union of the membrane there. Rounding differs, and training amplifies it, so two
honest runs of one seed drift apart; how far runs of different seeds lie apart is the measure:

1. the loss of each of the first ``EARLY`` steps agrees within 1e-3 of its value, before the drift;
2. the mean over the seeds of the loss of the last quarter, and of the final IoU, differ by no more
   than the spread of the reference over its seeds (and by 0.01 if that is less);
3. both have learnt: the IoU exceeds that of calling every pixel a membrane by ``LEARNT``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from bench import environment, report
from bench.session import Progress
from resops.models import create_model

BACKENDS = ("reference", "native")
WIDTHS = (16, 32, 64, 128)
EARLY = 5
EARLY_TOLERANCE = 1e-3
LEAST_SPREAD = 0.01
LEARNT = 0.2
PEAK_RATE = 0.2


class NoData(RuntimeError):
    """The folder has no images; the message is for the user."""


@dataclass
class Curve:
    """One run: the loss of every step, and the IoU on the images held back after the last."""

    losses: list[float] = field(default_factory=list)
    iou: float = 0.0

    @property
    def last_losses(self) -> float:
        return fmean(self.losses[-max(len(self.losses) // 4, 1) :])


@dataclass(frozen=True)
class Images:
    """Grey images of mean 0 and standard deviation 1, and 1 where there is a membrane.

    Both are (K, 1, H, W). Every fifth image is held back for the test.
    """

    images: Tensor
    membrane: Tensor

    def part(self, test: bool) -> tuple[Tensor, Tensor]:
        chosen = (torch.arange(len(self.images)) % 5 == 4) == test
        return self.images[chosen], self.membrane[chosen]


def load(folder: Path) -> Images:
    """The images of a folder.

    Raises:
        NoData: there is no .npz file with ``images`` and ``membrane`` of one size.
    """
    parts: list[tuple[Any, Any]] = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            if {"images", "membrane"} <= set(arrays.files):
                parts.append((arrays["images"], arrays["membrane"]))
    if not parts:
        raise NoData(f"{folder} has no .npz file with the arrays `images` and `membrane`.")
    if any(a.ndim != 3 or a.shape != b.shape for a, b in parts):
        raise NoData("`images` and `membrane` have to be of one size, (K, H, W).")
    images, membrane = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts))  # noqa: B905
    images = images.float()
    images = (images - images.mean()) / images.std()
    return Images(images.unsqueeze(1), (membrane != 0).float().unsqueeze(1))


def draw(count: int = 15, size: int = 96, seed: int = 0) -> Images:
    """Drawn tissue: cells are the regions nearest to random points, membranes lie between them."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(size, dtype=torch.float32)
    pixels = torch.cartesian_prod(axis, axis)
    images, membranes = [], []
    for _ in range(count):
        points = torch.rand(max(size * size // 150, 4), 2, generator=generator) * size
        distances, nearest = torch.cdist(pixels, points).topk(2, largest=False)
        membrane = (distances[:, 1] - distances[:, 0] < 2).float()
        brightness = torch.rand(len(points), generator=generator)[nearest[:, 0]]
        grey = (0.5 + brightness) * (1 - membrane)
        images.append((grey + 0.4 * torch.randn(size * size, generator=generator)).view(size, size))
        membranes.append(membrane.view(size, size))
    stack = torch.stack(images).unsqueeze(1)
    return Images((stack - stack.mean()) / stack.std(), torch.stack(membranes).unsqueeze(1))


def crops(
    data: tuple[Tensor, Tensor], steps: int, batch: int, size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random crops, some of them turned over."""
    images, membrane = data
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    for _ in range(steps):
        pairs = []
        for _ in range(batch):
            number = draw(len(images))
            top, left = (draw(max(extent - size, 0) + 1) for extent in images.shape[2:])
            place = slice(None), slice(top, top + size), slice(left, left + size)
            pair = torch.stack((images[number][place], membrane[number][place]))
            pairs.append(pair.flip([dim for dim in (2, 3) if draw(2)]))
        x, target = torch.stack(pairs, 1)
        yield x.contiguous(memory_format=torch.channels_last), target


def intersection_over_union(predicted: Tensor, target: Tensor) -> float:
    """Of two masks of any one size; 1 where both are empty."""
    union = (predicted | target).sum().item()
    return (predicted & target).sum().item() / union if union else 1.0


def train(model: nn.Module, data: Images, steps: int, batch: int, size: int, seed: int) -> Curve:
    """SGD with momentum 0.9 on the cross entropy of membrane against the rest; the rate rises for a
    tenth of the steps and then goes down to 0. (Adam would blow up differences of rounding: it
    moves a weight with a small gradient as far as any other.)"""
    curve = Curve()
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_RATE, momentum=0.9)

    def rate(step: int) -> float:
        return min(1.0, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for x, target in crops(data.part(test=False), steps, batch, size, seed):
        loss = F.binary_cross_entropy_with_logits(model(x), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.losses.append(loss.item())
    model.eval()
    images, membrane = data.part(test=True)
    with torch.inference_mode():
        predicted = torch.cat([model(image) > 0 for image in images.split(1)])
    curve.iou = intersection_over_union(predicted, membrane > 0)
    return curve


def compare(
    data: Images,
    seeds: int = 3,
    steps: int = 200,
    batch: int = 4,
    size: int = 128,
    widths: Sequence[int] = WIDTHS,
    progress: Progress | None = None,
) -> dict[str, list[Curve]]:
    """Every seed with both backends, from the same weights."""
    curves: dict[str, list[Curve]] = {backend: [] for backend in BACKENDS}
    for seed in range(seeds):
        for backend in BACKENDS:
            if progress is not None:
                progress.start(f"seed {seed}, {backend}")
            torch.manual_seed(seed)
            model = create_model("unet", num_classes=1, in_chans=1, widths=widths)
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            with resops.backend(backend):
                curves[backend].append(train(model, data, steps, batch, size, seed))
            if progress is not None:
                progress.done()
    return curves


def agreement(curves: dict[str, list[Curve]], data: Images) -> dict[str, tuple[float, float]]:
    """The criteria above: name to (found, allowed); all hold where found <= allowed."""
    reference, native = (curves[backend] for backend in BACKENDS)
    early = max(
        abs(b - a) / abs(a)
        for one, two in zip(reference, native, strict=True)
        for a, b in zip(one.losses[:EARLY], two.losses[:EARLY], strict=True)
    )
    found = {"loss of the first steps": (early, EARLY_TOLERANCE)}
    for name, key in (("loss of the last quarter", "last_losses"), ("IoU", "iou")):
        theirs, ours = ([getattr(c, key) for c in runs] for runs in (reference, native))
        spread = max(max(theirs) - min(theirs), LEAST_SPREAD)
        found[name] = (abs(fmean(ours) - fmean(theirs)), spread)
    everywhere = data.part(test=True)[1].mean().item()
    worst = min(curve.iou for curve in (*reference, *native))
    found["IoU that is missing to have learnt"] = (everywhere + LEARNT - worst, 0.0)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print a table and write JSON; the exit status: 0, or 1 where the two differ."""
    parser = argparse.ArgumentParser(prog="python -m bench.membranes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, help="folder with .npz files; default: drawn images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of training, for each run")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=128, help="of the crops")
    parser.add_argument("--output", type=Path, default=environment.ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    try:
        data = draw(size=max(options.size, 96)) if options.data is None else load(options.data)
    except NoData as error:
        print(error)
        return 1
    facts = environment.provenance(torch.device("cpu"))
    path = report.results_path(
        options.output, facts["date"], environment.slug(torch.device("cpu")), "membranes"
    )
    settings = {k: v for k, v in vars(options).items() if isinstance(v, int)}
    settings["drawn"] = options.data is None
    results = report.Report(path, "membranes", facts, settings)
    progress = Progress(options.seeds * len(BACKENDS))
    curves = compare(
        data, options.seeds, options.steps, options.batch, options.size, progress=progress
    )
    progress.close()
    passed = True
    for backend, runs in curves.items():
        losses = [[round(loss, 5) for loss in curve.losses] for curve in runs]
        row: report.Row = {"suite": "membranes", "case": backend, "metric": "curves"}
        results.add({**row, "losses": losses, "iou": [round(curve.iou, 5) for curve in runs]})
        ious = " ".join(f"{curve.iou:.4f}" for curve in runs)
        print(f"{backend:<10} IoU {ious}   last losses {fmean(c.last_losses for c in runs):.4f}")
    for name, (found, allowed) in agreement(curves, data).items():
        passed &= found <= allowed
        verdict = "agrees" if found <= allowed else "DIFFERS"
        print(f"{verdict:<8} {name}: found {found:.3g}, allowed {allowed:.3g}")
        row = {"suite": "check", "group": "membranes", "case": name, "metric": "error"}
        results.add({**row, "passed": found <= allowed, "detail": f"{found:.3g} <= {allowed:.3g}"})
    results.finish()
    print(f"Results: {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
