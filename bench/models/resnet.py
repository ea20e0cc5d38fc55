"""ResNets: training step and inference against the stock model.

A training step is ``zero_grad``, forward, cross entropy, backward and SGD with momentum and weight
decay (the optimizer's step is part of the time), with autocast for 16-bit dtypes. Inference is the
forward pass in ``torch.inference_mode``; for 16-bit dtypes the whole model is converted
(``model.to(torch.bfloat16)``), which is the faster of the two ways that users have for eager.
Everything is channels-last, and the same for both providers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from bench import timing
from bench.models.compare import CLASSES, autocast, inference_copy
from bench.models.stock_resnet import create_stock_model
from bench.session import DTYPES, EAGER, RESOPS, Session, channels_last, saved_bytes

# Options of a network that make it keep less for the backward pass.
BLOCK_OPTIONS = ("block_op", "memory_efficient")
NOTES = {
    "training": "zero_grad, forward, cross entropy, backward, SGD(momentum, weight decay) step; "
    "autocast for 16-bit dtypes",
    "inference": "forward in inference_mode; model.to(dtype) for 16-bit dtypes",
    "layout": "channels-last",
}


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: str, compiled: str | None = None
) -> Callable[[], object]:
    """One step of training as a call; it changes a copy of the model."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    run: Callable[[Tensor], Tensor] = torch.compile(model, mode=compiled) if compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(images.device, dtype):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()

    return step


def inference(
    model: nn.Module, images: Tensor, dtype: str, compiled: str | None = None
) -> Callable[[], object]:
    """The forward pass of a copy of the model as a call."""
    model = inference_copy(model, dtype)
    images = images.to(DTYPES[dtype])
    run: Callable[[Tensor], Tensor] = torch.compile(model, mode=compiled) if compiled else model

    def forward() -> Tensor:
        with torch.inference_mode():
            return run(images)

    return forward


def saved_activations(model: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> int:
    """Bytes that the forward pass of a training step keeps, parameters and images not counted.

    Under autocast the 16-bit copies of the weights are kept too, by both providers.
    """
    model = copy.deepcopy(model).train()

    def forward() -> Tensor:
        with autocast(images.device, dtype):
            return F.cross_entropy(model(images), labels)

    there = chain(model.parameters(), model.buffers(), (images, labels))
    return saved_bytes(forward, there)


def create_pair(name: str, device: torch.device) -> dict[str, nn.Module]:
    """The stock and the resops model with the same weights, channels-last."""
    torch.manual_seed(0)
    stock = create_stock_model(name, CLASSES)
    ours = resops.models.create_model(name, num_classes=CLASSES)
    ours.load_state_dict(stock.state_dict(), strict=True)
    pair = {EAGER: stock, RESOPS: ours}
    return {name: channels_last(model, device) for name, model in pair.items()}


def steps(names: Sequence[str], dtypes: Sequence[str]) -> int:
    """Steps of the progress bar."""
    return len(names) * len(dtypes)


def run(
    session: Session,
    names: Iterable[str],
    batch: int,
    passed: set[str],
    threads: Sequence[int],
    load_images: Callable[[int], tuple[Tensor, Tensor]],
    compiled: str | None = None,
) -> None:
    """Time training and inference of the networks that passed their check.

    Args:
        passed: "<name> <dtype>" of the checks.
        threads: the numbers of threads to time with.
        compiled: time ``torch.compile`` of the stock model in this mode, too.
    """
    images, labels = load_images(batch)
    images, labels = images.to(session.device), labels.to(session.device) % CLASSES
    for name, dtype in product(names, session.dtypes):
        with session.step(f"{name} {dtype}, {'/'.join(map(str, threads))} threads") as in_time:
            if not in_time or f"{name} {dtype}" not in passed:
                continue
            models = create_pair(name, session.device)
            if session.threads[0] in threads:
                kept = {k: saved_activations(m, images, labels, dtype) for k, m in models.items()}
                session.add_saved("models", name, **kept, dtype=dtype, batch=batch)
                for option in BLOCK_OPTIONS:
                    blocks = resops.models.create_model(name, num_classes=CLASSES, **{option: True})
                    blocks = channels_last(blocks, session.device)
                    kept[RESOPS] = saved_activations(blocks, images, labels, dtype)
                    case = f"{name}, {option}"
                    session.add_saved("models", case, **kept, dtype=dtype, batch=batch)
            directions: dict[str, dict[str, Callable[[], object]]] = {
                "training": {k: training_step(m, images, labels, dtype) for k, m in models.items()},
                "inference": {k: inference(m, images, dtype) for k, m in models.items()},
            }
            if compiled:
                stock = models[EAGER]
                directions["training"]["compiled"] = training_step(
                    stock, images, labels, dtype, compiled
                )
                directions["inference"]["compiled"] = inference(stock, images, dtype, compiled)
            for (direction, calls), count in product(directions.items(), threads):
                with timing.threads(count):
                    found = timing.alternate(
                        calls,
                        budget_s=session.model_seconds,
                        device=session.device,
                        min_rounds=3,
                        warmup=1,
                    )
                session.add_timing(
                    "models", name, found, count, direction=direction, dtype=dtype, batch=batch
                )
