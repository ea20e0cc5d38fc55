"""The jobs of ``python -m bench``: which parts run, in which order, for how long."""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import resops
from bench import digits, environment, figure, images, report, table
from bench.models import compare, resnet
from bench.models.stock_resnet import CONFIGURATIONS
from bench.ops import batch_norm, residual_add
from bench.roofline import KINDS, Roofline
from bench.session import Progress, Session
from bench.shapes import BANDWIDTH_SHAPES, RESNET50, VARIANTS
from bench.timing import Deadline
from resops import _dispatch

MAIN_SECONDS = 190.0  # after these the main job starts nothing new
MAIN_MODELS = ("resnet18", "resnet50")
CHECK_BATCH = 4
HOW = {
    "timing": "providers run alternately in one process, in rounds; median, 20th and 80th "
    "percentile, least; ratio = median of the ratios of each round; a sample is at least about "
    "1 ms long; garbage collector off",
    "allocator": "glibc keeps freed memory (see settings), for all providers alike",
    "batch_norm": "training mode with gradients recorded, channels-last; eager is F.batch_norm, "
    "in-place add, in-place ReLU; backward asks for all gradients",
    "limit_share": "time of the bare passes (bench/roofline.py) over time of resops, paired",
    **resnet.NOTES,
}


class BadOptions(ValueError):
    """Options that this machine cannot serve; the message says which."""


