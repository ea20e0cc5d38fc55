"""``dense_block`` and ``transition``: argument checks, autograd Function and fake kernels.

resops/ops/dense_block_passes.py has the two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _native, _triton
from .._autograd import traced_to_aten
from ..reference import dense_block as reference
from ..reference.conv_norm import ConvNorm
from ..reference.dense_block import DenseLayer, NormConv
from . import convolution as phases
from . import residual_block_passes as block
from .activation_source import StandIn
from .batch_norm import batch_norm, check_input, check_number, check_tensor
from .batch_norm import check_arguments as check_norm
from .conv_bn_act import wants_gradient
from .conv_bn_act_convolution import convolution
from .dense_block_passes import (
    NORM_TENSORS,
    Call,
    Gradients,
    Narrow,
    Saved,
    backward_formulas,
    evaluate,
    forward,
)
from .residual_block_arguments import check_convolution, joined, side_by_side

OP = "dense_block"
_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)


class DenseBlockFunction(torch.autograd.Function):
    """Saved: the buffer, the parameters, the raw outputs of the 1x1 convolutions, statistics."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, stand_in: Tensor | None, *tensors: Any) -> Tensor:
        y, saved = forward(call, x, tensors)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.x_channels = call, x.size(1)
        # Of the running statistics the backward pass has its own copies.
        kept = [None if i % NORM_TENSORS < 2 else t for i, t in enumerate(tensors)]
        ctx.save_for_backward(stand_in, *kept, *saved.flat())
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        count = len(call.settings) * NORM_TENSORS
        if grad_y is None:
            return (None,) * (count + 3)
        stand_in, *tensors = ctx.saved_tensors
        tensors, rest = tensors[:count], tensors[count:]
        saved = Saved.of(rest, (len(call.settings) - call.transition) // 2)
        needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[3:])
        if torch.is_grad_enabled():  # create_graph=True
            x = saved.buffer[:, : ctx.x_channels].detach()
            x = x if stand_in is None else x + stand_in
            grad_x, grads = backward_formulas(call, x, tensors, saved, needs, grad_y)
        else:
            gradients = Gradients(call, ctx.x_channels, tensors, saved, needs)
            gradients.run(grad_y)
            grad_x, grads = gradients.grad_x, gradients.grads
        return (None, grad_x, None, *grads)


# ---- arguments ----------------------------------------------------------------------------------


def _parts(layers: Sequence[DenseLayer], transition: NormConv | None) -> list[NormConv]:
    parts = [part for layer in layers for part in layer]
    return parts if transition is None else [*parts, transition]


def _consumers(layers: Sequence[DenseLayer], transition: NormConv | None) -> list[NormConv]:
    """The norms that read channels of the block."""
    consumers = [layer.conv1 for layer in layers]
    return consumers if transition is None else [*consumers, transition]


def _check_types(layers: Sequence[object], transition: object, drop_rate: object) -> None:
    for number, layer in enumerate(layers, 1):
        if not isinstance(layer, DenseLayer):
            kind = type(layer).__name__
            raise TypeError(f"{OP}(): layer {number} must be DenseLayer, not {kind}")
        for name, part in zip(layer._fields, layer, strict=True):
            _check_part_type(f"layer {number}, {name}", part)
    if transition is not None:
        _check_part_type("argument 'transition'", transition)
    if not layers and transition is None:
        raise ValueError(f"{OP} expects at least one layer, or a transition")
    check_number(OP, "drop_rate", drop_rate)
    assert isinstance(drop_rate, int | float)
    if not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate has to be between 0 and 1, but got {drop_rate}")


def _check_part_type(name: str, part: object) -> None:
    if not isinstance(part, NormConv):
        raise TypeError(f"{OP}(): {name} must be NormConv, not {type(part).__name__}")
    check_tensor(OP, f"{name}.conv_weight", part.conv_weight)


def _check_sizes(x: Tensor, layers: Sequence[DenseLayer], transition: NormConv | None) -> None:
    """Raise for any argument that does not fit, in the wording of the op that would find it."""
    check_input(OP, x)
    if x.dim() != 4:
        raise ValueError(
            f"{OP} expects an input of size (N, C, H, W), but got input of size {list(x.shape)}"
        )
    channels, image = x.size(1), x.shape[2:]
    for number, layer in enumerate(layers, 1):
        size = (x.size(0), channels, *image)
        for name, part in zip(layer._fields, layer, strict=True):
            size = _check_part(f"{OP}, layer {number}, {name}", size, x, part)
        channels += size[1]
    if transition is not None:
        _check_part(f"{OP}, transition", (x.size(0), channels, *image), x, transition)
        if min(image) < 2:
            raise RuntimeError(
                f"{OP}, transition: an image of {list(image)} is smaller than the 2x2 of the pool"
            )


