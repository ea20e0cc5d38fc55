"""What ``bottleneck``, ``basic_block`` and ``double_conv`` are made of: one autograd Function over
a whole block.

Only a Function over all of a block can choose what to save and what to compute again:
resops/ops/residual_block_passes.py has the passes, this module the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import PLAIN_TENSORS, traced_to_aten
from ..reference.conv_norm import ConvNorm
from . import convolution as phases
from .activation_source import Kept, Published, Recipe, Source, restored, source_of
from .conv_bn_act import conv_bn_act, wants_gradient
from .conv_bn_act_phases import paddings_of, size_tuple
from .convolution import Geometry
from .residual_block_arguments import check_arguments, check_layers, joined, side_by_side
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
    """Saved: x or its source, the parameters, raw outputs, statistics, and the mask of the join.

    The Functions of the ops are subclasses of it, for their names in an autograd graph.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, sources: Sequence[Source | None], *slices_and_tensors: Any
    ) -> Tensor:
        """Of slices of x, as many as there are sources, and the tensors of all layers."""
        slices = list(slices_and_tensors[: len(sources)])
        tensors = slices_and_tensors[len(sources) :]
        y, mask, found = forward(call, slices, tensors)
        if call.recompute:
            chain = len(call.settings) - call.projection
            found = [f if i < chain - 1 else f._replace(c=None) for i, f in enumerate(found)]
        ctx.set_materialize_grads(False)
        input = Kept.of(slices, sources)
        ctx.call, ctx.recipes, ctx.channels = call, input.recipes, [t.size(1) for t in slices]
        # Of the running statistics the backward pass has its own copies.
        kept = [None if i % LAYER_TENSORS in (2, 3) else t for i, t in enumerate(tensors)]
        ctx.save_for_backward(
            mask if call.residual else None,
            *kept,
            *[t for result in found for t in result],
            *input.tensors,
        )
        if not call.residual and not torch.compiler.is_compiling():
            last, recipe = tensors[-LAYER_TENSORS:], Recipe(call.backend, *call.act())
            ctx.published = Published(recipe, y, *found[-1], *last[4:])
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        layers, inputs = len(call.settings), len(ctx.channels)
        count = layers * LAYER_TENSORS
        if grad_y is None:
            return (None,) * (2 + inputs + count)
        mask, *saved = ctx.saved_tensors
        tensors, results = saved[:count], saved[count : count + 3 * layers]
        rest = saved[count + 3 * layers :]
        found = [Normalised(*results[i : i + 3]) for i in range(0, len(results), 3)]
        slices, needs = restored(ctx.recipes, rest), ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True
            return (None, None, *backward_formulas(call, slices, tensors, found, needs, grad_y))
        needs_x = (any(needs[:inputs]), *needs[inputs:])
        gradients = Gradients(call, slices, tensors, found, needs_x)
        gradients.run(grad_y, mask)
        grad_x = gradients.grad_x
        if inputs == 1:
            return (None, None, grad_x, *gradients.grads)
        grad_slices = [None] * inputs if grad_x is None else grad_x.split(ctx.channels, 1)
        return (None, None, *grad_slices, *gradients.grads)


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


def _cast(
    slices: Sequence[Tensor], layers: Sequence[ConvNorm]
) -> tuple[list[Tensor], list[ConvNorm]]:
    """What autocast would do to the convolutions' arguments."""
    kind = slices[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(slices), list(layers)
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Any) -> Any:
        return t.to(dtype) if t is not None and t.dtype in _CASTABLE else t

    return [cast(t) for t in slices], [
        layer._replace(conv_weight=cast(layer.conv_weight), conv_bias=cast(layer.conv_bias))
        for layer in layers
    ]


def _composition(
    x: Tensor,
    chain: Sequence[ConvNorm],
    shortcut: ConvNorm | None,
    residual_block: bool,
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

    y, residual = x, x if residual_block else None
    for layer in chain[:-1]:
        y = apply(y, layer, None, activation)
    if shortcut is not None:
        residual = apply(x, shortcut, None, "identity")
    return apply(y, chain[-1], residual, activation)


def residual_block(
    function: type[ResidualBlockFunction],
    definition: Callable[..., Tensor],
    op: str,
    input: Tensor | Sequence[Tensor],
    chain: tuple[ConvNorm, ...],
    shortcut: ConvNorm | None,
    activation: str | None,
    negative_slope: float,
    recompute: bool = False,
    residual: bool = True,
) -> Tensor:
    """One call of a block's op.

    Args:
        function: the op's own.
        definition: the reference of the op, which takes a shortcut if ``residual``.
        op: its name, for messages.
        residual: whether the block has a shortcut, which without ``shortcut`` is the identity.
    """
    activation = "identity" if activation is None else activation
    layers = chain if shortcut is None else (*chain, shortcut)
    slices = side_by_side(op, input)
    check_layers(op, chain, shortcut)
    defined = (*chain, shortcut) if residual else chain
    if traced_to_aten():
        return definition(joined(slices), *defined, activation, negative_slope)
    identity = residual and shortcut is None
    plain = all(type(t) in PLAIN_TENSORS for t in slices)
    if identity or not plain or torch.compiler.is_compiling():
        slices = [joined(slices)]
    cast_slices, cast_layers = _cast(slices, layers)
    check_arguments(op, cast_slices, cast_layers, len(chain), activation, residual)
    if _dispatch.get_backend() == "reference":
        return definition(joined(slices), *defined, activation, negative_slope)
    parameters: list[Any] = [t for layer in layers for t in layer[:LAYER_TENSORS]]
    differentiated = wants_gradient(*slices, *parameters)
    geometries = [_resolved(layer) for layer in layers]
    backend = _dispatch.choose("batch_norm", cast_slices[0])
    if (
        backend == "reference"
        or None in geometries
        # Evaluation without gradients folds the norms into the convolutions.
        or not (differentiated or any(layer.training for layer in layers))
        or (identity and cast_slices[0].dtype != slices[0].dtype)  # an addition of two dtypes
        or slices[0].numel() == 0
    ):
        x = joined(slices)
        return _composition(x, chain, shortcut, residual, activation, negative_slope)
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
        residual,
    )
    tensors = [t for layer in cast_layers for t in layer[:LAYER_TENSORS]]
    if differentiated:
        sources = [source_of(t) for t in cast_slices]
        y: Tensor = function.apply(call, sources, *cast_slices, *tensors)
        return y
    return forward(call, cast_slices, tensors)[0]
