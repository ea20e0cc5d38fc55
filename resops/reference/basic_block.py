"""The basic block: the definition, in plain PyTorch.

    y = act( F(x) + shortcut(x) ),   F = norm2 . conv2 . act . norm1 . conv1

with two 3x3 convolutions (He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition",
2015, Figure 5, left). docs/math/basic_block.md has what the backward pass needs.
"""

from __future__ import annotations

from torch import Tensor

from .conv_norm import ConvNorm, conv_norm_act


def basic_block(
    x: Tensor,
    conv1: ConvNorm,
    conv2: ConvNorm,
    shortcut: ConvNorm | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """The composition of PyTorch's own ops that the fused op replaces.

    ``shortcut`` None is the identity; else it is a convolution and a norm, without activation.
    """
    y = conv_norm_act(x, conv1, None, activation, negative_slope)
    residual = x if shortcut is None else conv_norm_act(x, shortcut, None, "identity", 0.0)
    return conv_norm_act(y, conv2, residual, activation, negative_slope)
