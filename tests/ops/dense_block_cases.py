"""Dense blocks to call the op with, and what every call is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resops.functional import DenseLayer, NormConv
from resops.reference import dense_block as reference


class Block(NamedTuple):
    """What is given to ``dense_block``."""

    x: Tensor
    layers: list[DenseLayer]
    transition: NormConv | None = None


def norm_conv(
    channels_in: int,
    channels: int,
    kernel: int,
    dtype: torch.dtype,
    *,
    training: bool = True,
    affine: bool = True,
    track: bool = True,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> NormConv:
    """Random weights, and running statistics that do not start at 0 and 1."""
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(channels, channels_in, kernel, kernel) / (channels_in * kernel**2) ** 0.5
    return NormConv(
        torch.randn(channels_in, dtype=statistics) / 4 if track else None,
        torch.rand(channels_in, dtype=statistics) + 0.5 if track else None,
        (torch.rand(channels_in, dtype=statistics) + 0.5).requires_grad_() if affine else None,
        torch.randn(channels_in, dtype=statistics).requires_grad_() if affine else None,
        weight.to(dtype).requires_grad_(),
        training,
        momentum,
        eps,
    )


def block(
    dtype: torch.dtype,
    *,
    layers: int = 3,
    transition: bool = True,
    channels: int = 6,
    growth: int = 4,
    size: tuple[int, int, int] = (3, 6, 5),
    **kwargs: Any,
) -> Block:
    """A block with a bottleneck of twice the growth.

    Args:
        size: batch, height and width.
        kwargs: for all norms.
    """
    n, height, width = size
    x = (torch.randn(n, channels, height, width) + 0.5).to(dtype)
    made = []
    for _ in range(layers):
        narrow = norm_conv(channels, 2 * growth, 1, dtype, **kwargs)
        made.append(DenseLayer(narrow, norm_conv(2 * growth, growth, 3, dtype, **kwargs)))
        channels += growth
    last = norm_conv(channels, channels // 2, 1, dtype, **kwargs) if transition else None
    return Block(x.requires_grad_(), made, last)


def map_tensors(f: Callable[[Tensor], Tensor], args: Block) -> Block:
    """The block with f applied to each of its tensors."""

    def mapped(part: NormConv | None) -> NormConv | None:
        return part and NormConv(*[f(t) if isinstance(t, Tensor) else t for t in part])

    layers = [DenseLayer(*map(mapped, layer)) for layer in args.layers]
    return Block(f(args.x), layers, mapped(args.transition))


def fresh(args: Block, dtype: torch.dtype | None = None) -> Block:
    """Copies; in another dtype, of the rounded values."""

    def copy(t: Tensor) -> Tensor:
        # contiguous() keeps what a copy in another dtype would change: the order of sums.
        converted = t.detach().clone() if dtype is None else t.detach().to(dtype)
        return converted.requires_grad_(t.requires_grad)

    return map_tensors(copy, args)


def parts_of(args: Block) -> dict[str, NormConv]:
    """All norms with their convolutions, by name."""
    parts = {}
    for number, layer in enumerate(args.layers, 1):
        for name, part in zip(layer._fields, layer, strict=True):
            parts[f"layer{number}.{name}"] = part
    if args.transition is not None:
        parts["transition"] = args.transition
    return parts


def tensors_of(args: Block) -> dict[str, Tensor]:
    """x and the parameters, by name."""
    found = {"x": args.x}
    for name, part in parts_of(args).items():
        for field in ("weight", "bias", "conv_weight"):
            t = getattr(part, field)
            if t is not None:
                found[f"{name}.{field}"] = t
    return found


def definition(x: Tensor, layers: Sequence[DenseLayer], last: NormConv | None = None) -> Tensor:
    """The reference, called as the op is."""
    return reference.dense_block(x, layers, last, 0.0)


def gradient_like(y: Tensor, bias: float = 0.0) -> Tensor:
    """Not constant along a channel, which a norm would take out; with a common sign by ``bias``."""
    wave = torch.cos(3 * torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)
    return (wave + bias).to(y)


def results(
    f: Callable[..., Tensor], args: Block, *, bias: float = 0.0, **kwargs: Any
) -> dict[str, Tensor]:
    """y, every gradient and every running statistic of one call, by name."""
    y = f(*args, **kwargs)
    found = {"y": y.detach().clone()}
    wanted = {name: t for name, t in tensors_of(args).items() if t.requires_grad}
    if wanted:
        grads = torch.autograd.grad(y, list(wanted.values()), gradient_like(y, bias))
        found |= {f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    for name, part in parts_of(args).items():
        if part.running_mean is not None and part.running_var is not None:
            found[f"{name}.running_mean"] = part.running_mean
            found[f"{name}.running_var"] = part.running_var
    return found
