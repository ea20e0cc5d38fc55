"""U-Net (Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", 2015, Figure 1).

A contracting path of double 3x3 convolutions and max-pooling, an expanding path of up-convolutions,
and at every resolution the concatenation of the two. :func:`unet_valid` is the network of the
paper, whose convolutions have no padding, so that the output is smaller than the image;
:func:`unet` pads, normalises after every convolution and has the modules, names and numbers of the
implementation that most people use (github.com/milesial/Pytorch-UNet).
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import recomputed_input
from ..nn.batch_norm import is_plain
from ..nn.conv_bn_act import conv_norm_act
from ..nn.residual_block import double_conv
from ._layers import ActLayer, Layers, NormLayer, check_image, fit
from ._registry import register_model
from ._residual import Join, ResidualBlock, ResidualLayers, create_layers, initialise

WIDTHS = (64, 128, 256, 512, 1024)
LEAST_ELEMENTS = 2**18  # of the output of a double convolution that is one op unasked
Channels = tuple[int, int, int]


class ConvNormActs(nn.Sequential):
    """Pairs of a convolution and its norm with activation, one after the other.

    Attributes:
        block_op: in training two convolutions without a residual are one op, which keeps less for
            the backward pass (docs/math/double_conv.md), if no module was given hooks or replaced.
            None: where the output is large.
    """

    block_op: bool | None = None

    def pairs(self) -> list[tuple[Any, Any]]:
        """Each convolution with its norm."""
        modules = list(self._modules.values())
        return list(zip(modules[::2], modules[1::2], strict=True))

    def forward(self, x: Tensor | Sequence[Tensor], residual: Tensor | None = None) -> Tensor:
        """``residual`` is added before the last activation.

        Args:
            x: one tensor, or several side by side along the channels.
        """
        pairs = self.pairs()
        if residual is None and len(pairs) == 2 and self._wants_block_op(pairs[-1][0], x):
            y = double_conv(pairs, x)
            if y is not None:
                return y
        *first, last = pairs
        for conv, norm in first:
            x = conv_norm_act(conv, norm, x)
        return conv_norm_act(*last, x, residual)

    def _wants_block_op(self, last: Any, x: Tensor | Sequence[Tensor]) -> bool:
        if self.block_op is not None:
            return self.block_op
        first = x if isinstance(x, Tensor) else x[0]
        pixels = first.size(0) * math.prod(first.shape[2:])
        return bool(pixels * getattr(last, "out_channels", 0) >= LEAST_ELEMENTS)


def _two_convs(channels: Channels, layers: Layers, last_norm: Any, padding: int) -> ConvNormActs:
    """The names are places: at 2 and 5 the common implementation has its activations."""
    in_channels, mid_channels, out_channels = channels
    modules = OrderedDict[str, nn.Module]()
    modules["0"] = layers.conv(in_channels, mid_channels, padding=padding)
    modules["1"] = layers.norm(mid_channels)
    modules["3"] = layers.conv(mid_channels, out_channels, padding=padding)
    modules["4"] = last_norm
    return ConvNormActs(modules)


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with its norm and activation.

    Args:
        channels: of the input, between the two, and of the output.
        padding: 1 keeps the size, 0 is a valid convolution.
    """

    def __init__(self, channels: Channels, layers: Layers, padding: int = 1) -> None:
        super().__init__()
        self.double_conv = _two_convs(channels, layers, layers.norm(channels[-1]), padding)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        return self.double_conv(x)


