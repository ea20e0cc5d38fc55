"""The two passes over a block of convolutions, and what is kept between them.

A block is a chain of convolutions, each followed by a batch norm and an activation, and, if it is
residual, a join with its shortcut. Kept are the raw outputs of the convolutions, the statistics and
one bit per element of the join. The normalised activations between the convolutions are computed
again in the backward pass, on load by a convolution with a prologue, else into a workspace
(docs/math/bottleneck.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import batch_norm as norm_formulas
from ..reference.activation import SMOOTH_ACTIVATIONS
from ..reference.conv_bn_act import convolution
from . import convolution as phases
from .convolution import Geometry, Input, Norm

LAYER_TENSORS = 6  # the first fields of a layer
_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)


class Layer(NamedTuple):
    """A convolution and its norm inside the Function: ConvNorm, its geometry resolved."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float
    geometry: Geometry


def autocast(t: Any, dtype: torch.dtype | None) -> Any:
    """What autocast to ``dtype`` makes of an argument of a convolution."""
    return t if t is None or dtype is None or t.dtype not in _CASTABLE else t.to(dtype)


class Call(NamedTuple):
    """What a call depends on beside its tensors; kept for the backward pass."""

    backend: str
    convolutions: str
    activation: str
    negative_slope: float
    recompute: bool
    # of each layer, the shortcut last: training, momentum, eps, geometry
    settings: tuple[tuple[Any, ...], ...]
    projection: bool  # the shortcut is a convolution, not the identity
    residual: bool = True  # there is a shortcut
    # Of the convolutions under autocast. Their weights are kept as they are and cast in each pass.
    dtype: torch.dtype | None = None

    def act(self) -> tuple[str, float]:
        """The activation and its slope."""
        return self.activation, self.negative_slope

    def layers(self, tensors: Sequence[Any]) -> tuple[list[Layer], Layer | None]:
        """The chain and the shortcut, of the flat tensors of all layers."""
        layers = [
            Layer(*tensors[i * LAYER_TENSORS : (i + 1) * LAYER_TENSORS], *settings)
            for i, settings in enumerate(self.settings)
        ]
        layers = [
            layer._replace(
                conv_weight=autocast(layer.conv_weight, self.dtype),
                conv_bias=autocast(layer.conv_bias, self.dtype),
            )
            for layer in layers
        ]
        return (layers[:-1], layers[-1]) if self.projection else (layers, None)


class Normalised(NamedTuple):
    """A raw output of a convolution and the statistics that its norm used.

    ``c`` is None where it is computed again in the backward pass.
    """

    c: Any
    mean: Tensor
    invstd: Tensor


# ---- forward ------------------------------------------------------------------------------------


def convolve(input: Input, layer: Layer, call: Call, statistics: bool) -> Any:
    """The raw output of the layer's convolution, and its statistics where those cost nothing."""
    conv = (layer.conv_weight, layer.conv_bias, layer.geometry)
    return phases.forward(input, *conv, call.backend, call.convolutions, statistics)


def _update_running_statistics(layer: Layer, mean: Tensor, var: Tensor, count: int) -> None:
    """As batch_norm_forward does it inside the op."""
    if layer.running_mean is None or layer.running_var is None:
        return
    unbiased = var * (count / max(count - 1, 1))
    for running, batch in ((layer.running_mean, mean), (layer.running_var, unbiased)):
        updated = (1 - layer.momentum) * running.to(batch.dtype) + layer.momentum * batch
        running.data.copy_(updated)  # .data: as in torch the version counter is not bumped


def statistics_of(
    layer: Layer, c: Tensor, known: tuple[Tensor, Tensor] | None, call: Call
) -> Normalised:
    """Mean and invstd of the norm without its output; the running statistics are updated.

    Args:
        known: mean and variance of ``c``, where its convolution computed them.
    """
    if layer.training:
        mean, var = (
            phases.NAMESPACES[call.backend].batch_norm_statistics(c) if known is None else known
        )
        _update_running_statistics(layer, mean, var, phases.count_of(c))
    else:
        assert layer.running_mean is not None and layer.running_var is not None
        wide = torch.promote_types(c.dtype, torch.float32)
        mean, var = layer.running_mean.to(wide, copy=True), layer.running_var.to(wide)
    return Normalised(c, mean, torch.rsqrt(var + layer.eps))


