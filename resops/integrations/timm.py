"""For timm: its BatchNormAct2d, computed by the fused op.

>>> from resops.integrations.timm import BatchNormAct2d
>>> timm.create_model("resnetv2_50", norm_layer=BatchNormAct2d)
"""

from __future__ import annotations

from timm.layers.norm_act import BatchNormAct2d as _BatchNormAct2d
from torch import Tensor

from ..nn import batch_norm

__all__ = ["BatchNormAct2d"]


class BatchNormAct2d(batch_norm.BatchNormAct2d, _BatchNormAct2d):
    """:class:`resops.nn.BatchNormAct2d`, which for timm is one of its own layers."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See :meth:`resops.nn.BatchNormAct2d.forward`."""
        return batch_norm.BatchNormAct.forward(self, x, residual)