def _check_part(where: str, size: tuple[int, ...], x: Tensor, part: NormConv) -> tuple[int, ...]:
    """The size of the output of a norm, a ReLU and a convolution for an input of ``size``."""
    try:
        # A tensor of the size without memory: of it the size, dtype and device matter.
        t = x.new_empty(1).expand(size)
        weight = part.conv_weight
        affine = (part.weight, part.bias, part.running_mean, part.running_var)
        check_norm(t, None, *affine, part.training, part.momentum, part.eps, "relu")
        if weight.dim() == 4 and 0 in (weight.size(2) % 2, weight.size(3) % 2):
            raise RuntimeError(
                f"expected a kernel of odd sizes, but got conv_weight of size {list(weight.shape)}"
            )
        padding = part.padding if weight.dim() == 4 else 0
        return check_convolution(size, x, ConvNorm(weight, None, None, None, padding=padding))
    except (RuntimeError, ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None


def fallback_reason(
    x: Tensor, layers: Sequence[DenseLayer], transition: NormConv | None = None
) -> str | None:
    """Why :func:`dense_block` would compute this layer by layer; None where it would not."""
    if transition is not None and tuple(transition.conv_weight.shape[2:]) != (1, 1):
        return "the transition's convolution is not 1x1, so that the pool cannot go before it"
    consumers = _consumers(layers, transition)
    if len({consumer.training for consumer in consumers}) > 1:
        return "some norms that read the block's channels are in training and others are not"
    if consumers[0].training and len({consumer.eps for consumer in consumers}) > 1:
        return "eps differs among the norms that read the block's channels, which share statistics"
    if _dispatch.choose("batch_norm", x) == "reference":
        return _dispatch.refusal("native", "batch_norm", x) or (
            "the backend is the reference"
            if _dispatch.get_backend() == "reference"
            else f"no kernel has been measured on {x.device.type} yet"
        )
    return "the input is empty" if x.numel() == 0 else None


# ---- the call -----------------------------------------------------------------------------------


def _cast(
    x: Tensor, layers: Sequence[DenseLayer], transition: NormConv | None
) -> tuple[Tensor, list[DenseLayer], NormConv | None]:
    """What autocast would do to the convolutions' arguments."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, list(layers), transition
    dtype = torch.get_autocast_dtype(kind)

    def cast(part: NormConv) -> NormConv:
        weight = part.conv_weight
        return part._replace(conv_weight=weight.to(dtype) if weight.dtype in _CASTABLE else weight)

    return (
        x.to(dtype) if x.dtype in _CASTABLE else x,
        [DenseLayer(*map(cast, layer)) for layer in layers],
        None if transition is None else cast(transition),
    )


def _composition(
    x: Tensor, layers: Sequence[DenseLayer], transition: NormConv | None, drop_rate: float
) -> Tensor:
    """The block as ops of its layers."""

    def normalised(t: Tensor, part: NormConv) -> Tensor:
        return batch_norm(t, *part[:4], part.training, part.momentum, part.eps)

    def convolved(t: Tensor, part: NormConv) -> Tensor:
        return convolution(t, part.conv_weight, None, 1, part.padding, 1, 1)

    features = [x]
    for layer in layers:
        t = torch.cat(features, 1)
        for part in layer:
            t = convolved(normalised(t, part), part)
        features.append(F.dropout(t, drop_rate) if drop_rate > 0 else t)
    y = torch.cat(features, 1)
    if transition is None:
        return y
    return F.avg_pool2d(convolved(normalised(y, transition), transition), 2)


def dense_block(
    input: Tensor | Sequence[Tensor],
    layers: Sequence[DenseLayer],
    transition: NormConv | None = None,
    *,
    drop_rate: float = 0.0,
    accumulate_in_float32: bool = False,
    narrow: Narrow | None = None,
) -> Tensor:
    """See :func:`resops.functional.dense_block`.

    Args:
        narrow: what :func:`resops.ops.dense_block_passes.evaluate` takes, for layers of modules.
    """
    layers = list(layers)
    x = joined(side_by_side(OP, input))
    _check_types(layers, transition, drop_rate)
    if traced_to_aten():
        return reference.dense_block(x, layers, transition, drop_rate)
    x, layers, transition = _cast(x, layers, transition)
    _check_sizes(x, layers, transition)
    if _dispatch.get_backend() == "reference":
        return reference.dense_block(x, layers, transition, drop_rate)
    if fallback_reason(x, layers, transition) is not None:
        return _composition(x, layers, transition, drop_rate)
    parts = _parts(layers, transition)
    inner = block.Call(
        _dispatch.choose("batch_norm", x),
        phases.wanted_convolutions(),
        "relu",
        0.0,
        False,
        (),
        False,
    )
    settings = tuple((part.training, part.momentum, part.eps) for part in parts)
    call = Call(inner, drop_rate, accumulate_in_float32, settings, transition is not None)
    tensors: list[Any] = [t for part in parts for t in part[:NORM_TENSORS]]
    if wants_gradient(x, *tensors):
        # A compiled backward pass has no second derivative.
        twice = x.requires_grad and not torch.compiler.is_compiling()
        stand_in = StandIn.apply(x) if twice else None
        y: Tensor = DenseBlockFunction.apply(call, x, stand_in, *tensors)
        return y
    if drop_rate == 0 and not any(part.training for part in parts):
        return evaluate(call, x, tensors, narrow)
    return forward(call, x, tensors)[0]


def transition(x: Tensor, norm_conv: NormConv) -> Tensor:
    """See :func:`resops.functional.transition`."""
    return dense_block(x, (), norm_conv)


# Fake kernels: sizes, dtypes and strides of what the compiled ops return, after the same checks.


def _new_channels_last(size: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _check_consumer(
    buffer: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor
) -> None:
    if buffer.dim() != 4:
        raise ValueError(
            f"{OP} expects a buffer of size (N, C, H, W), but got size {list(buffer.shape)}"
        )
    check_input(OP, buffer)
    channels = mean.numel()
    if channels > buffer.size(1):
        raise RuntimeError(
            f"mean should contain at most the {buffer.size(1)} channels of the buffer, but has "
            f"{channels} elements"
        )
    _check_vectors(buffer, channels, mean=mean, invstd=invstd)
    affine = {"weight": weight, "bias": bias}
    for name, t in affine.items():
        if t is not None and tuple(t.shape) != (channels,):
            raise RuntimeError(f"{name} should contain {channels} elements not {t.numel()}")


def _check_vectors(buffer: Tensor, channels: int, **vectors: Tensor) -> None:
    wanted = torch.promote_types(buffer.dtype, torch.float32)
    for name, t in vectors.items():
        if tuple(t.shape) != (channels,):
            raise RuntimeError(f"{name} should contain {channels} elements not {t.numel()}")
        if t.dtype != wanted:
            raise RuntimeError(
                f"{name} should have dtype {wanted} for an input of {buffer.dtype}, but got "
                f"{t.dtype}"
            )


def _check_images(
    name: str, t: Tensor, buffer: Tensor, channels: int, dtypes: tuple[torch.dtype, ...] = ()
) -> None:
    same = t.dim() == 4 and (t.size(0), t.shape[2:]) == (buffer.size(0), buffer.shape[2:])
    if not same:
        raise RuntimeError(
            f"{name} should have the batch and image size of the buffer, {list(buffer.shape)}, but "
            f"got {list(t.shape)}"
        )
    # A sum may have more channels than are added to.
    if t.size(1) < channels or (not dtypes and t.size(1) != channels):
        raise RuntimeError(f"{name} should have {channels} channels, but got size {list(t.shape)}")
    if t.dtype not in (buffer.dtype, *dtypes):
        raise RuntimeError(
            f"{name} should have the dtype {buffer.dtype} of the buffer, got {t.dtype}"
        )


def _fake_apply(
    buffer: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    y: Tensor,
) -> None:
    _check_consumer(buffer, weight, bias, mean, invstd)
    _check_images("y", y, buffer, mean.numel())


def _fake_accumulate(
    grad_y: Tensor,
    buffer: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    grad_sum: Tensor,
    training: bool,
    first: bool,
) -> tuple[Tensor, Tensor]:
    _check_consumer(buffer, weight, bias, mean, invstd)
    _check_images("grad_y", grad_y, buffer, mean.numel())
    _check_images("grad_sum", grad_sum, buffer, mean.numel(), (mean.dtype,))
    return torch.empty_like(mean), torch.empty_like(mean)


def _check_narrow(buffer: Tensor, channels: int, conv_weight: Tensor) -> None:
    if not buffer.dtype == conv_weight.dtype == torch.float32:
        raise RuntimeError(
            f"dense_block_narrow expects float32, but got {buffer.dtype} and {conv_weight.dtype}"
        )
    size = tuple(conv_weight.shape)
    if len(size) != 4 or size[0] % 16 or min(size) < 1 or size[1:] != (channels, 1, 1):
        raise RuntimeError(
            f"conv_weight should be of size (16 n, {channels}, 1, 1), but got size {list(size)}"
        )


def _fake_narrow_forward(
    buffer: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    conv_weight: Tensor,
) -> Tensor:
    _check_consumer(buffer, weight, bias, mean, invstd)
    _check_narrow(buffer, mean.numel(), conv_weight)
    return _new_channels_last((buffer.size(0), conv_weight.size(0), *buffer.shape[2:]), buffer)


def _fake_narrow_backward(
    grad_c: Tensor,
    conv_weight: Tensor,
    buffer: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    grad_sum: Tensor,
    training: bool,
    first: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_consumer(buffer, weight, bias, mean, invstd)
    _check_narrow(buffer, mean.numel(), conv_weight)
    _check_images("grad_c", grad_c, buffer, conv_weight.size(0))
    _check_images("grad_sum", grad_sum, buffer, mean.numel(), (mean.dtype,))
    size = tuple(conv_weight.shape)
    grad_weight = _new_channels_last(size, buffer) if of_weight else grad_c.new_empty(0)
    return torch.empty_like(mean), torch.empty_like(mean), grad_weight


def _fake_gradient(
    grad_y: Tensor | None,
    buffer: Tensor,
    grad_sum: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    mean_grad: Tensor | None,
    mean_grad_xhat: Tensor | None,
    begin: int,
    end: int,
) -> Tensor:
    if not 0 <= begin <= end <= buffer.size(1):
        raise RuntimeError(
            f"channels [{begin}, {end}) should lie in the buffer of size {list(buffer.shape)}"
        )
    if grad_y is not None:
        _check_images("grad_y", grad_y, buffer, buffer.size(1))
    if grad_sum is not None:
        wide = torch.promote_types(buffer.dtype, torch.float32)
        _check_images("grad_sum", grad_sum, buffer, end, (wide,))
    vectors = {
        "mean": mean,
        "invstd": invstd,
        "mean_grad": mean_grad,
        "mean_grad_xhat": mean_grad_xhat,
    }
    given = {name: t for name, t in vectors.items() if t is not None}
    if given and (len(given) < len(vectors) or grad_sum is None):
        raise RuntimeError(
            "mean, invstd, mean_grad and mean_grad_xhat should be given together, with grad_sum, "
            "or not at all"
        )
    _check_vectors(buffer, end - begin, **given)
    return _new_channels_last((buffer.size(0), end - begin, *buffer.shape[2:]), buffer)


def _fake_update_running(
    mean: Tensor,
    var: Tensor,
    count: int,
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    momenta: Sequence[float],
) -> None:
    _check_vectors(mean, mean.numel(), mean=mean, var=var)
    if not len(running_means) == len(running_vars) == len(momenta):
        raise RuntimeError(
            "running_means, running_vars and momenta should be as many, but got "
            f"{len(running_means)}, {len(running_vars)} and {len(momenta)}"
        )
    half: torch.dtype | None = None
    for running_mean, running_var in zip(running_means, running_vars, strict=True):
        channels = running_mean.numel()
        if channels > mean.numel():
            raise RuntimeError(
                f"running_means should have at most the {mean.numel()} elements of mean, but got "
                f"{channels}"
            )
        for name, t in (("running_means", running_mean), ("running_vars", running_var)):
            if t.numel() != channels:
                raise RuntimeError(f"{name} should contain {channels} elements not {t.numel()}")
            if t.dtype == mean.dtype:
                continue
            half = half or t.dtype
            if t.dtype != half or half not in (torch.float16, torch.bfloat16):
                raise RuntimeError(
                    f"mixed dtype: expect {name} to have dtype {mean.dtype}, but got {t.dtype}"
                )


# Of each phase the fake kernel, and which arguments it writes to.
_FAKES: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "apply": (_fake_apply, ("y",)),
    "accumulate": (_fake_accumulate, ("grad_sum",)),
    "gradient": (_fake_gradient, ()),
    "update_running": (_fake_update_running, ()),
}
for _phase, (_fake, _writes) in _FAKES.items():
    if _native.module is not None:
        torch.library.register_fake(f"resops::{OP}_{_phase}", _fake)
    _triton.register(OP, _phase, getattr(reference, f"{OP}_{_phase}"), _fake, _writes)
# The native backend's alone.
if _native.module is not None:
    torch.library.register_fake("resops::dense_block_narrow_forward", _fake_narrow_forward)
    torch.library.register_fake("resops::dense_block_narrow_backward", _fake_narrow_backward)
