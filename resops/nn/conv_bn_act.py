"""Convolution, norm and activation as one layer, folded into one convolution in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import conv_bn_act as ops
from ..reference.activation import activate
from . import observer
from .batch_norm import (
    BatchNormAct,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    NormAct,
    is_plain,
    makes_norm_act,
)
from .batch_norm_variants import BatchRenormAct2d, GhostBatchNormAct2d
from .sync_batch_norm import SyncBatchNormAct

_PAIRS: dict[type[nn.Module], type[BatchNormAct]] = {
    nn.Conv1d: BatchNormAct1d,
    nn.Conv2d: BatchNormAct2d,
    nn.Conv3d: BatchNormAct3d,
}


def conv_norm_act(
    conv: nn.Module,
    norm: nn.Module,
    x: Tensor | Sequence[Tensor],
    residual: Tensor | None = None,
) -> Tensor:
    """``norm(conv(x), residual)``, as one convolution where that gives the same.

    That is in evaluation, without gradients, for nn.Conv1d to nn.Conv3d and the batch norm that
    goes with it, themselves and not subclasses, without hooks, on a CPU or a GPU. What was folded
    is kept on ``norm`` until one of the tensors or settings that went into it changes. (A change is
    seen in versions, addresses and values. One is not seen: a write through ``.data`` to a few
    values of ``conv.weight``. ``norm.eval()`` makes it seen.)

    Args:
        conv: its output goes to ``norm`` and nowhere else.
        norm: any layer; one that is called with a residual takes it as its second argument.
        x: (N, C_in, *spatial); or several such, side by side along the channels, which are not
            concatenated in training where the convolution's kernels take slices.
        residual: like the output; added before the activation.

    Returns:
        (N, C, *spatial of the output).
    """
    if not norm.training and may_fold(conv, norm):
        x = _joined(x)
        assert isinstance(norm, BatchNormAct)
        activation, negative_slope, rest = norm.epilogue()
        if len(rest) < 2:
            y = folded_conv(conv, norm, norm, x, residual, activation, negative_slope)
            if y is not None:
                _tell(conv, norm, x, folded=True)
                return rest[0](y) if rest else y
    _tell(conv, norm, x, folded=False)
    y = convolve(conv, x)
    normalised: Tensor = norm(y) if residual is None else norm(y, residual)
    return normalised


def _tell(conv: nn.Module, norm: nn.Module, x: Tensor | Sequence[Tensor], folded: bool) -> None:
    if observer.listening():
        observer.tell(observer.ConvNormCall(conv, norm, folded), "", _joined(x))


def _joined(x: Tensor | Sequence[Tensor]) -> Tensor:
    return x if isinstance(x, Tensor) else torch.cat(list(x), 1)


def convolve(conv: nn.Module, x: Tensor | Sequence[Tensor]) -> Tensor:
    """``conv(x)``; of an nn.Conv2d itself, without hooks, by the faster convolution."""
    if type(conv) is not nn.Conv2d or not is_plain(conv) or conv.padding_mode != "zeros":
        y: Tensor = conv(_joined(x))
        return y
    settings = conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    if isinstance(x, Tensor):
        return ops.convolution(x, *settings)
    return ops.convolution_of_slices(x, *settings)


def may_fuse(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the two are exactly a convolution and the norm that goes with it, without hooks."""
    pair = _PAIRS.get(type(conv))
    return pair is not None and type(norm) in (pair, SyncBatchNormAct) and _are_plain(conv, norm)


def may_fold(conv: nn.Module, norm: nn.Module) -> bool:
    """The same for evaluation, in which ghost batches and renormalisation are batch norm too."""
    if type(conv) is nn.Conv2d and type(norm) in (GhostBatchNormAct2d, BatchRenormAct2d):
        return _are_plain(conv, norm)
    return may_fuse(conv, norm)


def _are_plain(conv: nn.Module, norm: nn.Module) -> bool:
    return is_plain(conv) and is_plain(norm) and conv.padding_mode == "zeros"


