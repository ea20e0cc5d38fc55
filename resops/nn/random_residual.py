"""Joins of residual branches with random weights, other ones forward than backward among them.

docs/math/residual_add.md compares them with stochastic depth, which is
:class:`resops.nn.ResidualAdd` with ``drop_prob``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..reference.activation import ACTIVATIONS


class _RandomJoin(nn.Module):
    def __init__(self, activation: str | None, negative_slope: float, mode: str) -> None:
        super().__init__()
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be None or one of {', '.join(ACTIVATIONS)}, but got "
                f"{activation!r}"
            )
        if mode not in ("row", "batch"):
            raise ValueError(f"mode must be 'row' or 'batch', but got {mode!r}")
        self.activation = activation
        self.negative_slope = negative_slope
        self.mode = mode

    def _empty(self, x: Tensor) -> Tensor:
        """For a weight for every sample, or one for all of them."""
        count = x.size(0) if self.mode == "row" else 1
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.empty(count, dtype=dtype, device=x.device)


class _DroppingJoin(_RandomJoin):
    def __init__(
        self,
        drop_prob: float,
        activation: str | None = None,
        *,
        negative_slope: float = 0.01,
        mode: str = "batch",
    ) -> None:
        super().__init__(activation, negative_slope, mode)
        if not 0 <= drop_prob <= 1:
            raise ValueError(f"drop_prob must be between 0 and 1, but got {drop_prob}")
        self.drop_prob = drop_prob

    def _kept(self, x: Tensor) -> Tensor:
        """1 with the probability 1 - drop_prob, else 0."""
        return self._empty(x).bernoulli_(1 - self.drop_prob)

    def extra_repr(self) -> str:
        return f"{self.drop_prob}, activation={self.activation!r}, mode={self.mode!r}"


class ResDrop(_DroppingJoin):
    """Stochastic depth as its paper has it (Huang et al., "Deep Networks with Stochastic Depth",
    2016, Eq. 2 and 5): ``act( b * x + residual )`` with b 0 or 1 in training, and its expectation
    ``1 - drop_prob`` in evaluation.

    Args:
        drop_prob: probability of 0.
        activation, negative_slope: see :class:`resops.nn.ResidualAdd`.
        mode: "batch" draws once for all samples, as the paper does, "row" for every one.

    Raises:
        ValueError: a drop_prob outside [0, 1]; an unknown activation or mode.
    """

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """The sum; all (N, *)."""
        return functional.residual_add(
            x,
            residual,
            self._kept(x) if self.training else 1 - self.drop_prob,
            activation=self.activation,
            negative_slope=self.negative_slope,
        )


class ShakeDrop(_DroppingJoin):
    """``act( (b + a - b * a) * x + residual )`` (Yamada, Iwamura, Akiba and Kise, "ShakeDrop
    Regularization for Deep Residual Learning", 2019, Eq. 6).

    b is 0 with probability ``drop_prob``, else 1. Forward a is uniform on [-1, 1]; backward another
    draw, uniform on [0, 1], takes its place. In evaluation the weight is its expectation,
    ``1 - drop_prob``.

    Args:
        drop_prob: probability with which a takes the branch's weight.
        activation, negative_slope: "relu", "leaky_relu" or None; see
            :class:`resops.nn.ResidualAdd`.
        mode: "batch" draws once for all samples, "row" for every one.

    Raises:
        ValueError: a drop_prob outside [0, 1]; an unknown or another activation or mode.
    """

    def __init__(self, drop_prob: float, activation: str | None = None, **kwargs: Any) -> None:
        super().__init__(drop_prob, activation, **kwargs)
        if activation in ("silu", "gelu"):
            raise ValueError(
                f"activation must be None, 'identity', 'relu' or 'leaky_relu', but got "
                f"{activation!r}, whose derivative at another weight the op does not know"
            )

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """The sum; all (N, *)."""
        alpha: float | Tensor = 1 - self.drop_prob
        backward = None
        if self.training:
            kept = self._kept(x)
            alpha = kept + (1 - kept) * self._empty(x).uniform_(-1, 1)
            backward = kept + (1 - kept) * self._empty(x).uniform_(0, 1)
        return functional.residual_add(
            x,
            residual,
            alpha,
            activation=self.activation,
            negative_slope=self.negative_slope,
            alpha_backward=backward,
        )


class ShakeShake(_RandomJoin):
    """``a * x + (1 - a) * other`` of two branches (Gastaldi, "Shake-Shake regularization", 2017).

    In training a is uniform on [0, 1], with another draw in the backward pass; in evaluation it is
    1/2. The shortcut is added to the result.

    Args:
        mode: "row" draws for every sample, as the paper's best does, "batch" once for all of them.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(self, mode: str = "row") -> None:
        super().__init__(None, 0.0, mode)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """The mixture; all (N, *)."""
        alpha: float | Tensor = 0.5
        backward = None
        if self.training:
            alpha, backward = self._empty(x).uniform_(0, 1), self._empty(x).uniform_(0, 1)
        return functional.residual_add(x, other, alpha, "complement", alpha_backward=backward)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}"
