"""What stands in a norm's place where a network has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .batch_norm import NormAct


class BiasAct(NormAct):
    """act( x + bias [+ residual] ): in a norm's place, where a network has none.

    The bias is the one that a convolution without norm has. One pass, that of a batch norm with
    statistics 0 and 1.

    Args:
        num_features: C.
        affine: learn the bias, (C,).
        shared: learn one bias for all channels, (1,), as Fixup has it.
        others: see :class:`resops.nn.BatchNormAct2d`.

    Shape: input, residual and output (N, C, *spatial).
    """

    def __init__(
        self,
        num_features: int,
        affine: bool = True,
        shared: bool = False,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] | str | None = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bias: nn.Parameter | None = None
        if affine:
            biases = torch.zeros(1 if shared else num_features, device=device, dtype=dtype)
            self.bias = nn.Parameter(biases)
        self.num_features = num_features
        self._set_epilogue(apply_act, act_layer, act_kwargs, inplace, None)

    def _normalize(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float | Tensor
    ) -> Tensor:
        # Made at every call: a buffer that no state_dict has would be lost on the way from "meta".
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(self.num_features, device=x.device, dtype=dtype)
        return functional.batch_norm_act(
            x,
            zeros,
            torch.ones_like(zeros),
            None,
            None if self.bias is None else self.bias.expand(self.num_features),
            eps=0.0,
            residual=residual,
            activation=activation,
            negative_slope=negative_slope,
        )
