"""What residual blocks are made of, by option: convolution, norm, activation, and the join of
branch and shortcut.

The join is part of the last norm's op, or where its weights are not 1 the op residual_add. With K
blocks, of which the k-th (1 to K) has the branch F and the shortcut s:

    sum          y = act( F + s )
    rescale      y = act( (F + s) / sqrt(2) )
    skip_init    y = act( a F + s ), a learned from 0 (De and Smith, 2020)
    fixup        y = act( a F + s + b ), a learned from 1, with biases in place of norms and an
                 initialisation of its own (Zhang, Dauphin and Ma, 2019)
    stable       y = act( F / sqrt(K) + s ) (Hayou et al., "Stable ResNet", 2021)
    res_drop     y = act( d F + s ), d = 0 with the probability drop_path_rate * k / K
    shake_shake  y = act( a F + (1 - a) F' + s ) with a second branch F'
    shake_drop   y = act( a F + s ), a random with the probability drop_path_rate * k / K

Of the others drop_path_rate is that of stochastic depth, in torchvision's and timm's convention,
rising linearly from 0 in the first block. docs/math/residual_add.md has the details.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.batch_norm import create_activation, fused_activation
from ..nn.bias_act import BiasAct
from ..nn.conv_bn_act import Conv2dNormActivation, Conv3dNormActivation, conv_norm_act, convolve
from ..nn.random_residual import ResDrop, ShakeDrop, ShakeShake
from ..nn.residual_add import ResidualAdd
from . import _layers
from ._layers import ActLayer, Layers, NormLayer

RESIDUALS = (
    "sum",
    "rescale",
    "skip_init",
    "fixup",
    "stable",
    "res_drop",
    "shake_shake",
    "shake_drop",
)


class ResidualLayers(Layers):
    """Makes the layers of a network of residual blocks.

    Args:
        blocks: K, the number of residual blocks.
        norm_layer: see :class:`Layers`; None for "batch", and with ``residual="fixup"`` for the
            biases that Fixup has in place of norms.
        residual: one of RESIDUALS, see the head of this file.
        drop_path_rate: probability with which the last block's branch is dropped, or shaken.
        act_layer, dimensions, weight_standardization: see :class:`Layers`.

    Raises:
        ValueError: an unknown residual; a drop_path_rate outside [0, 1]; a norm with Fixup.
    """

    def __init__(
        self,
        blocks: int,
        norm_layer: NormLayer = None,
        act_layer: ActLayer = nn.ReLU,
        residual: str = "sum",
        drop_path_rate: float = 0.0,
        weight_standardization: bool = False,
        dimensions: int = 2,
    ) -> None:
        super().__init__(dimensions, norm_layer, act_layer, weight_standardization)
        if residual not in RESIDUALS:
            raise ValueError(
                f"residual must be one of {', '.join(RESIDUALS)}, but got {residual!r}"
            )
        if not 0 <= drop_path_rate <= 1:
            raise ValueError(f"drop_path_rate must be between 0 and 1, but got {drop_path_rate}")
        if residual == "fixup" and norm_layer is not None:
            raise ValueError(
                f"residual='fixup' goes without norms, but got norm_layer={norm_layer}"
            )
        self.blocks = blocks
        self.residual = residual
        self.drop_path_rate = drop_path_rate

    @property
    def fixup(self) -> bool:
        return self.residual == "fixup"

    def norm(self, channels: int, act: bool = True) -> Any:
        """See :meth:`Layers.norm`; of Fixup the biases in its place."""
        if self.fixup:
            return FixupBias(channels, self.act_layer if act else None)
        return super().norm(channels, act)

    def last_norm(self, channels: int, act: bool = True) -> Any:
        """The norm at the end of a branch, after which Fixup has nothing."""
        return nn.Identity() if self.fixup else self.norm(channels, act)

    def enter(self) -> ScalarBias | None:
        """The bias that Fixup has before the first convolution of a block."""
        return ScalarBias() if self.fixup else None

    def projection(
        self, in_channels: int, out_channels: int, stride: int = 1, kernel_size: int = 1
    ) -> nn.Sequential:
        """A shortcut by a convolution and a norm."""
        kind = Conv2dNormActivation if self.dimensions == 2 else Conv3dNormActivation
        shortcut = kind(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=0,
            norm_layer=None if self.fixup else lambda channels: self.norm(channels, act=False),
            activation_layer=None,
            bias=not self.has_norms,
        )
        if self.weight_standardization:
            shortcut[0] = self.conv(in_channels, out_channels, kernel_size, stride, padding=0)
        return shortcut

    def joins(self, act: bool = True) -> Iterator[Join | None]:
        """Of each block its join; None where the last norm's op can do it.

        Args:
            act: whether the activation follows the sum.
        """
        for k in range(1, self.blocks + 1):
            yield self._join(k, self.act_layer if act else None, fusible=act)

    def _join(self, k: int, act_layer: ActLayer, fusible: bool) -> Join | None:
        rate, K = self.drop_path_rate, self.blocks
        if self.residual in ("res_drop", "shake_drop"):
            kind = ResDrop if self.residual == "res_drop" else ShakeDrop
            return Join(kind, (rate * k / K,), {}, act_layer)
        drop = {"drop_prob": rate * (k - 1) / max(K - 1, 1)}
        if self.residual == "rescale":
            return Join(ResidualAdd, (0.5**0.5, 0.5**0.5), drop, act_layer)
        if self.residual == "skip_init":
            return Join(ResidualAdd, (0.0,), {**drop, "learn_alpha": True}, act_layer)
        if self.residual == "fixup":
            return FixupJoin(ResidualAdd, (1.0,), {**drop, "learn_alpha": True}, act_layer)
        if self.residual == "stable":
            return Join(ResidualAdd, (K**-0.5,), drop, act_layer)
        plain = self.residual == "sum" and drop["drop_prob"] == 0
        return None if plain and fusible else Join(ResidualAdd, (), drop, act_layer)


class Join(nn.Module):
    """act( weighted branch + weighted shortcut ).

    Args:
        kind: of the weighted sum, such as ResidualAdd.
        args, kwargs: of it, without the activation.
        act_layer: runs after the op where that has no such activation.
    """

    def __init__(
        self,
        kind: type[nn.Module],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        act_layer: ActLayer,
    ) -> None:
        super().__init__()
        act = create_activation(act_layer, None, True)
        fused = fused_activation(act)
        if fused is not None and kind is ShakeDrop and fused[0] in ("silu", "gelu"):
            fused = None  # the op knows no derivative of these at another weight
        activation, negative_slope = fused or ("identity", 0.0)
        self.add = kind(*args, activation=activation, negative_slope=negative_slope, **kwargs)
        self.act = act if fused is None else nn.Identity()

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Both (N, C, H, W)."""
        y: Tensor = self.act(self.add(branch, shortcut))
        return y


