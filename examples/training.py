"""What both examples need around a training loop: processes, checkpoints, a bar, when to stop."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process among those that ``torchrun`` started; alone without it."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients are averaged over the processes if there are several."""
        if self.count == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def mean(self, *values: float) -> list[float]:
        """Each value's mean over the processes."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.count > 1:
            dist.all_reduce(total)
        return (total / self.count).tolist()


@contextmanager
def processes() -> Iterator[Processes]:
    """Joins the processes of ``torchrun``, one GPU each if there are GPUs, and leaves them."""
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if count > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, device)
    finally:
        if count > 1:
            dist.destroy_process_group()


def bar(items: Iterable[Any], total: int, what: str, shown: bool = True) -> Any:
    """The items, with a progress bar where there are a terminal and tqdm."""
    if shown and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            return items
        return tqdm(items, total=total, desc=what, leave=False, dynamic_ncols=True)
    return items


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; whoever reads the file meanwhile, or later after a crash, gets a whole
    one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    temporary.replace(path)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint: tensors and numbers, never code.

    Raises:
        SystemExit: there is none; the message says so.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"--resume: there is no checkpoint {path}.") from None
    return state


class EarlyStopping:
    """Says when a metric has not grown for so many epochs.

    Args:
        patience: epochs without a better value after which to stop; 0 for never.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best = float("-inf")
        self.waited = 0

    def improved(self, metric: float) -> bool:
        """Count an epoch; whether it is the best one so far."""
        better = metric > self.best
        self.best = max(metric, self.best)
        self.waited = 0 if better else self.waited + 1
        return better

    @property
    def stops(self) -> bool:
        return 0 < self.patience <= self.waited

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best, self.waited = state["best"], int(state["waited"])


def set_learning_rate(
    optimizer: torch.optim.Optimizer, epoch: int, epochs: int, peak: float, warmup: int = 0
) -> None:
    """Linear warm-up, then half of a cosine. It depends on the epoch and nothing else, so that a
    run may be resumed with another number of epochs."""
    decay = 0.5 * (1 + math.cos(math.pi * max(epoch - warmup, 0) / max(epochs - warmup, 1)))
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, (epoch + 1) / (warmup + 1)) * decay


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for an optimizer: weights decay; biases and parameters of norms do not."""
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