@dataclass(frozen=True)
class Plan:
    """What a job needs to know of its options."""

    device: torch.device
    threads: tuple[int, ...]
    dtypes: tuple[str, ...]
    op_batch: int
    model_batch: int
    quick: bool
    full: bool
    compile: str | None  # the mode of torch.compile
    models: tuple[str, ...]  # empty: the job's own
    noise: bool

    @classmethod
    def of(cls, options: argparse.Namespace) -> Plan:
        """Defaults for what was not asked for.

        Raises:
            BadOptions: a device that is not there.
        """
        name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            raise BadOptions(f"--device takes cpu or cuda, but got {name!r}.") from None
        if device.type not in ("cpu", "cuda"):
            raise BadOptions(f"--device takes cpu or cuda, but got {name!r}.")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise BadOptions("--device cuda: torch finds no usable GPU; see `nvidia-smi`.")
        gpu = device.type == "cuda"
        threads = (1,) if gpu else tuple(dict.fromkeys((1, environment.cores())))
        return cls(
            device=device,
            threads=options.threads or threads,
            dtypes=options.dtypes or (("fp32", "bf16", "fp16") if gpu else ("fp32", "bf16")),
            op_batch=options.batch or (2 if options.quick else 256 if gpu else 8),
            model_batch=options.batch or (2 if options.quick else 128 if gpu else 4),
            quick=options.quick,
            full=options.full,
            compile=options.compile,
            models=options.models,
            noise=options.noise,
        )

    @property
    def load_images(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return images.noise_images if self.noise else images.real_images


Part = tuple[int, Callable[[Session], None]]  # steps of the progress bar, and what to do


def _models(
    plan: Plan,
    names: tuple[str, ...],
    batches: tuple[int, ...],
    threads_apart: bool = False,
) -> list[Part]:
    """The check, then a timing part for every batch, with ``threads_apart`` also for every number
    of threads."""
    passed: set[str] = set()

    def check(session: Session) -> None:
        layers = names[-1] if "resnet50" not in names else "resnet50"
        passed.update(compare.run(session, names, CHECK_BATCH, layers, plan.load_images))

    def time_models(batch: int, threads: tuple[int, ...]) -> Callable[[Session], None]:
        return lambda session: resnet.run(
            session, names, batch, passed, threads, plan.load_images, plan.compile
        )

    steps = resnet.steps(names, plan.dtypes)
    groups = [(t,) for t in plan.threads] if threads_apart else [plan.threads]
    timings = [(steps, time_models(b, group)) for b, group in itertools.product(batches, groups)]
    return [(len(names), check), *timings]


def _bandwidth(session: Session, rooflines: dict[int, Roofline], curve: bool) -> None:
    for threads in session.threads:
        with session.step(f"bandwidth, {threads} threads"):
            roofline = Roofline(session.device, threads, budget_s=3 if curve else 1.5)
            rooflines[threads] = roofline
            facts = {"suite": "bandwidth", "unit": "GB/s", "threads": threads}
            for kind in KINDS:
                best = asdict(roofline.measured[kind])
                ways = {"way": best.pop("way"), "all_ways": best.pop("all_ways")}
                rate = {"median": best["gb_per_s"], "p20": best["p20"], "p80": best["p80"]}
                row = {"case": f"{kind}, {roofline.nbytes / 2**20:.0f} MiB", "metric": "bandwidth"}
                session.report.add({**facts, **row, **ways, "providers": {"best": rate}})
            if curve:
                for mib, value in roofline.curve().items():
                    row = {"case": f"read, {mib} MiB", "metric": "curve"}
                    way = {"way": roofline.measured["read"].way}
                    rate = {"median": value}
                    session.report.add({**facts, **row, **way, "providers": {"best": rate}})


def _beyond(plan: Plan, shapes: tuple[Any, ...], curve: bool = False) -> list[Part]:
    rooflines: dict[int, Roofline] = {}

    def ops(session: Session) -> None:
        seconds, session.seconds = session.seconds, session.large_seconds
        batch_norm.run_beyond_caches(session, rooflines, shapes)
        session.seconds = seconds
        for roofline in rooflines.values():
            roofline.close()

    return [
        (len(plan.threads), lambda session: _bandwidth(session, rooflines, curve)),
        (len(shapes) * len(plan.dtypes), ops),
    ]


def _ops(plan: Plan) -> Part:
    cases = list(itertools.product(VARIANTS if plan.full else RESNET50, plan.dtypes))
    return len(cases), lambda session: batch_norm.run(session, plan.op_batch, cases)


def _residual_add(plan: Plan) -> Part:
    steps = len(residual_add.WEIGHTINGS) * len(residual_add.SHAPES) * len(plan.dtypes)
    return steps, lambda session: residual_add.run(session, plan.op_batch)


def _fuse(plan: Plan) -> list[Part]:
    from bench.models import fuse  # needs torchvision, timm and MONAI
    from bench.ops import call_overhead

    return [
        (2 * len(call_overhead.cases(plan.device)), call_overhead.run),
        (
            len(fuse.NETWORKS),
            lambda session: fuse.run(session, plan.model_batch, plan.load_images),
        ),
    ]


def _digits(plan: Plan) -> Part:
    seeds, epochs = (1, 4) if plan.quick else (3, 8)
    return seeds, lambda session: digits.run(session, epochs, seeds)


def parts_of(kind: str, plan: Plan) -> list[Part]:
    """A job's parts, in the order in which they run."""
    if kind == "ops":
        shapes = tuple(RESNET50) if plan.full else BANDWIDTH_SHAPES
        return [_ops(plan), _residual_add(plan), *_beyond(plan, shapes)]
    if kind == "models":
        names = plan.models or (tuple(CONFIGURATIONS) if plan.full else MAIN_MODELS)
        batches = (2, plan.model_batch, 4 * plan.model_batch) if plan.full else (plan.model_batch,)
        return _models(plan, names, batches)
    if kind == "fuse":
        return _fuse(plan)
    if kind == "compare":
        return [_models(plan, MAIN_MODELS, ())[0], _digits(plan)]
    if kind == "roofline":
        return [_beyond(plan, (), curve=True)[0]]
    # What matters most comes first: on a busy machine the time may end before the job does.
    check, models, *more_threads = _models(plan, MAIN_MODELS, (plan.model_batch,), True)
    beyond = [] if plan.quick else _beyond(plan, BANDWIDTH_SHAPES)
    return [check, models, _digits(plan), _ops(plan), *more_threads, *beyond]


def _ask_for_gpu_kernels(device: torch.device) -> None:
    """Choose a backend that has kernels there: ``auto`` leaves out those not measured yet."""
    if resops.get_backend() != "auto":
        return
    x = torch.empty(1, device=device)
    for name in ("native", "triton"):
        if _dispatch.refusal(name, "batch_norm", x) is None:
            resops.set_backend(name)
            return


def run(options: argparse.Namespace, began: float | None = None) -> int:
    """Run the job that the options name; the exit status (see bench.__main__.main).

    Raises:
        BadOptions, ResultsError: a message for the user; ResultsError after the tables of what
            was measured have been printed.
    """
    plan = Plan.of(options)
    if plan.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        _ask_for_gpu_kernels(plan.device)
    parts = parts_of(options.kind, plan)
    facts = environment.provenance(plan.device)
    path = report.results_path(
        Path(options.output), facts["date"], environment.slug(plan.device), options.kind
    )
    notes = {**HOW, "quick": plan.quick, "threads": plan.threads}
    results = report.Report(path, options.kind, facts, notes)
    print(f"{facts['device']}, threads {plan.threads}: results go to {path}", flush=True)
    if facts["resops_native_missing"] and plan.device.type == "cpu":
        print(f"resops computes with plain PyTorch here: {facts['resops_native_missing']}.")
    spent = 0.0 if began is None else time.monotonic() - began
    progress = Progress(sum(steps for steps, _ in parts))
    session = Session(
        report=results,
        device=plan.device,
        threads=plan.threads,
        deadline=Deadline(MAIN_SECONDS - spent if options.kind == "main" else float("inf")),
        progress=progress,
        dtypes=plan.dtypes,
    )
    if plan.quick:
        session.seconds, session.model_seconds = 0.05, 0.1
    if options.seconds is not None:
        session.seconds = session.model_seconds = session.large_seconds = options.seconds
    interrupted = False
    gc.collect()
    gc.freeze()  # the collection before each comparison leaves out what is there for good
    try:
        for _, part in parts:
            part(session)
        results.finish()
    except KeyboardInterrupt:
        interrupted = True
        results.save()  # a row may have been added and not yet written
    except report.ResultsError:
        progress.close()
        print("\n" + table.render(results.as_dict()) + "\n")
        raise
    progress.close()
    print("\n" + table.render(results.as_dict()) + "\n")
    try:
        figure.draw(results.as_dict(), results.picture)
        print(f"Results: {results.path}\nPicture: {results.picture}")
    except figure.NoFigure as error:
        print(f"Results: {results.path}\n{error}")
    if interrupted:
        print("Interrupted: what was measured until then is in the results.")
        return 130
    return 1 if session.failed else 0
