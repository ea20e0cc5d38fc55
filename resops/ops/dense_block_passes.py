"""The two passes over a dense block, and what is kept between them.

All channels of a block are in one channels-last buffer. A channel's statistics are computed when it
is written; each norm that reads it, a consumer, is applied into a workspace that all of them share.
Backward, the consumers add to one sum, from which a channel's gradient is made when all of its
consumers are through (docs/math/dense_block.md).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _magnitude
from ..reference.dense_block import DenseLayer, NormConv
from . import convolution as phases
from . import residual_block_passes as block
from .conv_bn_act import conv_bn_act
from .conv_bn_act_convolution import convolution
from .convolution import Geometry, Input, Norm
from .residual_block_passes import Layer, Normalised

NORM_TENSORS = 5  # the first fields of a NormConv
_WEIGHT, _BIAS, _CONV_WEIGHT = 2, 3, 4  # of these, those with a gradient
_LAYER_TENSORS = 2 * NORM_TENSORS


class Call(NamedTuple):
    """What a call depends on beside its tensors; kept for the backward pass."""

    inner: block.Call  # of the convolutions, and of the norm between the two of a layer
    drop_rate: float
    accumulate_in_float32: bool
    settings: tuple[tuple[Any, ...], ...]  # of each NormConv: training, momentum, eps
    transition: bool  # the last of them

    def parts(self, tensors: Sequence[Any]) -> tuple[list[DenseLayer], NormConv | None]:
        """The layers and the transition, of the flat tensors of all of them."""
        parts = [
            NormConv(*tensors[i * NORM_TENSORS : (i + 1) * NORM_TENSORS], *settings)
            for i, settings in enumerate(self.settings)
        ]
        transition = parts.pop() if self.transition else None
        return [DenseLayer(*parts[i : i + 2]) for i in range(0, len(parts), 2)], transition


class Saved(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    buffer: Tensor
    # Mean and invstd: of the batch, for all channels; or running ones, for each consumer.
    statistics: list[tuple[Tensor, Tensor]]
    found: list[Normalised]  # of each layer, the raw output of conv1
    dropout: list[Tensor | None]  # of each layer, where values were kept

    def consumer(self, index: int, channels: int, training: bool) -> tuple[Tensor, Tensor]:
        """Mean and invstd of the norm of a layer or, behind them, of the transition."""
        if not training:
            return self.statistics[index]
        mean, invstd = self.statistics[0]
        return mean[:channels], invstd[:channels]

    def flat(self) -> list[Tensor | None]:
        """As one list, for autograd."""
        statistics = itertools.chain.from_iterable(self.statistics)
        found = itertools.chain.from_iterable(self.found)
        return [self.buffer, *self.dropout, *found, *statistics]

    @staticmethod
    def of(tensors: Sequence[Any], layers: int) -> Saved:
        """Again from the list."""
        buffer, dropout, rest = tensors[0], tensors[1 : layers + 1], tensors[layers + 1 :]
        found = [Normalised(*rest[i : i + 3]) for i in range(0, 3 * layers, 3)]
        rest = rest[3 * layers :]
        statistics = [(rest[i], rest[i + 1]) for i in range(0, len(rest), 2)]
        return Saved(buffer, statistics, found, list(dropout))


def _geometry(part: NormConv) -> Geometry:
    return Geometry((1, 1), part.padding, (1, 1), 1)


def _layer(conv: NormConv, norm: NormConv) -> Layer:
    """A convolution and a norm, as residual blocks have them."""
    weight = conv.conv_weight
    return Layer(weight, None, *norm[:4], norm.training, norm.momentum, norm.eps, _geometry(conv))


class _Workspace:
    """Memory for a tensor of up to C channels like the buffer, used again and again."""

    def __init__(self, buffer: Tensor, channels: int) -> None:
        self._size = (buffer.size(0), *buffer.shape[2:])
        self._memory = buffer.new_empty(self._size[0] * self._size[1] * self._size[2] * channels)

    def view(self, channels: int) -> Tensor:
        """(N, channels, H, W), channels-last."""
        count = self._size[0] * self._size[1] * self._size[2] * channels
        return self._memory[:count].view(*self._size, channels).permute(0, 3, 1, 2)


def _empty(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Channels-last, of the size of ``x`` but for the channels."""
    size = (x.size(0), channels, *x.shape[2:])
    return torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _widest(x: Tensor, layers: Sequence[DenseLayer], transition: NormConv | None) -> int:
    """Channels that the last consumer reads."""
    new = [layer.conv2.conv_weight.size(0) for layer in layers]
    return x.size(1) + sum(new if transition is not None else new[:-1])


