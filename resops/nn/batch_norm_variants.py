"""Batch norms that take their statistics otherwise in training: ghost batches, renormalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..ops.batch_norm import batch_norm_statistics
from .batch_norm import BatchNormAct2d, next_statistics


class GhostBatchNormAct2d(BatchNormAct2d):
    """Batch norm with the statistics of parts of the batch (Hoffer, Hubara and Soudry, "Train
    longer, generalize better", 2017, Algorithm 1).

    In training the batch is cut into ghost batches of at most ``virtual_batch_size`` samples and of
    sizes that differ by one at most. Each is normalised by itself and updates the running
    statistics, one after the other. In evaluation it is batch norm. The ghost batches' outputs are
    copied into one tensor.

    Args:
        num_features: C.
        virtual_batch_size: samples of a ghost batch.
        kwargs: of :class:`resops.nn.BatchNormAct2d`.

    Raises:
        ValueError: a virtual_batch_size below 1.
    """

    def __init__(self, num_features: int, virtual_batch_size: int = 32, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        if virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size must be positive, but got {virtual_batch_size}")
        self.virtual_batch_size = virtual_batch_size

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float | Tensor
    ) -> Tensor:
        normalize = super()._normalize
        count = -(-x.size(0) // self.virtual_batch_size)
        if not self.training or count <= 1:
            return normalize(x, residual, activation, negative_slope)
        ghosts = x.tensor_split(count)
        residuals = [None] * count if residual is None else residual.tensor_split(count)
        outputs = [
            normalize(x, r, activation, negative_slope)
            for x, r in zip(ghosts, residuals, strict=True)
        ]
        return torch.cat(outputs)


class BatchRenormAct2d(BatchNormAct2d):
    """Batch renormalisation (Ioffe, "Batch Renormalization", 2017, Algorithm 1).

    In training ``y = act( weight * (xhat * r + d) + bias [+ residual] )`` with xhat normalised by
    the batch's statistics, and

        r = clip(sigma_batch / sigma, 1 / r_max, r_max)
        d = clip((mean_batch - mean) / sigma, -d_max, d_max)

    where mean and sigma are the running ones, before they are updated. No gradient flows through r
    and d. With r_max = 1 and d_max = 0 it is batch norm; in evaluation it is too. r and d go into
    weight and bias of the op, and the batch's statistics are computed once more for them.

    Args:
        num_features: C.
        r_max, d_max: limits of the correction, at least 1 and 0. The paper raises them during
            training from 1 and 0 to 3 and 5: they are attributes of these names.
        kwargs: of :class:`resops.nn.BatchNormAct2d`.

    Raises:
        ValueError: r_max below 1, d_max below 0, or ``track_running_stats=False``.

    Not for activation checkpointing: the second run of a forward pass finds running statistics
    that the first has moved, and so another r and d.
    """

    def __init__(
        self, num_features: int, r_max: float = 3.0, d_max: float = 5.0, **kwargs: Any
    ) -> None:
        super().__init__(num_features, **kwargs)
        if not (r_max >= 1 and d_max >= 0):
            raise ValueError(
                f"r_max must be at least 1 and d_max at least 0, but got {r_max} and {d_max}"
            )
        if not self.track_running_stats:
            raise ValueError("batch renormalisation needs running statistics")
        self.r_max, self.d_max = r_max, d_max

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float | Tensor
    ) -> Tensor:
        if not self.training or x.numel() == 0:
            return super()._normalize(x, residual, activation, negative_slope)
        self._check_input_dim(x)
        r, d = self._correction(x)
        weight = r if self.weight is None else self.weight * r
        bias = d if self.weight is None else self.weight * d
        if self.bias is not None:
            bias = bias + self.bias
        running_mean, running_var, training, momentum = next_statistics(self)
        return functional.batch_norm_act(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            self.eps,
            residual=residual,
            activation=activation,
            negative_slope=negative_slope,
        )

    @torch.no_grad()
    def _correction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """r and d, (C,) each, of the parameters' dtype."""
        assert self.running_mean is not None and self.running_var is not None
        mean, var = batch_norm_statistics(x)
        invstd = torch.rsqrt(self.running_var + self.eps)
        r = torch.sqrt(var + self.eps) * invstd
        d = (mean - self.running_mean) * invstd
        dtype = self.running_mean.dtype
        r = r.clamp(1 / self.r_max, self.r_max).to(dtype)
        return r, d.clamp(-self.d_max, self.d_max).to(dtype)
