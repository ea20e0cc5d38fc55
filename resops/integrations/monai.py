"""For MONAI: the norm "RESOPS_BATCH" of its layer factory.

>>> import resops.integrations.monai
>>> monai.networks.nets.UNet(..., norm="RESOPS_BATCH")
"""

from __future__ import annotations

from monai.networks.layers.factories import Norm
from torch import nn

from ..nn import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d

__all__ = ["NAME"]

NAME = "RESOPS_BATCH"
_LAYERS = {1: BatchNormAct1d, 2: BatchNormAct2d, 3: BatchNormAct3d}


def _norm(dim: int) -> type[nn.Module]:
    """The batch norm for ``dim`` spatial dimensions; the activation is a layer of MONAI's own."""
    layer = _LAYERS[dim]

    class BatchNorm(layer):  # type: ignore[misc, valid-type]
        def __init__(self, num_features: int, **kwargs: object) -> None:
            super().__init__(num_features, apply_act=False, **kwargs)

    BatchNorm.__name__ = BatchNorm.__qualname__ = f"BatchNorm{dim}d"
    return BatchNorm


if NAME not in Norm.names:
    Norm.factory_function(NAME)(_norm)