class ScalarBias(nn.Module):
    """x + b with one learned number b, from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x + self.bias.to(x.dtype)


class FixupBias(BiasAct):
    """act( x + b ) + b' with learned numbers b and b' from 0: before an activation and before the
    convolution that follows it."""

    def __init__(self, channels: int, act_layer: ActLayer) -> None:
        super().__init__(channels, shared=True, act_layer=act_layer)
        self.after = ScalarBias()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W)."""
        y: Tensor = self.after(super().forward(x, residual))
        return y


class FixupJoin(Join):
    """act( a * branch + shortcut + b ) with learned numbers a and b."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.after = ScalarBias()

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Both (N, C, H, W)."""
        return super().forward(branch, self.after(shortcut))


class ResidualBlock(nn.Module):
    """What the blocks of all residual networks share.

    A subclass defines ``chain``, its convolutions and norms, and sets ``join``; it sets ``enter``
    where a block begins with a convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enter: ScalarBias | None = None
        self.join: Any = None  # a Join, or None where the last norm's op does it
        self.second: ResidualBlock | None = None  # of shake-shake: only its branch is used
        self.mix: ShakeShake | None = None

    def chain(self) -> Sequence[tuple[Any, Any]]:
        """The branch's convolutions, each with the norm behind it, or None if there is none."""
        raise NotImplementedError

    def branch(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """F(x), to which the last norm adds the residual."""
        *first, (last, last_norm) = self.chain()
        for conv, norm in first:
            x = conv_norm_act(conv, norm, x)
        if last_norm is None:
            return convolve(last, x)
        return conv_norm_act(last, last_norm, x, residual)

    def add_branch(self, other: ResidualBlock) -> None:
        """Let shake-shake mix the branch with that of ``other``."""
        other.join = None
        self.second, self.mix = other, ShakeShake()

    def entered(self, x: Tensor) -> Tensor:
        """What the branch and the projection of a shortcut take."""
        return x if self.enter is None else self.enter(x)

    def joined(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """act( F(x) + shortcut ), the activation of networks that have it behind the sum."""
        if self.join is None:
            return self.branch(x, shortcut)
        y = self.branch(x)
        if self.mix is not None and self.second is not None:
            y = self.mix(y, self.second.branch(x))
        joined: Tensor = self.join(y, shortcut)
        return joined


class PreActivationBlock(ResidualBlock):
    """A block that begins with ``norm1``, behind which both branches of shake-shake begin."""

    norm1: Any

    def add_branch(self, other: ResidualBlock) -> None:
        """See :meth:`ResidualBlock.add_branch`."""
        assert isinstance(other, PreActivationBlock)
        other.norm1 = nn.Identity()
        super().add_branch(other)


def create_layers(
    dimensions: int,
    residual: bool | str,
    blocks: int,
    norm_layer: NormLayer,
    act_layer: ActLayer,
    drop_path_rate: float,
    weight_standardization: bool,
) -> Layers:
    """Those of a network that has ``blocks`` residual blocks if it is asked to.

    Args:
        residual: False for a network without them, True for "sum", or one of RESIDUALS.

    Raises:
        ValueError: a drop_path_rate without residual blocks; see also :class:`ResidualLayers`.
    """
    if residual:
        kind = "sum" if residual is True else residual
        options = (norm_layer, act_layer, kind, drop_path_rate, weight_standardization)
        return ResidualLayers(blocks, *options, dimensions)
    if drop_path_rate:
        raise ValueError(f"drop_path_rate={drop_path_rate} needs residual blocks: residual=True")
    return Layers(dimensions, norm_layer, act_layer, weight_standardization)


def initialise(
    model: nn.Module,
    classifiers: Sequence[nn.Module],
    layers: Layers,
    mode: str = "fan_out",
    zero_init_residual: bool = False,
) -> None:
    """He et al.'s normal weights (2015), and Fixup's of them: branches of m convolutions scaled by
    K^(-1/(2m-2)), their last ones and the classifiers 0 (Zhang et al., 2019, section 3).

    Args:
        classifiers: the layers that make the network's outputs.
        mode: see :func:`resops.models._layers.initialise`.
        zero_init_residual: weight 0 at the end of every branch, so that a block begins as its
            shortcut: of the last norm (Goyal et al., "Accurate, Large Minibatch SGD", 2017, section
            5.1), or of the last convolution where no norm follows it.

    Raises:
        ValueError: ``zero_init_residual`` with a norm that has no weight, or without blocks.
    """
    _layers.initialise(model, mode)
    if not isinstance(layers, ResidualLayers):
        if zero_init_residual:
            raise ValueError("zero_init_residual needs residual blocks: residual=True")
        return
    for block in model.modules():
        if isinstance(block, ResidualBlock):
            chain = block.chain()
            if layers.fixup:
                with torch.no_grad():
                    for conv, _ in chain[:-1]:
                        conv.weight.mul_(layers.blocks ** (-1 / (2 * len(chain) - 2)))
                nn.init.zeros_(chain[-1][0].weight)
            if zero_init_residual:
                _zero(chain[-1])
    if layers.fixup:
        for classifier in classifiers:
            for parameter in classifier.parameters():
                nn.init.zeros_(parameter)


def _zero(last: tuple[Any, Any]) -> None:
    """Let a branch that ends in this convolution and norm be 0."""
    conv, norm = last
    if norm is None or isinstance(norm, nn.Identity):
        nn.init.zeros_(conv.weight)
        return
    if getattr(norm, "weight", None) is None:
        kind = type(norm).__name__
        raise ValueError(f"zero_init_residual needs a weight of norms, but {kind} has none")
    nn.init.zeros_(norm.weight)
