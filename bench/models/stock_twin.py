"""A network of resops.models as its users have it without resops: of torch.nn's own modules.

The same modules under the same names, so that a ``state_dict`` goes both ways, with each layer of
resops replaced by what it stands for: an nn.BatchNorm, an in-place addition and an in-place
activation. A convolution is nn.Conv2d's own forward, and no block goes to an op of its own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from resops.nn import BatchNormAct2d, BatchNormAct3d, ResidualAdd


class Conv2d(nn.Conv2d):
    """nn.Conv2d: of another type, so that no layer of resops computes it otherwise."""


class _ThenAct(nn.Module):
    """What follows the norm, in place."""

    act: nn.Module

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = super().forward(x)
        if residual is not None:
            y += residual
        return self.act(y)


class BatchNormThenAct2d(_ThenAct, nn.BatchNorm2d):
    """nn.BatchNorm2d, addition and activation."""


class BatchNormThenAct3d(_ThenAct, nn.BatchNorm3d):
    """nn.BatchNorm3d, addition and activation."""


class Add(nn.Module):
    """x + residual."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    BatchNormAct2d: BatchNormThenAct2d,
    BatchNormAct3d: BatchNormThenAct3d,
}


def stock_twin(model: nn.Module) -> nn.Module:
    """A copy of ``model`` without layers of resops.

    Additions that a network calls as functions, and not as layers, stay calls of
    ``resops.functional.residual_add``: run the copy within ``resops.backend("reference")``, where
    they are ``+``.

    Raises:
        TypeError: a layer of resops for which there is nothing here.
    """
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            setattr(module, name, _replaced(child))
    return twin


def _replaced(layer: nn.Module) -> nn.Module:
    if type(layer) is nn.Conv2d:
        layer.__class__ = Conv2d
    elif type(layer) in _NORMS:
        act = layer.act
        layer.__class__ = _NORMS[type(layer)]
        layer.act = nn.ReLU(inplace=True) if type(act) is nn.ReLU else act
    elif type(layer) is ResidualAdd:
        plain = layer.alpha == 1 and layer.beta == 1 and not layer.drop_prob
        if not plain or layer.activation != "identity":
            raise TypeError(f"{layer} is no plain sum")
        return Add()
    elif type(layer).__module__.startswith("resops.nn") and not isinstance(layer, nn.Sequential):
        raise TypeError(f"{type(layer).__name__} has no stock layer here")
    return layer


def outputs(y: Tensor | list[Tensor]) -> list[Tensor]:
    """Of a network that returns one tensor or several."""
    return [y] if isinstance(y, torch.Tensor) else list(y)
