"""Blocks to call ``bottleneck`` and ``basic_block`` with, and what every call is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from resops import _dispatch
from resops.functional import ConvNorm, basic_block, bottleneck
from resops.ops import convolution
from resops.reference import basic_block as basic_block_reference
from resops.reference import bottleneck as bottleneck_reference
from resops.reference import conv_bn_act as phases
from resops.reference import double_conv as double_conv_reference
from tests.accuracy import UNIT_ROUNDOFF

OPS: dict[str, Callable[..., Tensor]] = {"basic_block": basic_block, "bottleneck": bottleneck}
DEFINITIONS: dict[str, Callable[..., Tensor]] = {
    "basic_block": basic_block_reference.basic_block,
    "bottleneck": bottleneck_reference.bottleneck,
    "double_conv": double_conv_reference.double_conv,
}
TENSORS = 6  # of a ConvNorm
PARAMETERS = (0, 1, 4, 5)  # conv_weight, conv_bias, weight, bias


def layer(
    channels_in: int,
    channels: int,
    kernel: int,
    dtype: torch.dtype,
    *,
    stride: int = 1,
    groups: int = 1,
    training: bool = True,
    affine: bool = True,
    conv_bias: bool = False,
    dimensions: int = 2,
) -> ConvNorm:
    """Random weights, and running statistics that do not start at 0 and 1."""
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    size = (channels, channels_in // groups, *[kernel] * dimensions)
    weight = torch.randn(size) / (channels_in // groups * kernel**dimensions) ** 0.5
    return ConvNorm(
        weight.to(dtype).requires_grad_(),
        torch.randn(channels).to(dtype).requires_grad_() if conv_bias else None,
        torch.randn(channels, dtype=statistics),
        torch.rand(channels, dtype=statistics) + 0.5,
        (torch.rand(channels, dtype=statistics) + 0.5).requires_grad_() if affine else None,
        torch.randn(channels, dtype=statistics).requires_grad_() if affine else None,
        training,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
    )


def block(
    op: str,
    dtype: torch.dtype,
    *,
    projection: bool,
    stride_in_first: bool = False,
    width: int = 8,
    **kwargs: Any,
) -> list[Any]:
    """x and the layers of a block; one with a projection has stride 2.

    Args:
        stride_in_first: of a bottleneck, as in ResNet v1; else it is in the 3x3 convolution.
        kwargs: for all layers.
    """
    groups = kwargs.pop("groups", 1)
    n = kwargs.get("dimensions", 2)
    wide = 2 * width
    stride = 2 if projection else 1
    x = torch.randn(3, wide, *(9, 7, 5)[:n]).to(dtype)
    if op == "basic_block":
        chain = [
            layer(wide, wide, 3, dtype, stride=stride, **kwargs),
            layer(wide, wide, 3, dtype, groups=groups, **kwargs),
        ]
    else:
        first, second = (stride, 1) if stride_in_first else (1, stride)
        chain = [
            layer(wide, width, 1, dtype, stride=first, **kwargs),
            layer(width, width, 3, dtype, stride=second, groups=groups, **kwargs),
            layer(width, wide, 1, dtype, **kwargs),
        ]
    shortcut = layer(wide, wide, 1, dtype, stride=stride, **kwargs) if projection else None
    return [x.requires_grad_(), *chain, shortcut]


def fresh(args: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Copies of x and the layers; in another dtype, of the rounded values."""

    def copy(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        converted = t.detach().clone() if dtype is None else t.detach().to(dtype)
        return converted.requires_grad_(t.requires_grad)

    return [ConvNorm(*map(copy, a)) if isinstance(a, ConvNorm) else copy(a) for a in args]


def tensors_of(args: Sequence[Any]) -> dict[str, Tensor]:
    """x and the parameters, by name."""
    found = {"x": args[0]}
    for number, a in enumerate(args[1:], 1):
        if a is not None:
            for i in PARAMETERS:
                if a[i] is not None:
                    found[f"layer{number}.{ConvNorm._fields[i]}"] = a[i]
    return found


def results(f: Callable[..., Tensor], args: Sequence[Any], *rest: Any, **kwargs: Any) -> Any:
    """y, every gradient and every running statistic of one call, by name."""
    y = f(*args, *rest, **kwargs)
    found = {"y": y.detach()}
    wanted = {n: t for n, t in tensors_of(args).items() if t.requires_grad}
    # The gradient of y is not constant along a channel, which a norm would take out.
    grad_y = torch.cos(3 * torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y)
    for name, grad in zip(
        wanted, torch.autograd.grad(y, list(wanted.values()), grad_y), strict=True
    ):
        found[f"grad_{name}"] = grad
    for number, a in enumerate(args[1:], 1):
        if a is not None and a.running_mean is not None:
            found[f"layer{number}.running_mean"] = a.running_mean
            found[f"layer{number}.running_var"] = a.running_var
    return found


def assert_near_to_float64(
    op: str, args: Sequence[Any], mine: dict[str, Tensor], more: float = 0.0
) -> None:
    """What a call with ``args`` and silu gave is as near to the definition in float64 as what
    PyTorch's ops give: three times their distance, and some roundings per layer.

    Args:
        args: as they were before the call, which updates the running statistics.
        more: what Winograd's algorithm may add, by the announced bound of the precision "high".
    """
    exact = results(DEFINITIONS[op], fresh(args, torch.float64), "silu", 0.01)
    torchs = results(DEFINITIONS[op], fresh(args), "silu", 0.01)
    floor = 2 * (len(args) - 1) * UNIT_ROUNDOFF[args[0].dtype]
    assert mine.keys() == exact.keys()
    for name, truth in exact.items():
        norm = truth.norm()
        error, yardstick = (float((r[name].double() - truth).norm() / norm) for r in (mine, torchs))
        assert error <= 3 * yardstick + floor + more, (name, error, yardstick)


@contextlib.contextmanager
def reference_phases_as_native() -> Iterator[None]:
    """Inside, the fused convolutions of the backend "native" are the reference's: what the block
    does with prologues, statistics and sums is tested whatever kernels a build has."""
    native = torch.ops.resops
    names = ("statistics", "apply", "forward", "backward_reduce", "backward_apply", "backward")
    ops = {f"batch_norm_{name}": getattr(native, f"batch_norm_{name}") for name in names}
    for name in ("apply", "accumulate", "gradient", "update_running"):
        ops[f"dense_block_{name}"] = getattr(native, f"dense_block_{name}")
    for name in ("forward", "backward_data", "backward_weight"):
        ops[f"conv_bn_act_{name}"] = getattr(phases, f"conv_bn_act_{name}")
    with pytest.MonkeyPatch.context() as patch, convolution.convolutions("fused"):
        patch.setitem(convolution.NAMESPACES, "native", SimpleNamespace(**ops))
        patch.setitem(_dispatch._KERNELS["native"], "conv_bn_act", frozenset({"cpu"}))
        yield


CONVOLUTIONS: dict[str, Callable[[], Any]] = {
    "library": lambda: convolution.convolutions("library"),
    "fused": reference_phases_as_native,
}
