"""What ``bottleneck`` and ``basic_block`` are made of: one autograd Function over a whole block.

Only a Function over all of a block can choose what to save and what to compute again:
resops/ops/residual_block_passes.py has the passes, this module the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import traced_to_aten
from ..reference.conv_norm import ConvNorm
from . import convolution as phases
from .batch_norm import check_tensor
from .conv_bn_act import conv_bn_act, wants_gradient
from .conv_bn_act_phases import paddings_of, size_tuple
from .convolution import Geometry
from .residual_block_arguments import check_arguments, check_layers
from .residual_block_passes import (
    LAYER_TENSORS,
    Call,
    Gradients,
    Normalised,
    backward_formulas,
    forward,
)

_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)


class ResidualBlockFunction(torch.autograd.Function):
    """Saved: x, the parameters, raw outputs, statistics, and the mask of the join.

    The Functions of the ops are subclasses of it, for their names in an autograd graph.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *tensors: Any) -> Tensor:
        y, mask, found = forward(call, x, tensors)
        if call.recompute:
            chain = len(call.settings) - call.projection
            found = [f if i < chain - 1 else f._replace(c=None) for i, f in enumerate(found)]
        ctx.set_materialize_grads(False)
        ctx.call = call
        # Of the running statistics the backward pass has its own copies.
        kept = [None if i % LAYER_TENSORS in (2, 3) else t for i, t in enumerate(tensors)]
        ctx.save_for_backward(x, mask, *kept, *[t for result in found for t in result])
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        count = len(call.settings) * LAYER_TENSORS
        if grad_y is None:
            return (None,) * (count + 2)
        x, mask, *saved = ctx.saved_tensors
        tensors, saved = saved[:count], saved[count:]
        found = [Normalised(*saved[i : i + 3]) for i in range(0, len(saved), 3)]
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph=True
            grad_x, grads = backward_formulas(call, x, tensors, found, needs, grad_y)
        else:
            gradients = Gradients(call, x, tensors, found, needs)
            gradients.run(grad_y, mask)
            grad_x, grads = gradients.grad_x, gradients.grads
        return (None, grad_x, *grads)


# ---- the call -----------------------------------------------------------------------------------


def _resolved(layer: ConvNorm) -> Geometry | None:
    """Numbers for every dimension; None for a padding that is not the same at both ends."""
    n = layer.conv_weight.dim() - 2
    kernel = tuple(layer.conv_weight.shape[2:])
    dilation = size_tuple(layer.dilation, n)
    padding = paddings_of(layer.padding, kernel, dilation)
    if padding is None:
        return None
    return Geometry(size_tuple(layer.stride, n), padding, dilation, layer.groups)


def _cast(x: Tensor, layers: Sequence[ConvNorm]) -> tuple[Tensor, list[ConvNorm]]:
    """What autocast would do to the convolutions' arguments."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, list(layers)
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Any) -> Any:
        return t.to(dtype) if t is not None and t.dtype in _CASTABLE else t

    return cast(x), [
        layer._replace(conv_weight=cast(layer.conv_weight), conv_bias=cast(layer.conv_bias))
        for layer in layers
    ]


def _composition(
    x: Tensor,
    chain: Sequence[ConvNorm],
    shortcut: ConvNorm | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """The block as ops of its layers."""

    def apply(t: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str) -> Tensor:
        args: list[Any] = list(layer[:9])
        return conv_bn_act(
            t,
            *args,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            residual=residual,
            activation=activation,
            negative_slope=negative_slope,
        )

    y, residual = x, x
    for layer in chain[:-1]:
        y = apply(y, layer, None, activation)
    if shortcut is not None:
        residual = apply(x, shortcut, None, "identity")
    return apply(y, chain[-1], residual, activation)


def residual_block(
    function: type[ResidualBlockFunction],
    definition: Callable[..., Tensor],
    op: str,
    x: Tensor,
    chain: tuple[ConvNorm, ...],
    shortcut: ConvNorm | None,
    activation: str | None,
    negative_slope: float,
    recompute: bool,
) -> Tensor:
    """One call of a block's op.

    Args:
        function: the op's own.
        definition: the reference of the op.
        op: its name, for messages.
    """
    activation = "identity" if activation is None else activation
    layers = chain if shortcut is None else (*chain, shortcut)
    check_tensor(op, "input", x)
    check_layers(op, chain, shortcut)
    if traced_to_aten():
        return definition(x, *chain, shortcut, activation, negative_slope)
    cast_x, cast_layers = _cast(x, layers)
    check_arguments(op, cast_x, cast_layers, len(chain), activation)
    if _dispatch.get_backend() == "reference":
        return definition(x, *chain, shortcut, activation, negative_slope)
    parameters: list[Any] = [t for layer in layers for t in layer[:LAYER_TENSORS]]
    differentiated = wants_gradient(x, *parameters)
    geometries = [_resolved(layer) for layer in layers]
    backend = _dispatch.choose("batch_norm", cast_x)
    if (
        backend == "reference"
        or None in geometries
        # Evaluation without gradients folds the norms into the convolutions.
        or not (differentiated or any(layer.training for layer in layers))
        or (shortcut is None and cast_x.dtype != x.dtype)  # an addition of two dtypes
        or x.numel() == 0
    ):
        return _composition(x, chain, shortcut, activation, negative_slope)
    settings = tuple(
        (layer.training, layer.momentum, layer.eps, geometry)
        for layer, geometry in zip(layers, geometries, strict=True)
    )
    call = Call(
        backend,
        phases.wanted_convolutions(),
        activation,
        negative_slope,
        recompute,
        settings,
        shortcut is not None,
    )
    tensors = [t for layer in cast_layers for t in layer[:LAYER_TENSORS]]
    if differentiated:
        y: Tensor = function.apply(call, cast_x, *tensors)
        return y
    return forward(call, cast_x, tensors)[0]
