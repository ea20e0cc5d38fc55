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

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.batch_norm import create_activation, fused_activation
from ..nn.bias_act import BiasAct
from ..nn.conv_bn_act import Conv2dNormActivation
from ..nn.norm_layers import ActLayer, NormLayer, create_norm_act
from ..nn.random_residual import ResDrop, ShakeDrop, ShakeShake
from ..nn.residual_add import ResidualAdd
from ..nn.std_conv import StdConv2d

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


class ResidualLayers:
    """Makes the layers of one network's residual blocks.

    Args:
        blocks: K, the number of residual blocks.
        norm_layer: see :func:`resops.nn.create_norm_act`; None for "batch", and with
            ``residual="fixup"`` for the biases that Fixup has in place of norms.
        act_layer: class or name of the activation, see :class:`resops.nn.BatchNormAct2d`.
        residual: one of RESIDUALS, see the head of this file.
        drop_path_rate: probability with which the last block's branch is dropped, or shaken.
        weight_standardization: of all convolutions, see :class:`resops.nn.StdConv2d`.

    Raises:
        ValueError: an unknown residual; a drop_path_rate outside [0, 1]; a norm with Fixup.
    """

    def __init__(
        self,
        blocks: int,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer = nn.ReLU,
        residual: str = "sum",
        drop_path_rate: float = 0.0,
        weight_standardization: bool = False,
    ) -> None:
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
        self.norm_layer = "batch" if norm_layer is None else norm_layer
        self.act_layer = act_layer
        self.residual = residual
        self.drop_path_rate = drop_path_rate
        self.weight_standardization = weight_standardization

    @property
    def fixup(self) -> bool:
        return self.residual == "fixup"

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
    ) -> nn.Conv2d:
        """A convolution without bias; by default its output is the input's size / stride."""
        layer = StdConv2d if self.weight_standardization else nn.Conv2d
        padding = kernel_size // 2 if padding is None else padding
        return layer(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        )

    def norm(self, channels: int, act: bool = True) -> Any:
        """What stands between a convolution and the next: act( norm(x) [+ residual] )."""
        if self.fixup:
            return FixupBias(channels, self.act_layer if act else None)
        return create_norm_act(self.norm_layer, channels, self.act_layer, act)

    def last_norm(self, channels: int, act: bool = True) -> Any:
        """The norm at the end of a branch, after which Fixup has nothing."""
        return nn.Identity() if self.fixup else self.norm(channels, act)

    def projection(
        self, in_channels: int, out_channels: int, stride: int, kernel_size: int = 1
    ) -> Any:
        """A shortcut by a convolution and a norm."""
        shortcut = Conv2dNormActivation(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=0,
            norm_layer=None if self.fixup else lambda channels: self.norm(channels, act=False),
            activation_layer=None,
            bias=False,
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

    A subclass has ``chain``, its convolutions and norms, and ``branch``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.join: Join | None = None
        self.second: ResidualBlock | None = None  # of shake-shake: only its branch is used
        self.mix: ShakeShake | None = None

    def chain(self) -> tuple[tuple[nn.Conv2d, Any], ...]:
        """The branch's convolutions, each with its norm."""
        raise NotImplementedError

    def branch(self, x: Tensor) -> Tensor:
        """F(x)."""
        raise NotImplementedError

    def add_branch(self, other: ResidualBlock) -> None:
        """Let shake-shake mix the branch with that of ``other``."""
        other.join = None
        self.second, self.mix = other, ShakeShake()

    def mixed_branches(self, x: Tensor) -> Tensor:
        """F(x), or the mixture of both branches."""
        y = self.branch(x)
        if self.mix is None or self.second is None:
            return y
        mixture: Tensor = self.mix(y, self.second.branch(x))
        return mixture


def initialise(model: nn.Module, classifier: nn.Module, layers: ResidualLayers) -> None:
    """He et al.'s normal weights by fan-out (2015), and Fixup's of it: branches of m convolutions
    scaled by K^(-1/(2m-2)), their last ones and the classifier 0 (Zhang et al., 2019, section 3).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if not layers.fixup:
        return
    for block in model.modules():
        if isinstance(block, ResidualBlock):
            *convs, last = (conv for conv, _ in block.chain())
            with torch.no_grad():
                for conv in convs:
                    conv.weight.mul_(layers.blocks ** (-1 / (2 * len(convs))))
            nn.init.zeros_(last.weight)
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)


def zero_last_norms(model: nn.Module) -> None:
    """Weight 0 in the last norm of every block, which then starts as its shortcut (Goyal et al.,
    "Accurate, Large Minibatch SGD", 2017, section 5.1).

    Raises:
        ValueError: a norm without weight.
    """
    for block in model.modules():
        if isinstance(block, ResidualBlock):
            norm = block.chain()[-1][1]
            if getattr(norm, "weight", None) is None:
                kind = type(norm).__name__
                raise ValueError(f"zero_init_residual needs a weight of norms, but {kind} has none")
            nn.init.zeros_(norm.weight)