def folded_conv(
    conv: nn.Module,
    norm: nn.Module,
    keeper: Any,
    x: Tensor,
    residual: Tensor | None,
    activation: str,
    negative_slope: float | Tensor,
) -> Tensor | None:
    """act( norm( conv(x) ) [+ residual] ) as one convolution, or None where it may not be one.

    Args:
        conv, norm: a convolution and a batch norm of torch, or what behaves as these do, without
            hooks; ``norm`` in evaluation.
        negative_slope: of prelu a tensor, which the host may not know: prelu runs after it.
        keeper: what was folded is kept as its attribute ``_folded``.
    """
    if torch.compiler.is_compiling() or conv.padding_mode != "zeros":
        return None
    if isinstance(negative_slope, Tensor):
        if torch.is_grad_enabled() and negative_slope.requires_grad:
            return None
        y = folded_conv(conv, norm, keeper, x, residual, "identity", 0.0)
        return None if y is None else activate(y, activation, negative_slope)
    folded = _folded(conv, norm, keeper, x, residual)
    return None if folded is None else folded(x, residual, activation, negative_slope)


class _Fold(NamedTuple):
    """A folded convolution and what it depends on."""

    folded: ops.FoldedConvolution | None  # None: there is none for these weights
    at: ops.Situation
    settings: tuple[Any, ...]
    # Of every tensor: itself, its address, its version.
    versions: tuple[tuple[Tensor | None, int, int], ...]
    # A view of each: while it exists no other tensor gets that address.
    views: tuple[Tensor, ...]
    # Copies of the vectors and of some values of the weight. A write through ``.data``, and an op
    # that updates running statistics, leave no trace in a version counter.
    values: tuple[Tensor, ...]

    def is_current(self, sources: tuple[Tensor | None, ...]) -> bool:
        for now, (then, address, version) in zip(sources, self.versions, strict=True):
            if now is not then:
                return False
            if now is not None and (now._version != version or now.data_ptr() != address):
                return False
        # No generator: this runs at every call.
        for before, view in zip(self.values, self.views, strict=False):
            if not torch.equal(before, view):
                return False
        return True


def _folded(
    conv: nn.Module, norm: nn.Module, keeper: Any, x: Tensor, residual: Tensor | None
) -> ops.FoldedConvolution | None:
    """The present folded convolution for this call, or None where the composition must run."""
    # The dictionaries, because module attributes take long to find. A parameter that is not in
    # them is no plain parameter.
    parameters, norm_parameters, buffers = conv._parameters, norm._parameters, norm._buffers
    try:
        sources = (
            parameters["weight"],
            parameters["bias"],
            buffers["running_mean"],
            buffers["running_var"],
            norm_parameters["weight"],
            norm_parameters["bias"],
            # Training writes the running statistics without counting versions, but counts batches.
            buffers["num_batches_tracked"],
        )
    except KeyError:
        return None
    if ops.wants_gradient(x, residual, *sources):
        return None
    at = ops.situation(x, residual)
    if at is None:
        return None
    settings = (
        norm.eps,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        None if sources[0] is None else sources[0].stride(),
    )
    kept: _Fold | None = keeper._folded
    if kept is None or kept.at != at or kept.settings != settings or not kept.is_current(sources):
        kept = _fold(at, sources, settings)
        if kept is None:
            return None
        keeper._folded = kept
    folded = kept.folded
    return folded if folded is not None and folded.takes(x, residual) else None


def _some_values(weight: Tensor) -> Tensor:
    """A view of 16 values of a dense tensor, in different filters and places within a filter."""
    step = max(weight.numel() // 16, 1)
    return weight.as_strided((min(16, weight.numel()),), (step,))


def _fold(
    at: ops.Situation, sources: tuple[Tensor | None, ...], settings: tuple[Any, ...]
) -> _Fold | None:
    """Fold, or None where later changes could not be noticed."""
    present = [t for t in sources if t is not None]
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_inference() for t in present):
        return None
    if any(t.device != at.device for t in present):
        return None
    weight = sources[0]
    if weight is None or not _is_dense(weight):
        return None
    if at.device.type != "cpu" and torch.cuda.is_current_stream_capturing():
        return None  # folding waits for the GPU
    versions = tuple((t, 0, 0) if t is None else (t, t.data_ptr(), t._version) for t in sources)
    views = tuple(t.detach() for t in (_some_values(weight), *present[1:]))
    # Copied before the fold: a change in between, by another thread, is noticed at the next call.
    # On a GPU, comparing them would wait for it.
    values = tuple(view.clone() for view in views) if at.device.type == "cpu" else ()
    with torch.inference_mode(False), torch.no_grad():
        _, conv_bias, mean, var, norm_weight, norm_bias, _ = sources
        eps, stride, padding, dilation, groups, _ = settings
        folded = ops.fold(
            at,
            weight,
            conv_bias,
            mean,
            var,
            norm_weight,
            norm_bias,
            eps,
            stride,
            padding,
            dilation,
            groups,
        )
    return _Fold(folded, at, settings, versions, views, values)