def normalise(
    layer: Layer,
    c: Tensor,
    known: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    activation: str,
    call: Call,
) -> tuple[Normalised, Tensor, Tensor]:
    """The statistics, act( norm(c) [+ residual] ) and its mask."""
    ops = phases.NAMESPACES[call.backend]
    affine, act = (layer.weight, layer.bias), (activation, call.negative_slope)
    if known is not None:
        found = statistics_of(layer, c, known, call)
        y, mask = ops.batch_norm_apply(c, residual, *affine, found.mean, found.invstd, *act)
        return found, y, mask
    running = (layer.running_mean, layer.running_var)
    settings = (layer.training, layer.momentum, layer.eps)
    y, mean, invstd, mask = ops.batch_norm_forward(c, residual, *affine, *running, *settings, *act)
    return Normalised(c, mean, invstd), y, mask


def is_normalised_on_load(c: Tensor, layer: Layer, call: Call) -> bool:
    """Whether the convolution of ``layer`` takes the norm of ``c`` as its prologue."""
    how = (call.backend, call.convolutions)
    chosen = phases.choose("forward", *how, c, layer.conv_weight, layer.geometry, True)
    return chosen == phases.FUSED


def as_input(layer: Layer, found: Normalised, call: Call, value: Tensor | None = None) -> Input:
    """What the convolution after ``layer`` takes."""
    statistics = (found.mean, found.invstd)
    norm = Norm(layer.weight, layer.bias, *statistics, call.activation, call.negative_slope)
    return Input(found.c, norm, value)


def forward(
    call: Call, slices: Sequence[Tensor], tensors: Sequence[Any]
) -> tuple[Tensor, Tensor, list[Normalised]]:
    """y, the mask of the join, and what was found at each layer, the shortcut's last.

    Args:
        slices: x, or several tensors that are x side by side along the channels.
    """
    chain, shortcut = call.layers(tensors)
    results = []
    input = block_input = Input(slices)
    for layer, following in itertools.pairwise(chain):
        c, known = convolve(input, layer, call, layer.training)
        if is_normalised_on_load(c, following, call):
            found, value = statistics_of(layer, c, known, call), None
        else:
            found, value, _ = normalise(layer, c, known, None, call.activation, call)
        results.append(found)
        input = as_input(layer, found, call, value)
    residual, projected = block_input.x if call.residual else None, None
    if shortcut is not None:
        c, known = convolve(block_input, shortcut, call, shortcut.training)
        projected, residual, _ = normalise(shortcut, c, known, None, "identity", call)
    c, known = convolve(input, chain[-1], call, chain[-1].training)
    joined, y, mask = normalise(chain[-1], c, known, residual, call.activation, call)
    results.append(joined)
    if projected is not None:
        results.append(projected)
    return y, mask, results


# ---- backward -----------------------------------------------------------------------------------