def _read(
    phase: str,
    call: block.Call,
    consumer: NormConv,
    x: Tensor,
    statistics: tuple[Tensor, Tensor],
    apply: Callable[[], Tensor],
) -> Input:
    """What a phase of a consumer's convolution takes: ``x``, channels of the buffer, normalised on
    load where that was measured to be faster; else what ``apply`` writes."""
    how = (call.backend, call.convolutions)
    conv = (consumer.conv_weight, _geometry(consumer))
    if phases.choose(phase, *how, x, *conv, True) == phases.FUSED:
        return Input(x, Norm(consumer.weight, consumer.bias, *statistics, "relu", 0.0))
    return Input(apply())


def _is_one_kernel(conv: NormConv, buffer: Tensor, call: block.Call) -> bool:
    """Whether a consumer and the convolution behind it are one native kernel."""
    outputs, _, *size = conv.conv_weight.shape
    native = call.backend == "native" and call.convolutions != phases.LIBRARY
    in_float32 = buffer.dtype == conv.conv_weight.dtype == torch.float32
    of_cpu = native and in_float32 and buffer.device.type == "cpu"
    return of_cpu and size == [1, 1] and outputs % 16 == 0


# ---- forward ------------------------------------------------------------------------------------


class _Statistics:
    """Mean and invstd of the buffer's channels, each computed once; or those of each consumer."""

    def __init__(self, consumers: Sequence[NormConv], channels: int, buffer: Tensor) -> None:
        self.consumers = consumers
        self.training = consumers[0].training
        self.dtype = torch.promote_types(buffer.dtype, torch.float32)
        self.known: list[tuple[Tensor, Tensor]] = []
        if self.training:
            self.var, mean, invstd = buffer.new_empty((3, channels), dtype=self.dtype).unbind()
            self.known.append((mean, invstd))
            return
        for consumer in consumers:
            assert consumer.running_mean is not None and consumer.running_var is not None
            running_var = consumer.running_var.to(self.dtype)
            invstd = torch.rsqrt(running_var + consumer.eps)
            self.known.append((consumer.running_mean.to(self.dtype, copy=True), invstd))

    def wanted(self, begin: int) -> bool:
        """Whether those of the channels from ``begin`` on have to be computed."""
        return self.training and begin < self.var.numel()

    def add(self, begin: int, mean: Tensor, var: Tensor) -> None:
        """Of the channels from ``begin`` on."""
        end = begin + mean.numel()
        means, invstds = self.known[0]
        means[begin:end] = mean
        self.var[begin:end] = var
        invstds[begin:end] = torch.rsqrt(var + self.consumers[0].eps)

    def update_running(self, count: int, ops: Any) -> None:
        """Those of all consumers at once, from the statistics of ``count`` values per channel."""
        kept = [consumer for consumer in self.consumers if consumer.running_mean is not None]
        if self.training and kept:
            means, variances = zip(*((c.running_mean, c.running_var) for c in kept), strict=True)
            momenta = [float(consumer.momentum) for consumer in kept]
            ops.dense_block_update_running(
                self.known[0][0], self.var, count, list(means), list(variances), momenta
            )


def forward(call: Call, x: Tensor, tensors: Sequence[Any]) -> tuple[Tensor, Saved]:
    """The output, and what the backward pass needs."""
    layers, transition = call.parts(tensors)
    inner = call.inner
    ops = phases.NAMESPACES[inner.backend]
    consumers = [layer.conv1 for layer in layers]
    consumers += [] if transition is None else [transition]
    buffer = x.contiguous(memory_format=torch.channels_last)
    if layers:
        channels = x.size(1) + sum(layer.conv2.conv_weight.size(0) for layer in layers)
        buffer = _empty(x, channels, x.dtype)
        buffer[:, : x.size(1)] = x
    widest = _widest(x, layers, transition)
    statistics = _Statistics(consumers, widest, buffer)
    if statistics.training:
        dense = x.contiguous(memory_format=torch.channels_last)
        statistics.add(0, *ops.batch_norm_statistics(dense))
    saved = Saved(buffer, statistics.known, [], [])
    workspace = _Workspace(buffer, widest)

    def normalised(index: int, consumer: NormConv, channels: int) -> Tensor:
        z = workspace.view(channels)
        found = saved.consumer(index, channels, statistics.training)
        ops.dense_block_apply(buffer, consumer.weight, consumer.bias, *found, z)
        return z

    begin = x.size(1)
    for index, layer in enumerate(layers):
        read = saved.consumer(index, begin, statistics.training)
        apply = functools.partial(normalised, index, layer.conv1, begin)
        c, known = _narrowed(layer, buffer, read, inner, apply)
        new, known, found = _new_channels(layer, c, known, inner, statistics.wanted(begin))
        saved.found.append(found)
        kept = None
        if call.drop_rate > 0:
            new, kept = torch.native_dropout(new, call.drop_rate, True)
            known = None
        saved.dropout.append(kept)
        if statistics.wanted(begin):
            statistics.add(begin, *(known or ops.batch_norm_statistics(new)))
        end = begin + new.size(1)
        buffer[:, begin:end] = new
        begin = end
    y = buffer
    if transition is not None:
        pooled = F.avg_pool2d(normalised(len(layers), transition, begin), 2)
        weight = transition.conv_weight
        how = (_geometry(transition), inner.backend, inner.convolutions)
        y, _ = phases.forward(Input(pooled), weight, None, *how, False)
    statistics.update_running(phases.count_of(x), ops)
    return y, saved


