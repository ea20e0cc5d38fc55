"""Weight standardisation by the op batch_norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .. import functional


class _StdConv(_ConvNd):
    def __init__(self, *args: Any, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_channels, *spatial) to (N, out_channels, *spatial of the output)."""
        weight = functional.batch_norm_act(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            training=True,
            momentum=0.0,
            eps=self.eps,
            activation=None,
        ).view(self.weight.shape)
        y: Tensor = self._conv_forward(input, weight, self.bias)
        return y


class StdConv2d(_StdConv, nn.Conv2d):
    """Convolution whose filters have mean 0 and variance 1 (Qiao, Wang, Liu, Shen and Yuille,
    "Weight Standardization", 2019, Eq. 5).

    The weight is normalised filter by filter at every call, and gradients flow through it: batch
    norm of the view (1, out_channels, -1). Name, ``state_dict`` and results are those of timm's
    ``StdConv2d``.

    Args:
        args, kwargs: of ``nn.Conv2d``.
        eps: added to the variance, inside the root.
    """


class StdConv3d(_StdConv, nn.Conv3d):
    """:class:`StdConv2d` over (N, C, D, H, W)."""
