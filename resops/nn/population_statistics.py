"""Batch norm statistics that are taken from data after training, or anew for each prediction."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.batch_norm import batch_norm_statistics


class _Population:
    """Mean and variance of all inputs of a norm, merged batch by batch in float64 (Chan, Golub and
    LeVeque, "Updating Formulae", 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None  # sum of squared differences from the mean

    def __call__(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input" if "input" in kwargs else "x"]
        x = x.detach()
        count = x.numel() // max(x.size(1), 1)
        if count == 0:
            return
        mean, var = (t.double() for t in batch_norm_statistics(x))
        if self.mean is None or self.squares is None:
            self.mean, self.squares = mean, var * count
        else:
            total = self.count + count
            difference = mean - self.mean
            self.mean = self.mean + difference * (count / total)
            between = difference.square() * (self.count * count / total)
            self.squares = self.squares + var * count + between
        self.count += count

    def write(self, norm: _BatchNorm, unbiased: bool) -> None:
        """Make it the running statistics; a norm that saw no values keeps its own."""
        assert norm.running_mean is not None and norm.running_var is not None
        if self.mean is not None and self.squares is not None:
            norm.running_mean.copy_(self.mean)
            norm.running_var.copy_(self.squares / max(self.count - unbiased, 1))


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        raise ValueError("the model has no batch norm with running statistics")
    return norms


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _buffers_kept(norms: Iterable[nn.Module]) -> Iterator[None]:
    buffers = [b for norm in norms for b in norm.buffers(recurse=False)]
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


@torch.no_grad()
def _take_statistics(model: nn.Module, batches: Iterable[Any], unbiased: bool) -> None:
    norms = _batch_norms(model)
    populations = [_Population() for _ in norms]
    with _buffers_kept(norms), _modes_kept(model), contextlib.ExitStack() as hooks:
        model.eval()
        for norm, population in zip(norms, populations, strict=True):
            norm.training = True  # not norm.train(): a dropout within stays in evaluation
            handle = norm.register_forward_pre_hook(population, with_kwargs=True)
            hooks.callback(handle.remove)
        empty = True
        for batch in batches:
            empty = False
            model(batch[0] if isinstance(batch, tuple | list) else batch)
    if empty:
        raise ValueError("statistics need at least one batch")
    for norm, population in zip(norms, populations, strict=True):
        population.write(norm, unbiased)


def precise_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace running statistics by those of data: precise batch norm (Wu and Johnson, "Rethinking
    'Batch' in BatchNorm", 2021, section 3).

    The model runs with batch norms in training and everything else (dropout) in evaluation; weights
    do not change. Every norm gets mean and unbiased variance of all values that came to it,
    whatever the sizes of the batches.

    Args:
        batches: a loader: of what the model takes, or of tuples or lists that begin with it.

    Raises:
        ValueError: no batch, or no batch norm with running statistics.
    """
    _take_statistics(model, batches, unbiased=True)


@torch.no_grad()
def monte_carlo_predictions(model: nn.Module, batches: Iterable[Any], *inputs: Any) -> Tensor:
    """Predictions under the statistics of one training batch after another: Monte Carlo batch norm
    (Teye, Azizpour and Smith, "Bayesian Uncertainty Estimation for Batch Normalized Deep Networks",
    2018, Algorithm 1).

    Their mean is the prediction, and their variance says how uncertain it is. Each is normalised
    as that batch was in training, by its biased variance. The model and its running statistics are
    as before afterwards.

    Args:
        batches: of training data, one for each prediction; see :func:`precise_statistics`.
        inputs: of the model, which runs in evaluation.

    Returns:
        (T, *) of what the model returns, for T batches.

    Raises:
        ValueError: no batch, or no batch norm with running statistics.
    """
    predictions = []
    with _buffers_kept(_batch_norms(model)), _modes_kept(model):
        for batch in batches:
            _take_statistics(model, [batch], unbiased=False)
            model.eval()
            predictions.append(model(*inputs))
    if not predictions:
        raise ValueError("monte_carlo_predictions needs at least one batch")
    return torch.stack(predictions)
