"""Wide residual networks for CIFAR (Zagoruyko and Komodakis, "Wide Residual Networks", 2016).

WRN-d-k: three stages of (d - 4) / 6 pre-activation basic blocks, of 16k, 32k and 64k channels
(Table 1). ``drop_rate`` is that of the dropout between the two convolutions of a block.
"""

from __future__ import annotations

from typing import Any

from ._registry import register_model
from .preact_resnet import PreActBasic, PreActResNet


class WideResNet(PreActResNet):
    """WRN-depth-widen_factor.

    Args:
        depth: 6n + 4.
        widen_factor: k.
        num_classes, in_chans, kwargs: see :class:`PreActResNet`.

    Raises:
        ValueError: another depth, or a widen_factor below 1.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        num_classes: int = 10,
        in_chans: int = 3,
        **kwargs: Any,
    ) -> None:
        n, rest = divmod(depth - 4, 6)
        if n < 1 or rest:
            raise ValueError(f"depth must be 6n + 4, such as 28, but got {depth}")
        if widen_factor < 1:
            raise ValueError(f"widen_factor must be positive, but got {widen_factor}")
        channels = [widen_factor * c for c in (16, 32, 64)]
        kwargs = {"stem_chs": 16, "small_images": True, **kwargs}
        super().__init__(PreActBasic, [n] * 3, channels, num_classes, in_chans, **kwargs)


@register_model
def wrn_16_4(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> WideResNet:
    """WRN-16-4. ``kwargs`` are those of :class:`PreActResNet`."""
    return WideResNet(16, 4, num_classes, in_chans, **kwargs)


@register_model
def wrn_16_8(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> WideResNet:
    """WRN-16-8. ``kwargs`` are those of :class:`PreActResNet`."""
    return WideResNet(16, 8, num_classes, in_chans, **kwargs)


@register_model
def wrn_22_8(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> WideResNet:
    """WRN-22-8. ``kwargs`` are those of :class:`PreActResNet`."""
    return WideResNet(22, 8, num_classes, in_chans, **kwargs)


@register_model
def wrn_28_10(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> WideResNet:
    """WRN-28-10. ``kwargs`` are those of :class:`PreActResNet`."""
    return WideResNet(28, 10, num_classes, in_chans, **kwargs)


@register_model
def wrn_40_4(num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> WideResNet:
    """WRN-40-4. ``kwargs`` are those of :class:`PreActResNet`."""
    return WideResNet(40, 4, num_classes, in_chans, **kwargs)
