"""Does a network learn the same with resops' kernels as with plain PyTorch?

    python -m bench.learning --data FOLDER --network resnet20,unet

FOLDER has .npz files: one with ``train_images`` (K, H, W, 3), ``train_labels``, ``test_images``
and ``test_labels`` for the classifiers, such as a part of CIFAR-10, and one with ``images`` and
``membrane`` for ``unet`` (bench/membranes.py). Without a folder the classifiers take
scikit-learn's digits, and the U-Net drawn tissue.

For every seed the same network is trained twice from the same weights on the same batches in the
same order, once with the backend ``native`` and once with ``reference``, PyTorch's own ops.
Rounding differs, and training amplifies it, so two honest runs of one seed drift apart until they
are like runs of different seeds. So the measure is how far seeds lie apart:

1. the loss of each of the first ``EARLY`` steps agrees within ``EARLY_TOLERANCE`` of its value,
   before the drift, which grows ten- to thirtyfold a step (measured: at most 6e-5 in the second
   step, 2e-3 in the third): a wrong output, gradient or update shows here;
2. the means over the seeds of the last epoch's training loss, of the final test loss and of the
   final metric are no further apart than the seeds of one backend: the larger of the two backends'
   distances from least to greatest, and at least ``LEAST_SPREAD``. Two groups of three from one
   normal distribution fail that in 5 % of the cases, and a difference of four standard deviations
   is seen in 94 %, if the runs of a seed have nothing in common;
3. all have learnt: the metric exceeds that of a network that has not (the commonest class; every
   pixel a membrane) by ``LEARNT``.

Results are written after every epoch, so that an interrupted comparison leaves what it had.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

import resops
from bench import digits, environment, membranes, report, table
from bench.images import NoImages
from bench.membranes import Membranes
from bench.session import Progress
from bench.timing import threads
from bench.training import BORDER, Classification, Curve, Schedule, train
from resops.models import create_model

BACKENDS = ("reference", "native")
EARLY = 2
EARLY_TOLERANCE = 3e-4
LEAST_SPREAD = 0.01
LEARNT = 0.1
LAST = ("training", "loss", "metric")

Curves = dict[str, list[Curve]]  # backend to its runs


class Recipe(NamedTuple):
    """How a network is trained, and with how many of the images."""

    schedule: Schedule
    images: int = 0  # 0 for all
    arguments: Mapping[str, Any] = {}


NETWORKS = {
    "resnet20": Recipe(Schedule(5, 32, 0.1, 1), 640),
    "plain20": Recipe(Schedule(5, 32, 0.1, 1), 640),
    "unet": Recipe(Schedule(1, 4, 0.2, 0.1, 0.0), arguments={"widths": (16, 32, 64, 128)}),
    # Half the batch, for as many steps with half the time: these are the slow ones.
    "densenet_bc_40": Recipe(Schedule(4, 16, 0.05, 1), 640),
    "preact_resnet110": Recipe(Schedule(5, 16, 0.05, 1), 640),
}


def load_images(folder: Path, count: int = 0) -> Classification:
    """The labelled colour images of a folder, each channel with mean 0 and standard deviation 1.

    Args:
        count: of the first images for training, and at most as many for the test; 0 for all.

    Raises:
        NoImages: there is no .npz file with such arrays.
    """
    names = ("train_images", "train_labels", "test_images", "test_labels")
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            if set(names) <= set(arrays.files):
                images, labels, test_images, test_labels = (
                    torch.from_numpy(arrays[name][: count or None]) for name in names
                )
                break
    else:
        raise NoImages(f"{folder} has no .npz file with the arrays {', '.join(names)}.")
    std, mean = torch.std_mean(images.float(), (0, 1, 2))
    x, test_x = (
        ((pixels.float() - mean) / std).permute(0, 3, 1, 2) for pixels in (images, test_images)
    )
    return Classification(x, labels.long(), test_x, test_labels.long(), flip=True, border=BORDER)


def task_for(network: str, folder: Path | None, count: int = 0) -> Classification | Membranes:
    """What a network is trained for; ``count`` is of :func:`load_images`.

    Raises:
        NoImages: the folder has no data for it.
    """
    if network == "unet":
        return membranes.draw() if folder is None else membranes.load(folder)
    return digits.task() if folder is None else load_images(folder, count)


def unlearnt(task: Classification | Membranes) -> float:
    """The metric of an answer that is always the same."""
    if isinstance(task, Membranes):
        return task.part(test=True)[1].mean().item()
    return task.test_labels.bincount().max().item() / len(task.test_labels)


def compare(
    network: str,
    task: Classification | Membranes,
    schedule: Schedule,
    seeds: int = 3,
    after_epoch: Callable[[str, int, Curve], None] = lambda backend, seed, curve: None,
    **arguments: Any,
) -> Curves:
    """Every seed with both backends, from the same weights.

    Args:
        after_epoch: called with the backend, the seed and the run so far.
        arguments: of the network.
    """
    if isinstance(task, Membranes):
        arguments = {"num_classes": 1, "in_chans": 1, **arguments}
    else:
        arguments = {"in_chans": task.images.size(1), **arguments}
    curves: Curves = {backend: [] for backend in BACKENDS}
    for seed in range(seeds):
        for backend in BACKENDS:
            torch.manual_seed(seed)
            model = create_model(network, **arguments)
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            with resops.backend(backend):
                curve = train(model, task, schedule, seed, partial(after_epoch, backend, seed))
            curves[backend].append(curve)
    return curves


def agreement(curves: Curves, unlearnt: float) -> dict[str, tuple[float, float]]:
    """The criteria above: name to (found, allowed); all hold where found <= allowed."""
    reference, native = (curves[backend] for backend in BACKENDS)
    early = max(
        abs(b - a) / abs(a)
        for one, two in zip(reference, native, strict=True)
        for a, b in zip(one.steps[:EARLY], two.steps[:EARLY], strict=True)
    )
    found = {"loss of the first steps": (early, EARLY_TOLERANCE)}
    names = ("training loss", "test loss", "test metric")
    for name, key in zip(names, LAST, strict=True):
        theirs, ours = ([getattr(curve, key)[-1] for curve in runs] for runs in (reference, native))
        spread = max(max(theirs) - min(theirs), max(ours) - min(ours), LEAST_SPREAD)
        found[name] = (abs(fmean(ours) - fmean(theirs)), spread)
    worst = min(curve.metric[-1] for curve in (*reference, *native))
    found["metric that is missing to have learnt"] = (unlearnt + LEARNT - worst, 0.0)
    return found


def run(
    network: str,
    task: Classification | Membranes,
    schedule: Schedule,
    seeds: int,
    results: report.Report,
    progress: Progress,
    **arguments: Any,
) -> bool:
    """Compare one network and record every epoch, the outcome and the checks; True if all hold."""
    facts: report.Row = {"suite": "learning", "case": network, "name": task.metric}

    def after_epoch(backend: str, seed: int, curve: Curve) -> None:
        last = {key: round(getattr(curve, key)[-1], 5) for key in LAST}
        epoch = len(curve.loss)
        progress.start(f"{network}, seed {seed}, {backend}, epoch {epoch}: {last}")
        row = {"metric": "epoch", "backend": backend, "seed": seed, "epoch": epoch, **last}
        results.add({**facts, **row})
        progress.done()

    curves = compare(network, task, schedule, seeds, after_epoch, **arguments)
    outcome = {
        backend: {
            "first_steps": [c.steps[:5] for c in runs],
            **{key: [round(getattr(c, key)[-1], 5) for c in runs] for key in LAST},
        }
        for backend, runs in curves.items()
    }
    found = agreement(curves, unlearnt(task))
    passed = {name: value <= allowed for name, (value, allowed) in found.items()}
    agrees = all(passed.values())
    row = {"metric": "curves", **schedule._asdict(), "steps": task.steps(schedule.batch)}
    results.add({**facts, **row, "providers": outcome, "agrees": agrees})
    for name, (value, allowed) in found.items():
        check: report.Row = {"suite": "check", "group": f"{network} learns", "metric": "error"}
        check.update(case=f"{network}: {name}", passed=passed[name])
        if allowed:
            check["share"] = value / allowed
        results.add({**check, "detail": f"found {value:.3g}, allowed {allowed:.3g}"})
    return agrees


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, help="folder with .npz files")
    parser.add_argument(
        "--network", default=",".join(NETWORKS), help="comma-separated; default: %(default)s"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="default: by network")
    parser.add_argument("--images", type=int, help="for training, 0 for all; default: by network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=environment.ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    options.network = tuple(options.network.split(","))
    if unknown := set(options.network) - set(NETWORKS):
        parser.error(f"--network takes {', '.join(NETWORKS)}, but got {', '.join(sorted(unknown))}")
    for name in ("seeds", "epochs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, but got {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print a table and write JSON; the exit status: 0, or 1 where the two differ."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    environment.restart_with_allocator_settings(list(arguments), "bench.learning")
    todo = []
    for network in options.network:
        recipe = NETWORKS[network]
        schedule = recipe.schedule._replace(epochs=options.epochs or recipe.schedule.epochs)
        count = recipe.images if options.images is None else options.images
        try:
            todo.append((network, task_for(network, options.data, count), schedule))
        except (NoImages, ImportError) as error:
            print(error)
            return 1
    facts = environment.provenance(torch.device("cpu"))
    path = report.results_path(
        options.output, facts["date"], environment.slug(torch.device("cpu")), "learning"
    )
    notes = {k: v if isinstance(v, int | None) else str(v) for k, v in vars(options).items()}
    results = report.Report(path, "learning", facts, notes)
    progress = Progress(sum(2 * options.seeds * schedule.epochs for _, _, schedule in todo))
    passed = True
    with threads(options.threads):
        for network, task, schedule in todo:
            arguments_of = NETWORKS[network].arguments
            passed &= run(network, task, schedule, options.seeds, results, progress, **arguments_of)
    results.finish()
    progress.close()
    print(f"\n{table.render(results.as_dict())}\n\nResults: {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
