"""DenseNets: bytes moved and saved, training step and inference against the stock model.

A part of ``python -m bench densenet``. What a step and inference are, and the dtypes, is said in
bench/models/resnet.py. The stock model is timed without and with its checkpoints
(``memory_efficient``), and compiled where that is asked for. Before a time is reported the logits
in evaluation are compared with those of the stock model in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import resops
from bench import timing, traffic
from bench.models.compare import CLASSES, K, inference_copy
from bench.models.resnet import inference, saved_activations, training_step
from bench.models.stock_densenet import DenseNet
from bench.session import DTYPES, EAGER, RESOPS, Session, channels_last

CHECKPOINTS = "eager, memory_efficient"
COMPILED = "torch.compile"
# Logits that a rounding of every layer may move by: the networks are some 120 layers deep.
FLOORS = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 2e-3}
CHECKED = 2  # images

Calls = dict[str, Callable[[], object]]


def create(name: str, device: torch.device) -> dict[str, nn.Module]:
    """The stock model without and with checkpoints, and ours; one state, running statistics of one
    batch."""
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {
        EAGER: DenseNet(name, CLASSES),
        CHECKPOINTS: DenseNet(name, CLASSES, memory_efficient=True),
        RESOPS: resops.models.create_model(name, num_classes=CLASSES),
    }
    with torch.no_grad():
        for module in models[EAGER].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        models[EAGER](torch.randn(4, 3, 64, 64))
    for module in models[EAGER].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    for model in models.values():
        model.load_state_dict(models[EAGER].state_dict(), strict=True)
    return {name: channels_last(model, device) for name, model in models.items()}


@torch.inference_mode()
def check(
    session: Session, name: str, models: dict[str, nn.Module], images: Tensor, dtype: str
) -> bool:
    """Whether the logits of ours are no further from the truth than allowed."""
    truth = copy.deepcopy(models[EAGER]).double().eval()(images.double())

    def error(provider: str) -> float:
        y = inference_copy(models[provider], dtype)(images.to(DTYPES[dtype])).double()
        return float((y - truth).norm() / truth.norm())

    ours, stock = error(RESOPS), error(EAGER)
    limit = K * stock + FLOORS[dtype]
    detail = f"distance from float64: resops {ours:.3g}, eager {stock:.3g}, limit {limit:.3g}"
    return session.check(f"{name} {dtype} logits", ours <= limit, ours / limit, detail, name)


def add_traffic(session: Session, name: str, steps: Calls, images: int, dtype: str) -> None:
    """Bytes that the operators of a training step read and write, for each image."""
    counted = {provider: traffic.count(step) for provider, step in steps.items()}
    kinds: dict[str, Callable[[str], bool]] = {
        "all operators": lambda op: True,
        "without convolutions": lambda op: "conv" not in op,
    }
    for kind, is_of in kinds.items():
        moved = {
            provider: sum(n for op, n in found.items() if is_of(op)) / images
            for provider, found in counted.items()
        }
        facts: dict[str, Any] = {"suite": "densenet", "case": f"{name}, {kind}"}
        facts |= {"metric": "traffic"}
        facts |= {"unit": "bytes per image", "dtype": dtype, "batch": images}
        session.report.add({**facts, "providers": moved})


def time_calls(
    session: Session, name: str, direction: str, calls: Calls, threads: int, **facts: Any
) -> None:
    """Times of all providers, and the ratio of each to ours."""
    with timing.threads(threads):
        found = timing.alternate(
            calls,
            budget_s=session.model_seconds,
            device=session.device,
            min_rounds=3,
            warmup=1,
        )
    ratios = {k: found.ratio(k, RESOPS).as_dict() for k in calls if k != RESOPS}
    facts |= {"direction": direction, "ratios": ratios}
    session.add_timing("densenet", name, found, threads, **facts)


def run(
    session: Session,
    names: Sequence[str],
    batch: int,
    load_images: Callable[[int], tuple[Tensor, Tensor]],
    compiled: str | None = None,
) -> None:
    """Check each network at each dtype, count and time it; one step of the progress bar each.

    Args:
        compiled: time ``torch.compile`` of the stock model in this mode, too.
    """
    images, labels = load_images(batch)
    images, labels = images.to(session.device), labels.to(session.device) % CLASSES
    for name, dtype in product(names, session.dtypes):
        with session.step(f"{name} {dtype}") as in_time:
            if not in_time:
                continue
            models = create(name, session.device)
            if not check(session, name, models, images[:CHECKED], dtype):
                continue
            facts = {"dtype": dtype, "batch": batch}
            kept = {k: saved_activations(m, images, labels, dtype) for k, m in models.items()}
            session.add_saved("densenet", name, kept[EAGER], kept[RESOPS], **facts)
            case = f"{name}, eager memory_efficient"
            session.add_saved("densenet", case, kept[CHECKPOINTS], kept[RESOPS], **facts)
            training: Calls = {
                k: training_step(m, images, labels, dtype) for k, m in models.items()
            }
            add_traffic(session, name, training, batch, dtype)
            timed = {k: m for k, m in models.items() if k != CHECKPOINTS}
            forward: Calls = {k: inference(m, images, dtype) for k, m in timed.items()}
            if compiled:
                stock = models[EAGER]
                training[COMPILED] = training_step(stock, images, labels, dtype, compiled)
                forward[COMPILED] = inference(stock, images, dtype, compiled)
            for direction, calls in (("training", training), ("inference", forward)):
                for threads in session.threads:
                    time_calls(session, name, direction, calls, threads, **facts)