def _is_dense(t: Tensor) -> bool:
    if t.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.dim() in formats and t.is_contiguous(memory_format=formats[t.dim()])


def _kernel_tuple(size: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (size,) * n if isinstance(size, int) else tuple(size)


class _ConvNormActivation(nn.Sequential):
    _conv_layer: type[nn.Module]
    _dimensions: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...],
        padding: int | tuple[int, ...] | str | None,
        groups: int,
        norm_layer: Callable[..., nn.Module] | None,
        activation_layer: Callable[..., nn.Module] | None,
        dilation: int | tuple[int, ...],
        inplace: bool | None,
        bias: bool | None,
    ) -> None:
        if padding is None:
            kernel = _kernel_tuple(kernel_size, self._dimensions)
            dilations = _kernel_tuple(dilation, self._dimensions)
            padding = tuple((k - 1) // 2 * d for k, d in zip(kernel, dilations, strict=True))
        conv = self._conv_layer(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation=dilation,
            groups=groups,
            bias=norm_layer is None if bias is None else bias,
        )
        layers = [conv]
        inplace_kwargs = {} if inplace is None else {"inplace": inplace}
        if makes_norm_act(norm_layer):
            assert norm_layer is not None
            layers.append(norm_layer(out_channels, act_layer=activation_layer, **inplace_kwargs))
        else:
            if norm_layer is not None:
                layers.append(norm_layer(out_channels))
            if activation_layer is not None:
                layers.append(activation_layer(**inplace_kwargs))
        super().__init__(*layers)
        self.out_channels = out_channels
        # Where the residual is added, if norm and activation are separate children.
        self._before_residual = 1 if norm_layer is None else 2

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act( norm( conv(x) ) [+ residual] ).

        Args:
            x: (N, in_channels, *spatial).
            residual: like the output.

        Returns:
            (N, out_channels, *spatial of the convolution's output).
        """
        layers = list(self._modules.values())
        if len(layers) > 1 and isinstance(layers[1], NormAct):
            y = conv_norm_act(layers[0], layers[1], x, residual)
            layers = layers[2:]
        else:
            y = x
            for layer in layers[: self._before_residual]:
                y = layer(y)
            if residual is not None:
                y = y + residual
            layers = layers[self._before_residual :]
        for layer in layers:
            y = layer(y)
        return y


class Conv2dNormActivation(_ConvNormActivation):
    """Convolution, norm, an optional residual and activation.

    Signature and ``state_dict`` are those of ``torchvision.ops.Conv2dNormActivation``. In training
    the library's convolution is followed by the fused norm; in evaluation without gradients the
    norm is folded into the convolution (:func:`conv_norm_act`). An ``nn.Sequential`` with the
    children ``0``, the convolution, and ``1``, the norm with its activation.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, dilation: of the convolution.
        padding: None for ``(kernel_size - 1) // 2 * dilation``.
        norm_layer: BatchNormAct2d, InstanceNormAct2d, GroupNormAct, a subclass or a
            ``functools.partial`` of one, which gets ``act_layer=activation_layer``; any other norm,
            which is followed by the activation as a child of its own; None for no norm.
        activation_layer: class of the activation; None for none.
        inplace: of an activation that is not fused; None for one that has no such argument.
        bias: of the convolution; None for one only where there is no norm.
    """

    _conv_layer = nn.Conv2d
    _dimensions = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = BatchNormAct2d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        dilation: int | tuple[int, int] = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            groups,
            norm_layer,
            activation_layer,
            dilation,
            inplace,
            bias,
        )


class Conv3dNormActivation(_ConvNormActivation):
    """:class:`Conv2dNormActivation` over (N, C, D, H, W)."""

    _conv_layer = nn.Conv3d
    _dimensions = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] | str | None = None,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = BatchNormAct3d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        dilation: int | tuple[int, int, int] = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            groups,
            norm_layer,
            activation_layer,
            dilation,
            inplace,
            bias,
        )
