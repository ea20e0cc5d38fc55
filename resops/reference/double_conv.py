"""The double convolution of U-Nets: the definition, in plain PyTorch.

    y = act( norm2( conv2( act( norm1( conv1(x) ) ) ) ) )

(Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation",
2015, section 2, with batch norm). docs/math/double_conv.md has what the backward pass needs.
"""

from __future__ import annotations

from torch import Tensor

from .conv_norm import ConvNorm, conv_norm_act


def double_conv(
    x: Tensor, conv1: ConvNorm, conv2: ConvNorm, activation: str, negative_slope: float
) -> Tensor:
    """The composition of PyTorch's own ops that the fused op replaces."""
    y = conv_norm_act(x, conv1, None, activation, negative_slope)
    return conv_norm_act(y, conv2, None, activation, negative_slope)
