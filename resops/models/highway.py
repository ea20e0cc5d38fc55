"""Highway networks (Srivastava, Greff and Schmidhuber, "Highway Networks", 2015).

A layer carries its input where its gate is closed: with the transform gate
T = sigmoid(W_T x + b_T),

    y = T * act(W x + b) + (1 - T) * x                                              (Eq. 3)

in one op, residual_add with an elementwise weight and its complement. b_T begins negative, so that
a network begins by carrying (section 2.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..nn.batch_norm import create_activation
from ..nn.norm_layers import ActLayer
from ._registry import register_model


class Highway(nn.Module):
    """y = T * act( transform(x) ) + (1 - T) * x.

    Args:
        transform, gate: layers that keep the size of x, with a bias each.
        act_layer: see :class:`resops.nn.BatchNormAct2d`.
        gate_bias: b_T at the beginning.
    """

    def __init__(
        self,
        transform: nn.Linear | nn.Conv2d,
        gate: nn.Linear | nn.Conv2d,
        act_layer: ActLayer,
        gate_bias: float,
    ) -> None:
        super().__init__()
        self.transform, self.gate = transform, gate
        self.act = create_activation(act_layer, None, True)
        assert gate.bias is not None
        nn.init.constant_(gate.bias, gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, features) or (N, C, H, W), to the same size."""
        gate = torch.sigmoid(self.gate(x))
        return functional.residual_add(self.act(self.transform(x)), x, gate, "complement")


class HighwayNetwork(nn.Module):
    """Fully connected: a layer that makes the width, highway layers, and the classifier (section
    3.1).

    Args:
        num_classes, in_chans: of the classifier's output, and of the image.
        image_size: rows, and columns, of the image.
        depth: layers in all.
        width: units of a layer.
        act_layer: see :class:`resops.nn.BatchNormAct2d`.
        gate_bias: of the transform gates at the beginning; the deeper, the lower.

    Raises:
        ValueError: a depth below 3; an image of another size.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        image_size: int = 28,
        depth: int = 10,
        width: int = 50,
        act_layer: ActLayer = nn.ReLU,
        gate_bias: float = -1.0,
    ) -> None:
        super().__init__()
        _check_depth(depth)
        self.num_classes = num_classes
        self.image = (in_chans, image_size, image_size)
        self.fc1 = nn.Linear(in_chans * image_size**2, width)
        self.act = create_activation(act_layer, None, True)
        self.layers = nn.Sequential(
            *(
                Highway(nn.Linear(width, width), nn.Linear(width, width), act_layer, gate_bias)
                for _ in range(depth - 2)
            )
        )
        self.fc = nn.Linear(width, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, image_size, image_size) to the logits, (N, num_classes)."""
        if x.shape[1:] != self.image:
            expected = "x".join(map(str, self.image))
            found = "x".join(map(str, x.shape[1:]))
            raise ValueError(f"expected images of {expected}, but got {found}")
        y: Tensor = self.fc(self.layers(self.act(self.fc1(torch.flatten(x, 1)))))
        return y


class HighwayConvNetwork(nn.Module):
    """Convolutional: a 3x3 convolution, highway layers of 3x3 convolutions with three max poolings
    among them, and a classifier of 3x3 positions (section 3.2).

    Args:
        num_classes, in_chans: of the classifier's output, and of the image.
        depth: layers in all.
        width: channels.
        act_layer: see :class:`resops.nn.BatchNormAct2d`.
        gate_bias: of the transform gates at the beginning.

    Raises:
        ValueError: a depth below 3; an image of fewer than 8 rows or columns.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        depth: int = 10,
        width: int = 16,
        act_layer: ActLayer = nn.ReLU,
        gate_bias: float = -1.0,
    ) -> None:
        super().__init__()
        _check_depth(depth)
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1)
        self.act = create_activation(act_layer, None, True)
        self.layers = nn.Sequential(
            *(
                Highway(_conv3x3(width), _conv3x3(width), act_layer, gate_bias)
                for _ in range(depth - 2)
            )
        )
        self.maxpool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(3)  # of images of 28x28 nothing but their size
        self.fc = nn.Linear(9 * width, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to the logits, (N, num_classes)."""
        if min(x.shape[2:]) < 8:
            size = "x".join(map(str, x.shape[2:]))
            raise ValueError(f"the image is too small for the network: {size}, at least 8x8")
        y = self.act(self.conv1(x))
        count = len(self.layers) + 1  # convolutions; the poolings follow each third of them
        for i, layer in enumerate(self.layers, start=1):
            y = layer(self.maxpool(y) if 3 * i // count > 3 * (i - 1) // count else y)
        return self.fc(torch.flatten(self.avgpool(self.maxpool(y)), 1))


def _conv3x3(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1)


def _check_depth(depth: int) -> None:
    if depth < 3:
        raise ValueError(f"depth must be at least 3, but got {depth}")


def _initialise(model: nn.Module) -> None:
    """He normal weights by fan-out; biases but those of the gates 0."""
    gates = {id(m.gate) for m in model.modules() if isinstance(m, Highway)}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if id(module) not in gates and module.bias is not None:
                nn.init.zeros_(module.bias)


@register_model
def highway(num_classes: int = 10, in_chans: int = 1, **kwargs: Any) -> HighwayNetwork:
    """The fully connected highway network. ``kwargs`` are those of :class:`HighwayNetwork`."""
    return HighwayNetwork(num_classes, in_chans, **kwargs)


@register_model
def highway_conv(num_classes: int = 10, in_chans: int = 1, **kwargs: Any) -> HighwayConvNetwork:
    """The convolutional one. ``kwargs`` are those of :class:`HighwayConvNetwork`."""
    return HighwayConvNetwork(num_classes, in_chans, **kwargs)