def norm_after_sums(
    layer: Layer,
    found: Normalised,
    g: Tensor,
    sums: tuple[Tensor, Tensor],
    needed: tuple[bool, bool],
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of c, weight and bias of a norm behind whose activation a kernel went already.

    Args:
        g: gradient before the activation.
        sums: sum(g) and sum(g * xhat) per channel.
        needed: whether weight and bias have a gradient.
    """
    means: tuple[Tensor | None, ...] = (None, None)
    if layer.training:
        means = tuple(total / phases.count_of(g) for total in sums)
    affine = (layer.weight, layer.bias, found.mean, found.invstd)
    grad_c: Tensor = phases.NAMESPACES[backend].batch_norm_backward_apply(
        g, found.c, None, None, *affine, *means, "identity", 0.0, True, False
    )[0]
    grad_weight, grad_bias = (
        total.to(parameter.dtype) if need and parameter is not None else None
        for parameter, total, need in zip(affine[:2], reversed(sums), needed, strict=True)
    )
    return grad_c, grad_weight, grad_bias


class Gradients:
    """The backward pass of one call: what was saved, and the gradients found so far."""

    def __init__(
        self,
        call: Call,
        slices: Sequence[Tensor],
        tensors: Sequence[Any],
        found: list[Normalised],
        needs: Sequence[bool],
    ) -> None:
        """``needs`` is for x, all ``slices`` of it, and then for each of ``tensors``."""
        self.call, self.input, self.found = call, Input(slices), found
        self.chain, self.shortcut = call.layers(tensors)
        self.tensors = tensors
        self.ops = phases.NAMESPACES[call.backend]
        self.needs_x, self.needs = needs[0], needs[1:]
        self.grad_x: Tensor | None = None
        self.grads: list[Tensor | None] = [None] * len(tensors)
        pairs = zip(self.chain[:-1], found, strict=False)
        self.inputs = [self.input, *(as_input(layer, result, call) for layer, result in pairs)]

    def _needed(self, layer: int) -> tuple[bool, bool, bool, bool]:
        """Whether conv_weight, conv_bias, weight and bias of a layer have a gradient."""
        conv_weight, conv_bias, _, _, weight, bias = self.needs[layer * LAYER_TENSORS :][
            :LAYER_TENSORS
        ]
        return conv_weight, conv_bias, weight, bias

    def _keep(self, layer: int, **grads: Tensor | None) -> None:
        for name, grad in grads.items():
            index = layer * LAYER_TENSORS + Layer._fields.index(name)
            self.grads[index] = None if grad is None else grad.to(self.tensors[index].dtype)

    def _reaches(self, layer: int) -> bool:
        """Whether a gradient is needed before a layer of the chain."""
        return self.needs_x or any(self.needs[: layer * LAYER_TENSORS])

    def _norm(
        self,
        index: int,
        grad_y: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: str,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        """Through act( norm(c) [+ residual] ): gradients of c and of the residual, if wanted."""
        layer, found = [*self.chain, self.shortcut][index], self.found[index]
        assert layer is not None
        needed = self._needed(index)[2:]
        grad_c, grad_residual, grad_weight, grad_bias = self.ops.batch_norm_backward(
            grad_y,
            found.c,
            residual,
            mask,
            layer.weight,
            layer.bias,
            found.mean,
            found.invstd,
            layer.training,
            activation,
            self.call.negative_slope,
            [*wanted, *needed],
        )
        self._keep(
            index,
            weight=grad_weight if needed[0] else None,
            bias=grad_bias if needed[1] else None,
        )
        return grad_c, grad_residual

    def _norm_after_sums(self, index: int, g: Tensor, sums: tuple[Tensor, Tensor]) -> Tensor:
        """The same where the convolution's kernel went through the activation and left the sums."""
        needed = self._needed(index)[2:]
        found = self.found[index]
        grad_c, weight, bias = norm_after_sums(
            self.chain[index], found, g, sums, needed, self.call.backend
        )
        self._keep(index, weight=weight, bias=bias)
        return grad_c

    def _weight(self, index: int, layer: Layer, input: Input, grad_c: Tensor) -> None:
        conv = (layer.conv_weight, layer.conv_bias, layer.geometry)
        how = (self.call.backend, self.call.convolutions)
        needed = self._needed(index)[:2]
        grads = phases.backward_weight(grad_c, input, *conv, *how, needed)
        self._keep(index, conv_weight=grads[0], conv_bias=grads[1])

    def _data(
        self, layer: Layer, input: Input, grad_c: Tensor, addend: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        conv = (layer.conv_weight, layer.geometry, self.call.backend, self.call.convolutions)
        return phases.backward_data(grad_c, input, *conv, addend)

    def _computed_again(self, index: int, layer: Layer, input: Input) -> None:
        if self.found[index].c is None:
            c, _ = convolve(input, layer, self.call, False)
            self.found[index] = self.found[index]._replace(c=c)

    def _residual(self) -> Tensor | None:
        """The shortcut's output, where the activation's derivative depends on it."""
        if not self.call.residual or self.call.activation not in SMOOTH_ACTIVATIONS:
            return None
        if self.shortcut is None:
            return self.input.x
        layer, found = self.shortcut, self.found[-1]
        norm = Norm(layer.weight, layer.bias, found.mean, found.invstd, "identity", 0.0)
        return Input(found.c, norm).value(self.call.backend)

    def run(self, grad_y: Tensor, mask: Tensor) -> None:
        """From the join, through the shortcut, down the chain."""
        last = len(self.chain) - 1
        self._computed_again(last, self.chain[last], self.inputs[last])
        if self.shortcut is not None:
            self._computed_again(last + 1, self.shortcut, self.input)
        activation = self.call.activation
        through_shortcut = self.call.residual and (
            self.needs_x or any(self.needs[(last + 1) * LAYER_TENSORS :])
        )
        # Without an activation the residual's gradient is grad_y: no kernel writes a copy.
        copied = through_shortcut and activation != "identity"
        wanted = (self._wants_conv(last), copied)
        residual = self._residual()
        grad_c, grad_residual = self._norm(last, grad_y, residual, mask, activation, wanted)
        if through_shortcut and not copied:
            grad_residual = grad_y
        del residual
        addend = self._shortcut(grad_residual) if through_shortcut else None
        for index in range(last, -1, -1):
            if not self._wants_conv(index):
                return
            layer, input = self.chain[index], self.inputs[index]
            self._weight(index, layer, input, grad_c)
            self.inputs[index] = input.without_value()
            if not self._reaches(index):
                return
            g, sums = self._data(layer, input, grad_c, addend if index == 0 else None)
            if index == 0:
                self.grad_x = g
            elif sums is not None:
                grad_c = self._norm_after_sums(index - 1, g, sums)
            else:
                wanted = (self._wants_conv(index - 1), False)
                grad_c, _ = self._norm(index - 1, g, None, None, activation, wanted)

    def _wants_conv(self, index: int) -> bool:
        """Whether the gradient of the raw output of a layer of the chain is needed."""
        return self._reaches(index) or any(self._needed(index)[:2])

    def _shortcut(self, grad_residual: Tensor) -> Tensor | None:
        """Gradient of x through the shortcut, if needed."""
        if self.shortcut is None:
            return grad_residual
        index, layer, input = len(self.chain), self.shortcut, self.input
        wants_conv = self.needs_x or any(self._needed(index)[:2])
        grad_c, _ = self._norm(index, grad_residual, None, None, "identity", (wants_conv, False))
        if wants_conv:
            self._weight(index, layer, input, grad_c)
        return self._data(layer, input, grad_c, None)[0] if self.needs_x else None


def differentiable_norm(
    c: Tensor,
    layer: Layer,
    found: Normalised,
    residual: Tensor | None,
    activation: str,
    slope: float,
) -> Tensor:
    """act( norm(c) [+ residual] ) in operations that autograd can follow."""
    mean, invstd = found.mean, found.invstd
    if layer.training:
        mean, var = norm_formulas.batch_norm_statistics(c)
        invstd = torch.rsqrt(var + layer.eps)
    affine = (layer.weight, layer.bias, mean, invstd)
    return norm_formulas.batch_norm_apply(c, residual, *affine, activation, slope)[0]


def backward_formulas(
    call: Call,
    slices: Sequence[Tensor],
    tensors: Sequence[Any],
    found: list[Normalised],
    needs: Sequence[bool],
    grad_y: Tensor,
) -> list[Tensor | None]:
    """Gradients of all slices of x and of all tensors, in operations that autograd can follow.

    ``needs`` is for each of these.

    The block is computed again from views of its inputs: so one of them may depend on another.
    """
    with torch.enable_grad():
        inputs = [*slices, *tensors]
        views = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        chain, shortcut = call.layers(views[len(slices) :])
        act = (call.activation, call.negative_slope)

        def normalised(
            layer: Layer, t: Tensor, result: Normalised, residual: Tensor | None, *act: Any
        ) -> Tensor:
            c = convolution(t, layer.conv_weight, layer.conv_bias, *layer.geometry)
            return differentiable_norm(c, layer, result, residual, *act)

        y = views[0] if len(slices) == 1 else torch.cat(views[: len(slices)], 1)
        residual = y if call.residual else None
        if shortcut is not None:
            residual = normalised(shortcut, y, found[-1], None, "identity", 0.0)
        for layer, result in zip(chain[:-1], found, strict=False):
            y = normalised(layer, y, result, None, *act)
        y = normalised(chain[-1], y, found[len(chain) - 1], residual, *act)
        wanted = [view for view, need in zip(views, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return [next(grads) if need else None for need in needs]