class ResidualDoubleConv(ResidualBlock):
    """Two 3x3 convolutions, to which the input is added before the last activation (He et al.,
    2015, Figure 5, left).

    Args:
        channels: see :class:`DoubleConv`.
        shortcut: what the input goes through; None for the identity.
    """

    def __init__(
        self,
        channels: Channels,
        layers: ResidualLayers,
        join: Join | None,
        shortcut: nn.Module | None = None,
    ) -> None:
        super().__init__()
        last_norm = layers.last_norm(channels[-1], act=join is None)
        self.double_conv = _two_convs(channels, layers, last_norm, padding=1)
        self.shortcut = shortcut
        self.enter = layers.enter()
        self.join = join

    def chain(self) -> list[tuple[Any, Any]]:
        return self.double_conv.pairs()

    def branch(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See :meth:`ResidualBlock.branch`."""
        return self.double_conv(x, residual)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        if not isinstance(x, Tensor):  # two convolutions, or an addition, need it whole
            x = torch.cat(list(x), 1)
        entered = self.entered(x)
        return self.joined(entered, x if self.shortcut is None else self.shortcut(entered))


def double_convs(layers: Layers, padding: int = 1) -> Callable[[int, int, int], nn.Module]:
    """What makes a network's double convolutions, from the input's to the output's: of so many
    channels before, between and behind the two."""
    if not isinstance(layers, ResidualLayers):
        return lambda *channels: DoubleConv(channels, layers, padding)
    joins = layers.joins()

    def residual_block(
        in_channels: int, mid_channels: int, out_channels: int
    ) -> ResidualDoubleConv:
        channels = in_channels, mid_channels, out_channels
        shortcut = None
        if in_channels != out_channels:
            shortcut = layers.projection(in_channels, out_channels)
        join = next(joins)
        block = ResidualDoubleConv(channels, layers, join, shortcut)
        if layers.residual == "shake_shake":
            block.add_branch(ResidualDoubleConv(channels, layers, join))
        return block

    return residual_block


def choose_block_op(model: nn.Module, block_op: bool | None) -> None:
    """Whether the double convolutions of a network are one op each in training."""
    for module in model.modules():
        if isinstance(module, ConvNormActs):
            module.block_op = block_op


class Down(nn.Module):
    """Max-pooling, then a double convolution."""

    def __init__(self, pool: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(pool, conv)

    def forward(self, x: Tensor) -> Tensor:
        if not is_plain(self.maxpool_conv):
            return self.maxpool_conv(x)
        pool, conv = self.maxpool_conv
        return conv(recomputed_input.call(pool, x))


class Up(nn.Module):
    """Twice the size, beside the contracting path's channels, then a double convolution.

    The first convolution gets the two as slices: in training its kernel reads each where it is, if
    it can, and the concatenation is neither made nor kept for the backward pass.

    Args:
        up: makes it twice as large.
        conv: of the channels of the skip connection and of ``up``'s output, in this order.
        padded: fit the smaller one to the skip connection by zeros; else cut the skip connection.
    """

    def __init__(self, up: nn.Module, conv: nn.Module, padded: bool = True) -> None:
        super().__init__()
        self.up = up
        self.conv = conv
        self.padded = padded

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = recomputed_input.call(self.up, x)
        if self.padded:
            x = fit(x, skip.shape[2:])
        else:
            skip = fit(skip, x.shape[2:])
        return self.conv((skip, x))


class OutConv(nn.Module):
    """A 1x1 convolution to the logits of the classes."""

    def __init__(self, in_channels: int, num_classes: int, layers: Layers) -> None:
        super().__init__()
        self.conv = layers.conv(in_channels, num_classes, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return recomputed_input.call(self.conv, x)


class UNet(nn.Module):
    """The U-Net.

    Args:
        num_classes: channels of the output.
        in_chans: channels of the image.
        widths: channels at each resolution, from fine to coarse.
        bilinear: upsample by interpolation, and halve the channels in the convolution before;
            else by transposed convolutions that do both.
        norm_layer: "batch" (that of None), "instance" or "group" norm, a class, or "none" for no
            norm (and convolutions with a bias).
        act_layer: the activation, a name or a class. nnU-Net (Isensee et al., 2021) has
            ``norm_layer="instance", act_layer="leaky_relu"``.
        residual: every double convolution is a residual block; a name, such as "skip_init", says
            how branch and shortcut are joined, see :class:`ResidualLayers`.
        drop_path_rate, zero_init_residual: of the residual blocks, as in
            :class:`resops.models.ResNet`.
        weight_standardization: of all but the transposed convolutions.
        padded: convolutions keep the size, and the output has the size of the image; else they are
            valid, as in the paper, and so is the crop of the skip connections.
        drop_rate: of the dropout at the end of the contracting path (section 3.1 of the paper).
        block_op: in training compute each double convolution without a shortcut as one op, whose
            output and activations in between are not kept for the backward pass but computed again
            (docs/math/double_conv.md). One with hooks or replaced modules runs layer by layer.
            None: those whose output has 2^18 elements or more, a megabyte in float32; of small ones
            the memory is little, and what a call costs in Python is seen.

    Raises:
        ValueError: an unknown norm, activation or residual; fewer than two widths; residual blocks
            of valid convolutions; options of residual blocks without these.

    Shape: (N, in_chans, H, W) to (N, num_classes, H, W); valid convolutions return
        ``output_size(H)`` rows and so many columns.
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_chans: int = 3,
        widths: Sequence[int] = WIDTHS,
        bilinear: bool = False,
        norm_layer: NormLayer = None,
        act_layer: ActLayer = "relu",
        residual: bool | str = False,
        padded: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_residual: bool = False,
        weight_standardization: bool = False,
        block_op: bool | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths must be two numbers or more, but got {widths}")
        if residual and not padded:
            raise ValueError("residual=True needs padded=True: a valid convolution is smaller")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.padded = padded
        self.levels = len(widths) - 1
        layers = create_layers(
            2,
            residual,
            2 * len(widths) - 1,
            norm_layer,
            act_layer,
            drop_path_rate,
            weight_standardization,
        )
        double_conv = double_convs(layers, int(padded))
        factor = 2 if bilinear else 1
        channels = [*widths[:-1], widths[-1] // factor]  # where two resolutions meet
        self.inc = double_conv(in_chans, widths[0], widths[0])
        self.downs = [f"down{i}" for i in range(1, len(widths))]
        for name, wide, wider in zip(self.downs, channels, channels[1:], strict=False):
            self.add_module(name, Down(layers.max_pool(), double_conv(wide, wider, wider)))
        self.drop = nn.Dropout(drop_rate)
        self.ups = [f"up{i}" for i in range(1, len(widths))]
        below = channels[-1]
        for name, wide in zip(self.ups, reversed(widths[:-1]), strict=True):
            up = layers.upsample() if bilinear else layers.up_conv(below, wide)
            joined = wide + (below if bilinear else wide)
            wide_out = wide // factor if name != self.ups[-1] else wide
            mid = joined // 2 if bilinear else wide_out
            self.add_module(name, Up(up, double_conv(joined, mid, wide_out), padded))
            below = wide_out
        self.outc = OutConv(below, num_classes, layers)
        choose_block_op(self, block_op)
        # "fan_in": section 3 of the paper
        initialise(self, [self.outc], layers, "fan_in", zero_init_residual)
        self.least_size = next(n for n in itertools.count(1) if self.output_size(n) > 0)

    @property
    def margin(self) -> int:
        """What :func:`resops.models.overlap_tile` adds on each side of a tile: what the output
        depends on, and so much more that every max-pooling meets even sizes."""
        return 6 * 2**self.levels - (0 if self.padded else 2)

    def output_size(self, size: int) -> int:
        """Rows or columns of the output for so many of the image; 0 where that is too small."""
        if self.padded:
            return size if size >> self.levels else 0
        for _ in range(self.levels):
            size = max(size - 4, 0) // 2
        size -= 4
        for _ in range(self.levels):
            size = 2 * max(size, 0) - 4
        return max(size, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to the logits, (N, num_classes, H, W) or smaller."""
        check_image(x, self.in_chans, 2, self.least_size)
        x = self.inc(x)
        skips = [x]
        for name in self.downs:
            x = getattr(self, name)(x)
            skips.append(x)
        x = self.drop(skips.pop())
        for name in self.ups:
            x = getattr(self, name)(x, skips.pop())
        return self.outc(x)


@register_model
def unet(num_classes: int = 2, in_chans: int = 3, **kwargs: Any) -> UNet:
    """The padded U-Net with batch norm. ``kwargs`` are those of :class:`UNet`."""
    return UNet(num_classes, in_chans, **kwargs)


@register_model
def residual_unet(num_classes: int = 2, in_chans: int = 3, **kwargs: Any) -> UNet:
    """The padded U-Net of residual blocks. ``kwargs`` are those of :class:`UNet`."""
    return UNet(num_classes, in_chans, **{"residual": True, **kwargs})


@register_model
def unet_valid(num_classes: int = 2, in_chans: int = 1, **kwargs: Any) -> UNet:
    """The U-Net of the paper: valid convolutions with a bias, no norm, dropout of one half at the
    end of the contracting path. ``kwargs`` are those of :class:`UNet`, and ``norm_layer=None`` is
    "none"."""
    options: dict[str, Any] = {"padded": False, "drop_rate": 0.5, **kwargs}
    options["norm_layer"] = options.get("norm_layer") or "none"
    return UNet(num_classes, in_chans, **options)
