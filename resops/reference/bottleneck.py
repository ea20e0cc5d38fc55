"""The bottleneck block: the definition, in plain PyTorch.

    y = act( F(x) + shortcut(x) ),   F = norm3 . conv3 . act . norm2 . conv2 . act . norm1 . conv1

with a 1x1, a 3x3 and a 1x1 convolution (He, Zhang, Ren and Sun, "Deep Residual Learning for Image
Recognition", 2015, Figure 5, right). docs/math/bottleneck.md derives the backward pass.
"""

from __future__ import annotations

from torch import Tensor

from .conv_norm import ConvNorm, conv_norm_act


def bottleneck(
    x: Tensor,
    conv1: ConvNorm,
    conv2: ConvNorm,
    conv3: ConvNorm,
    shortcut: ConvNorm | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """The composition of PyTorch's own ops that the fused op replaces.

    ``shortcut`` None is the identity; else it is a convolution and a norm, without activation.
    """
    act = (activation, negative_slope)
    y = conv_norm_act(x, conv1, None, *act)
    y = conv_norm_act(y, conv2, None, *act)
    residual = x if shortcut is None else conv_norm_act(x, shortcut, None, "identity", 0.0)
    return conv_norm_act(y, conv3, residual, *act)
