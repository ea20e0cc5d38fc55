"""What ``bottleneck``, ``basic_block`` and ``double_conv`` refuse, before any running statistic is
updated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.conv_norm import ConvNorm
from .batch_norm import check_activation, check_input, check_tensor
from .batch_norm import check_arguments as check_norm
from .conv_bn_act_phases import paddings_of, size_tuple


def side_by_side(op: str, input: object) -> list[Tensor]:
    """The tensors, side by side along the channels, of which the input is made; usually one.

    Raises:
        TypeError, RuntimeError: no tensor, or tensors that do not fit together.
    """
    if not isinstance(input, list | tuple) or len(input) == 0:
        check_tensor(op, "input", input)
        assert isinstance(input, Tensor)
        return [input]
    for i, t in enumerate(input):
        check_tensor(op, f"input[{i}]", t)
    first = input[0]
    for i, t in enumerate(input):
        if t.dim() < 3 or (t.size(0), t.shape[2:]) != (first.size(0), first.shape[2:]):
            raise RuntimeError(
                f"{op}: input[{i}] should be of size (N, C, *spatial) with the batch and image "
                f"size of input[0], {list(first.shape)}, but got size {list(t.shape)}"
            )
        if (t.dtype, t.device) != (first.dtype, first.device):
            raise RuntimeError(
                f"{op}: input[{i}] should be {first.dtype} on {first.device} as input[0], but got "
                f"{t.dtype} on {t.device}"
            )
    return list(input)


def joined(slices: Sequence[Tensor]) -> Tensor:
    """Tensors side by side as one."""
    return slices[0] if len(slices) == 1 else torch.cat(list(slices), 1)


def check_layers(op: str, chain: Sequence[object], shortcut: object) -> None:
    """Raise TypeError unless the layers are ConvNorms of tensors."""
    layers = {f"conv{number}": layer for number, layer in enumerate(chain, 1)}
    if shortcut is not None:
        layers["shortcut"] = shortcut
    for name, layer in layers.items():
        if not isinstance(layer, ConvNorm):
            kind = type(layer).__name__
            raise TypeError(f"{op}(): argument '{name}' must be ConvNorm, not {kind}")
        check_tensor(op, f"{name}.conv_weight", layer.conv_weight)
        if layer.conv_bias is not None:
            check_tensor(op, f"{name}.conv_bias", layer.conv_bias)


def check_arguments(
    op: str,
    slices: Sequence[Tensor],
    layers: Sequence[ConvNorm],
    chain: int,
    activation: str,
    residual: bool,
) -> None:
    """Raise for any argument that does not fit, in the wording of the op that would find it.

    Args:
        slices, layers: as the convolutions get them, autocast applied.
        chain: how many of the layers are the branch; one that is left is the shortcut.
        residual: whether there is a shortcut.
    """
    check_activation(activation)
    x = slices[0]
    check_input(op, x)
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"{op} expects an input of size (N, C, *spatial) with 1 to 3 spatial dimensions, but "
            f"got size {list(x.shape)}"
        )
    channels = sum(t.size(1) for t in slices)
    size = shortcut = (x.size(0), channels, *x.shape[2:])
    for number, layer in enumerate(layers[:chain], 1):
        size = _check_layer(f"{op}, conv{number}", size, x, layer)
    for layer in layers[chain:]:
        shortcut = _check_layer(f"{op}, shortcut", shortcut, x, layer)
    if residual and shortcut != size:
        raise RuntimeError(
            f"{op}: the shortcut should have the size {list(size)} of the branch, but has "
            f"{list(shortcut)}"
        )


def _check_layer(where: str, size: tuple[int, ...], x: Tensor, layer: ConvNorm) -> tuple[int, ...]:
    """The size of the output of a layer for an input of the given size."""
    try:
        output = check_convolution(size, x, layer)
        # A tensor of the output's size without memory: of it the size, dtype and device matter.
        c = x.new_empty(1).expand(output)
        check_norm(
            c,
            None,
            layer.weight,
            layer.bias,
            layer.running_mean,
            layer.running_var,
            layer.training,
            layer.momentum,
            layer.eps,
            "identity",
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None
    return output


def check_convolution(size: tuple[int, ...], x: Tensor, layer: ConvNorm) -> tuple[int, ...]:
    weight, bias = layer.conv_weight, layer.conv_bias
    n = len(size) - 2
    if weight.dim() != n + 2:
        raise RuntimeError(
            f"expected a {n + 2}-D conv_weight for a {n + 2}-D input, but got size "
            f"{list(weight.shape)}"
        )
    kernel = tuple(weight.shape[2:])
    stride, dilation = size_tuple(layer.stride, n), size_tuple(layer.dilation, n)
    padding = paddings_of(layer.padding, kernel, dilation)
    if isinstance(layer.padding, str) and layer.padding not in ("valid", "same"):
        raise ValueError(f"padding must be numbers, 'valid' or 'same', but got {layer.padding!r}")
    for setting, numbers in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        if numbers is not None and len(numbers) != n:
            raise RuntimeError(f"expected {setting} of {n} numbers, but got {list(numbers)}")
    if min(stride) <= 0:
        raise RuntimeError("non-positive stride is not supported")
    if padding is not None and min(padding) < 0:
        raise RuntimeError("negative padding is not supported")
    if min(dilation) <= 0:
        raise RuntimeError("dilation should be greater than zero")
    if layer.groups <= 0:
        raise RuntimeError("non-positive groups is not supported")
    if weight.size(1) * layer.groups != size[1] or weight.size(0) % layer.groups:
        raise RuntimeError(
            f"Given groups={layer.groups}, weight of size {list(weight.shape)}, expected input"
            f"{list(size)} to have {weight.size(1) * layer.groups} channels, but got {size[1]} "
            "channels instead"
        )
    for what, t in (("conv_weight", weight), ("conv_bias", bias)):
        if t is not None and t.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but input is on {x.device} and "
                f"{what} is on {t.device}"
            )
        if t is not None and t.dtype != x.dtype:
            raise RuntimeError(
                f"input and {what} should have one dtype, but got {x.dtype} and {t.dtype}"
            )
    if bias is not None and tuple(bias.shape) != (weight.size(0),):
        raise RuntimeError(
            f"Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional with "
            f"{weight.size(0)} elements, but got bias of size {list(bias.shape)} instead"
        )
    if padding is None:  # "same", of an even kernel
        return (size[0], weight.size(0), *size[2:])
    spans = zip(size[2:], kernel, stride, padding, dilation, strict=True)
    spatial = [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in spans]
    if min(spatial) < 1:
        padded = " x ".join(str(s + 2 * p) for s, p in zip(size[2:], padding, strict=True))
        reach = " x ".join(str(d * (k - 1) + 1) for k, d in zip(kernel, dilation, strict=True))
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded}). Kernel size: ({reach}). Kernel "
            "size can't be greater than actual input size"
        )
    return (size[0], weight.size(0), *spatial)