def _narrowed(
    layer: DenseLayer,
    buffer: Tensor,
    statistics: tuple[Tensor, Tensor],
    call: block.Call,
    apply: Callable[[], Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """conv1( relu( norm1(x) ) ), x the first channels of the buffer, and its statistics where those
    cost nothing; ``apply`` writes what is convolved."""
    conv = layer.conv1
    if _is_one_kernel(conv, buffer, call):
        affine = (conv.weight, conv.bias, *statistics)
        return torch.ops.resops.dense_block_narrow_forward(buffer, *affine, conv.conv_weight), None
    x = buffer[:, : conv.conv_weight.size(1)]
    input = _read("forward", call, conv, x, statistics, apply)
    narrow = _layer(conv, layer.conv2)
    c, known = block.convolve(input, narrow, call, narrow.training)
    return c, known


def _new_channels(
    layer: DenseLayer,
    c: Tensor,
    known: tuple[Tensor, Tensor] | None,
    call: block.Call,
    statistics: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Normalised]:
    """conv2( relu( norm2(c) ) ), its statistics where those cost nothing, and what norm2 used.

    Args:
        known: mean and variance of ``c``, where its convolution computed them.
    """
    narrow = _layer(layer.conv1, layer.conv2)
    weight, geometry = layer.conv2.conv_weight, _geometry(layer.conv2)
    how = (call.backend, call.convolutions)
    value = None
    if phases.choose("forward", *how, c, weight, geometry, True) == phases.FUSED:
        found = block.statistics_of(narrow, c, known, call)
    else:
        found, value, _ = block.normalise(narrow, c, known, None, call.activation, call)
    input = block.as_input(narrow, found, call, value)
    new, known = phases.forward(input, weight, None, geometry, *how, statistics)
    return new, known, found


# Of a layer by its number: relu( norm2( conv1(z) ) ).
Narrow = Callable[[int, Tensor], Tensor]


class _Bound:
    """An upper bound on the values of the buffer, for convolutions whose relu must see no NaN
    (resops/_magnitude.py): new channels are read once, and not again by every consumer."""

    def __init__(self, x: Tensor, layers: int) -> None:
        self.wanted = layers > 0 and x.device.type == "cpu" and not torch.compiler.is_compiling()
        self.value = _magnitude.measure(x) if self.wanted else math.inf

    def add(self, new: Tensor) -> None:
        """Other channels."""
        if self.wanted:
            self.value = math.hypot(self.value, _magnitude.measure(new))

    def pass_on(self, consumer: NormConv, mean: Tensor, invstd: Tensor, z: Tensor) -> None:
        """To what a consumer made of the channels."""
        if self.wanted:
            scale = invstd if consumer.weight is None else invstd * consumer.weight
            largest = (mean.abs() + self.value) * scale.abs()
            if consumer.bias is not None:
                largest += consumer.bias.abs()
            _magnitude.remember(z, 1.01 * float(largest.max()))  # 1 % for rounding


def evaluate(call: Call, x: Tensor, tensors: Sequence[Any], narrow: Narrow | None) -> Tensor:
    """The output with constant statistics, where nothing is kept for a backward pass.

    Args:
        narrow: of a caller who has kept the convolutions that the norms are folded into.
    """
    if torch.is_inference_mode_enabled():
        # An inference tensor has no version counter, so no bound could be kept about it.
        with torch.inference_mode(False), torch.no_grad():
            return evaluate(call, x, tensors, narrow)
    layers, transition = call.parts(tensors)
    ops = phases.NAMESPACES[call.inner.backend]
    channels = x.size(1) + sum(layer.conv2.conv_weight.size(0) for layer in layers)
    buffer = x.contiguous(memory_format=torch.channels_last)
    if layers:
        buffer = _empty(x, channels, x.dtype)
        buffer[:, : x.size(1)] = x
    workspace = _Workspace(buffer, _widest(x, layers, transition))
    bound = _Bound(x, len(layers))

    def normalised(consumer: NormConv, channels: int) -> Tensor:
        z = workspace.view(channels)
        found = _Statistics([consumer], channels, buffer).known[0]
        ops.dense_block_apply(buffer, consumer.weight, consumer.bias, *found, z)
        if consumer is not transition:  # whose convolution sees the average
            bound.pass_on(consumer, *found, z)
        return z

    def folded(index: int, z: Tensor) -> Tensor:
        conv, norm = layers[index]
        settings = (*norm[:4], False, norm.momentum, norm.eps)
        return conv_bn_act(z, conv.conv_weight, None, *settings, padding=conv.padding)

    begin = x.size(1)
    for index, layer in enumerate(layers):
        z = (narrow or folded)(index, normalised(layer.conv1, begin))
        norm = layer.conv2
        new = convolution(z, norm.conv_weight, None, 1, norm.padding, 1, 1)
        bound.add(new)
        end = begin + new.size(1)
        buffer[:, begin:end] = new
        begin = end
    if transition is None:
        return buffer
    pooled = F.avg_pool2d(normalised(transition, begin), 2)
    return convolution(pooled, transition.conv_weight, None, 1, transition.padding, 1, 1)


# ---- backward -----------------------------------------------------------------------------------


class Gradients:
    """The backward pass of one call: what was saved, and the gradients found so far."""

    def __init__(
        self,
        call: Call,
        x_channels: int,
        tensors: Sequence[Any],
        saved: Saved,
        needs: Sequence[bool],
    ) -> None:
        """``needs`` is for ``x`` and then for each of ``tensors``."""
        self.call, self.saved = call, saved
        self.layers, self.transition = call.parts(tensors)
        self.needs_x, self.needs = needs[0], needs[1:]
        self.grad_x: Tensor | None = None
        self.grads: list[Tensor | None] = [None] * len(tensors)
        self.ops = phases.NAMESPACES[call.inner.backend]
        self.training = (self.transition or self.layers[0].conv1).training
        new = [layer.conv2.conv_weight.size(0) for layer in self.layers]
        self.offsets = list(itertools.accumulate(new, initial=x_channels))
        self.grad_y: Tensor | None = None
        # Of the channels that some consumer reads; made by the first.
        self.widest = self.offsets[-1] if self.transition is not None else self.offsets[-2]
        self.grad_sum: Tensor | None = None
        self.workspace = _Workspace(saved.buffer, self.widest)
        # sum of weight * grad_bias and of weight * grad_weight over the consumers
        statistic = saved.statistics[0][0]
        self.sums = statistic.new_zeros((2, self.widest)) if self.training else None

    def run(self, grad_y: Tensor) -> None:
        """From the transition, or from the gradient of all channels, down the layers."""
        if self.transition is None:
            self.grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        else:
            self._through_transition(self.transition, grad_y)
        for index in range(len(self.layers) - 1, -1, -1):
            if not self._reaches((index + 1) * _LAYER_TENSORS):
                return
            self._through_layer(index, self.layers[index])
        if self.needs_x:
            self.grad_x = self._slice(0, self.offsets[0])

    def _reaches(self, tensors: int) -> bool:
        """Whether x or one of the first so many tensors has a gradient."""
        return self.needs_x or any(self.needs[:tensors])

    def _keep(self, at: int, grad: Tensor | None) -> None:
        if self.needs[at]:
            self.grads[at] = grad

    def _slice(self, begin: int, end: int) -> Tensor:
        """The gradient of channels whose consumers are all through."""
        summed = self.grad_sum if begin < self.widest else None
        vectors: tuple[Tensor | None, ...] = (None,) * 4
        if self.sums is not None and summed is not None:
            mean, invstd = self.saved.statistics[0]
            count = phases.count_of(self.saved.buffer)
            vectors = (mean[begin:end], invstd[begin:end], *(self.sums[:, begin:end] / count))
        grad: Tensor = self.ops.dense_block_gradient(
            self.grad_y, self.saved.buffer, summed, *vectors, begin, end
        )
        return grad

    def _normalised(self, index: int, consumer: NormConv) -> Tensor:
        z = self.workspace.view(self.offsets[index])
        self.ops.dense_block_apply(*self._consumer(index, consumer), z)
        return z

    def _consumer(self, index: int, consumer: NormConv) -> tuple[Tensor | None, ...]:
        """The buffer, weight, bias, mean and invstd, as the phases take them."""
        statistics = self.saved.consumer(index, self.offsets[index], self.training)
        return self.saved.buffer, consumer.weight, consumer.bias, *statistics

    def _sum(self) -> tuple[Tensor, bool, bool]:
        """What consumers add to, whether they train, and whether this is the first."""
        first = self.grad_sum is None
        if self.grad_sum is None:
            buffer, wide = self.saved.buffer, self.saved.statistics[0][0].dtype
            dtype = wide if self.call.accumulate_in_float32 else buffer.dtype
            self.grad_sum = _empty(buffer, self.widest, dtype)
        return self.grad_sum, self.training, first

    def _accumulate(self, index: int, consumer: NormConv, grad_z: Tensor) -> None:
        """Adds what goes through a consumer, and keeps the gradients of its norm."""
        sums = self.ops.dense_block_accumulate(
            grad_z, *self._consumer(index, consumer), *self._sum()
        )
        self._keep_sums(index, consumer, *sums)

    def _keep_sums(
        self, index: int, consumer: NormConv, sum_grad: Tensor, sum_grad_xhat: Tensor
    ) -> None:
        """Of a consumer: for the slices of the buffer it has read, and as gradients of its norm."""
        if self.sums is not None:
            for total, part in zip(self.sums, (sum_grad, sum_grad_xhat), strict=True):
                weighted = part if consumer.weight is None else consumer.weight.to(part) * part
                total[: self.offsets[index]] += weighted
        at = index * _LAYER_TENSORS
        for parameter, place, total in (
            (consumer.weight, at + _WEIGHT, sum_grad_xhat),
            (consumer.bias, at + _BIAS, sum_grad),
        ):
            if parameter is not None:
                self._keep(place, total.to(parameter.dtype))

    def _convolution(self, part: NormConv, at: int, input: Input, grad: Tensor) -> None:
        """Keeps the gradient of a convolution's weight."""
        how = (_geometry(part), self.call.inner.backend, self.call.inner.convolutions)
        need = (self.needs[at + _CONV_WEIGHT], False)
        weight, _ = phases.backward_weight(grad, input, part.conv_weight, None, *how, need)
        self._keep(at + _CONV_WEIGHT, weight)

    def _data(
        self, part: NormConv, input: Input, grad: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        how = (_geometry(part), self.call.inner.backend, self.call.inner.convolutions)
        return phases.backward_data(grad, input, part.conv_weight, *how, None)

    def _through_transition(self, transition: NormConv, grad_y: Tensor) -> None:
        index = len(self.layers)
        at = index * _LAYER_TENSORS
        z = self._normalised(index, transition)
        pooled = Input(F.avg_pool2d(z, 2))
        self._convolution(transition, at, pooled, grad_y)
        if not self._reaches(at + _CONV_WEIGHT):
            return
        g, _ = self._data(transition, pooled, grad_y)
        window = ([2, 2], [2, 2], [0, 0], False, True, None)
        self._accumulate(index, transition, torch.ops.aten.avg_pool2d_backward(g, z, *window))

    def _through_layer(self, index: int, layer: DenseLayer) -> None:
        """conv2, its norm, conv1 and what it reads."""
        at = index * _LAYER_TENSORS
        grad = self._slice(*self.offsets[index : index + 2])
        kept = self.saved.dropout[index]
        if kept is not None:
            rate = self.call.drop_rate
            scale = 1 / (1 - rate) if rate < 1 else 0.0
            grad = torch.ops.aten.native_dropout_backward(grad, kept, scale)
        narrow, found = _layer(layer.conv1, layer.conv2), self.saved.found[index]
        input = block.as_input(narrow, found, self.call.inner)
        self._convolution(layer.conv2, at + NORM_TENSORS, input, grad)
        if not self._reaches(at + NORM_TENSORS + _CONV_WEIGHT):
            return
        g, sums = self._data(layer.conv2, input.without_value(), grad)
        del input, grad
        grad_c = self._through_norm(at + NORM_TENSORS, narrow, found, g, sums)
        if not self._reaches(at + NORM_TENSORS):
            return
        one_kernel = _is_one_kernel(layer.conv1, self.saved.buffer, self.call.inner)
        if one_kernel and self._reaches(at + _CONV_WEIGHT):
            self._through_narrow_kernel(index, layer.conv1, grad_c)
        else:
            self._through_narrow(index, layer.conv1, grad_c)

    def _through_narrow_kernel(self, index: int, conv: NormConv, grad_c: Tensor) -> None:
        """A layer's first convolution and its norm, in one kernel."""
        at = index * _LAYER_TENSORS
        of_weight = self.needs[at + _CONV_WEIGHT]
        consumer = self._consumer(index, conv)
        sum_grad, sum_grad_xhat, grad_weight = torch.ops.resops.dense_block_narrow_backward(
            grad_c, conv.conv_weight, *consumer, *self._sum(), of_weight
        )
        self._keep_sums(index, conv, sum_grad, sum_grad_xhat)
        self._keep(at + _CONV_WEIGHT, grad_weight)

    def _through_narrow(self, index: int, conv: NormConv, grad_c: Tensor) -> None:
        """The same, convolution and norm one by one."""
        at, channels = index * _LAYER_TENSORS, self.offsets[index]
        if self.needs[at + _CONV_WEIGHT]:
            x = self.saved.buffer[:, :channels]
            statistics = self.saved.consumer(index, channels, self.training)
            apply = functools.partial(self._normalised, index, conv)
            z = _read("backward_weight", self.call.inner, conv, x, statistics, apply)
            self._convolution(conv, at, z, grad_c)
        if self._reaches(at + _CONV_WEIGHT):
            # Without the norm: its gradient goes into the sum over all consumers. Of the input the
            # size matters; a slice of the buffer is no dense image, which the library would take.
            input = Input(self.workspace.view(channels))
            self._accumulate(index, conv, self._data(conv, input, grad_c)[0])

    def _through_norm(
        self,
        at: int,
        layer: Layer,
        found: Normalised,
        g: Tensor,
        sums: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Gradient of the raw output of conv1, from that of the activation behind its norm."""
        inner = self.call.inner
        needed = (self.needs[at + _WEIGHT], self.needs[at + _BIAS])
        if sums is not None:
            grads = block.norm_after_sums(layer, found, g, sums, needed, inner.backend)
        else:
            affine = (layer.weight, layer.bias, found.mean, found.invstd)
            act = (inner.activation, inner.negative_slope)
            grad_c, _, weight, bias = phases.NAMESPACES[inner.backend].batch_norm_backward(
                g, found.c, None, None, *affine, layer.training, *act, [True, False, *needed]
            )
            grads = grad_c, weight, bias
        self._keep(at + _WEIGHT, grads[1])
        self._keep(at + _BIAS, grads[2])
        return grads[0]


def backward_formulas(
    call: Call, x: Tensor, tensors: Sequence[Any], saved: Saved, needs: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of all tensors, in operations that autograd can follow.

    The block is computed again from views of its inputs: so one of them may depend on another.
    """
    with torch.enable_grad():
        inputs = [x, *tensors]
        views = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        layers, transition = call.parts(views[1:])

        def consumed(index: int, part: NormConv, features: Tensor) -> Tensor:
            statistics = saved.consumer(index, features.size(1), part.training)
            found = Normalised(features, *statistics)
            return block.differentiable_norm(features, _layer(part, part), found, None, "relu", 0.0)

        y = views[0]
        for index, layer in enumerate(layers):
            narrow = _layer(layer.conv1, layer.conv2)
            c = F.conv2d(
                consumed(index, layer.conv1, y), narrow.conv_weight, padding=layer.conv1.padding
            )
            z = block.differentiable_norm(c, narrow, saved.found[index], None, "relu", 0.0)
            new = F.conv2d(z, layer.conv2.conv_weight, padding=layer.conv2.padding)
            kept = saved.dropout[index]
            if kept is not None:
                new = new * kept / (1 - call.drop_rate) if call.drop_rate < 1 else new * kept
            y = torch.cat([y, new], 1)
        if transition is not None:
            pooled = F.avg_pool2d(consumed(len(layers), transition, y), 2)
            y = F.conv2d(pooled, transition.conv_weight, padding=transition.padding)
        wanted = [view for view, need in zip(views, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    grad_x, *rest = [next(grads) if need else None for need in needs]
    return grad_x, rest
