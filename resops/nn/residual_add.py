"""The join of a residual block as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..reference.activation import ACTIVATIONS


class ResidualAdd(nn.Module):
    """``y = act(alpha * x + beta * residual)``, see :func:`resops.functional.residual_add`.

    >>> join = ResidualAdd(activation="relu")                     # ResNet
    >>> join = ResidualAdd(0.0, learn_alpha=True)                 # SkipInit
    >>> join = ResidualAdd(0.5**0.5, 0.5**0.5)                    # variance kept
    >>> join = ResidualAdd(activation="relu", drop_prob=0.2)      # stochastic depth
    >>> y = join(branch, shortcut)

    Args:
        alpha: weight of x, the branch; its first value if it is learned.
        beta: weight of the residual, the shortcut, likewise; "complement" stands for 1 - alpha.
        activation: "relu", "leaky_relu", "silu", "gelu" (exact) or None.
        negative_slope: of leaky_relu.
        learn_alpha: make alpha a parameter of one element (De and Smith, "Batch Normalization
            Biases Residual Blocks Towards the Identity Function in Deep Networks", 2020).
        learn_beta: likewise for beta.
        drop_prob: in training, the probability with which the branch of a sample is multiplied by
            0, and else by 1 / (1 - drop_prob); in evaluation nothing is dropped (Huang et al.,
            "Deep Networks with Stochastic Depth", 2016, in the convention of torchvision and timm).
        drop_mode: "row" draws for every sample, "batch" once for all of them.
        device, dtype: of the parameters.

    Shape:
        x, residual, output: (N, *), of one size. State: ``alpha`` and ``beta``, (1,), if learned.

    Raises:
        ValueError: an unknown activation, string or drop_mode; a drop_prob outside [0, 1];
            "complement" together with learn_beta or drop_prob.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float | str = 1.0,
        activation: str | None = None,
        *,
        negative_slope: float = 0.01,
        learn_alpha: bool = False,
        learn_beta: bool = False,
        drop_prob: float = 0.0,
        drop_mode: str = "row",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be None or one of {', '.join(ACTIVATIONS)}, but got "
                f"{activation!r}"
            )
        if isinstance(beta, str) and beta != "complement":
            raise ValueError(f"beta must be a number or 'complement', but got {beta!r}")
        if isinstance(beta, str) and (learn_beta or drop_prob):
            raise ValueError("beta='complement' goes with neither learn_beta nor drop_prob")
        if not 0 <= drop_prob <= 1:
            raise ValueError(f"drop_prob must be between 0 and 1, but got {drop_prob}")
        if drop_mode not in ("row", "batch"):
            raise ValueError(f"drop_mode must be 'row' or 'batch', but got {drop_mode!r}")
        self.initial = (alpha, beta)
        self.activation = activation
        self.negative_slope = negative_slope
        self.drop_prob = drop_prob
        self.drop_mode = drop_mode

        def parameter() -> nn.Parameter:
            # One element and not a scalar: sharding (FSDP) takes no tensors without dimensions.
            return nn.Parameter(torch.empty(1, device=device, dtype=dtype))

        self.alpha: float | nn.Parameter = parameter() if learn_alpha else alpha
        self.beta: float | str | nn.Parameter = parameter() if learn_beta else beta
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set learned weights to the values that the layer was made with."""
        for weight, value in zip((self.alpha, self.beta), self.initial, strict=True):
            if isinstance(weight, nn.Parameter) and not isinstance(value, str):
                nn.init.constant_(weight, value)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        alpha: float | Tensor = self.alpha
        if self.training and self.drop_prob > 0:
            alpha = alpha * self._draw(x)
        return functional.residual_add(
            x,
            residual,
            alpha,
            self.beta,
            activation=self.activation,
            negative_slope=self.negative_slope,
        )

    def _draw(self, x: Tensor) -> Tensor:
        """0 or 1 / (1 - drop_prob), for every sample or for all of them."""
        keep = 1 - self.drop_prob
        count = x.size(0) if self.drop_mode == "row" else 1
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        noise = torch.empty(count, dtype=dtype, device=x.device).bernoulli_(keep)
        return noise / keep if keep > 0 else noise

    def extra_repr(self) -> str:
        alpha, beta = self.initial
        parts = [f"alpha={alpha}", f"beta={beta!r}"]
        parts += [
            f"learn_{name}=True"
            for name, weight in (("alpha", self.alpha), ("beta", self.beta))
            if isinstance(weight, nn.Parameter)
        ]
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        if self.activation == "leaky_relu":
            parts.append(f"negative_slope={self.negative_slope}")
        if self.drop_prob > 0:
            parts += [f"drop_prob={self.drop_prob}", f"drop_mode={self.drop_mode!r}"]
        return ", ".join(parts)
