"""``conv_bn_act``: the library's convolution, followed by or folded with ``batch_norm``.

While training, or where a gradient is asked for, the convolution is followed by the op
``batch_norm``. In evaluation the batch norm is folded into the weights, and bias, residual and
activation become post-operations of the one convolution that is left (docs/math/conv_bn_act.md).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _dispatch, _magnitude, _native, _precision
from .._autograd import PLAIN_TENSORS, traced_to_aten
from ..reference import conv_bn_act as reference
from ..reference.activation import activate
from ..reference.conv_bn_act import Size
from ..reference.conv_bn_act import convolution as library_convolution
from ..reference.layout import is_channels_last_only
from .batch_norm import batch_norm, check_activation, check_tensor
from .conv_bn_act_convolution import convolution
from .conv_bn_act_gpu import Path, folded_convolution, path
from .conv_bn_act_phases import output_size, paddings_of, size_tuple
from .conv_bn_act_slices import convolution_of_slices

__all__ = [
    "FoldedConvolution",
    "Path",
    "Situation",
    "conv_bn_act",
    "convolution",
    "convolution_of_slices",
    "fold",
    "path",
    "situation",
    "wants_gradient",
]

_HALF = (torch.float16, torch.bfloat16)
_CASTABLE = (*_HALF, torch.float32)
_DTYPES = (*_CASTABLE, torch.float64)
_NHWC = torch.channels_last

# What the ops of torch.ops.mkldnn call the activations: attribute, scalars, algorithm.
_POST_OPS: dict[str, tuple[str, list[float], str]] = {
    "identity": ("none", [], ""),
    "relu": ("relu", [], ""),
    "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"),
}
# Of a folded convolution by Winograd's algorithm: tiles of 4x4 outputs in an image with which it is
# faster for any number of channels, and with which it is up to so many C * C_in.
_MANY_TILES, _SOME_TILES, _CACHED_CHANNELS = 9, 4, 128 * 128
# No sum of a convolution whose result is bounded by this overflows its accumulator or its result.
_NO_OVERFLOW = {torch.float32: 1e38, torch.bfloat16: 1e38, torch.float16: 6e4}


class Situation(NamedTuple):
    """What a folded convolution depends on beside the tensors and settings of its layer."""

    dtype: torch.dtype  # of the convolution
    autocast: bool
    x_dtype: torch.dtype
    device: torch.device
    x_size: torch.Size  # without the batch
    channels_last: bool
    onednn: bool
    native: bool  # whether the backend is one whose kernels may compute it
    precision: str


def _onednn_takes(at: Situation) -> bool:
    """Whether oneDNN has the convolution, with post-operations, in this dtype on this processor."""
    if at.device.type != "cpu" or len(at.x_size) == 2 or not torch.backends.mkldnn.is_available():
        return False
    if at.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if at.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return at.dtype == torch.float32


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class FoldedConvolution:
    """Convolution with a batch norm folded into it, and what follows as post-operations.

    Holds no reference to what it was folded from. Takes no part in autograd.
    """

    def __init__(
        self,
        at: Situation,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        layout_of: Tensor,
        output_size: torch.Size,
    ) -> None:
        """Round the folded weight once, and put it into oneDNN's own layout where that is faster.

        Args:
            at: the situation of the calls to come.
            weight, bias: as :func:`resops.reference.conv_bn_act.fold` returns them.
            layout_of: the weight before the fold, in the strides that the convolution goes by.
            output_size: without the batch.
        """
        self.dtype = at.dtype
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.output_size = output_size
        self.weight = torch.empty_like(layout_of, dtype=at.dtype).copy_(weight)
        self.bias = bias.to(at.dtype)
        self.wide_bias = bias  # oneDNN and the CUDA kernel add a float32 bias to a 16-bit sum
        self.onednn = at.onednn and _onednn_takes(at)
        self.joins_residual = False
        self.at_points: Tensor | None = None  # the weight that Winograd's algorithm multiplies by
        if not self.onednn:
            return
        # |conv(x) + bias| <= gain * max|x| + offset
        magnitudes = self.weight.abs().flatten(1).sum(1, dtype=torch.float32)
        self.gain, self.offset = float(magnitudes.max()), float(bias.abs().max())
        if self._takes_winograd(at, layout_of):
            assert _native.module is not None
            self.at_points = _native.module.winograd_weight(self.weight, *output_size[1:])
            return
        # Packed weights make the output channels-last; so it is if either of the two is.
        if len(at.x_size) == 3 and (at.channels_last or is_channels_last_only(layout_of)):
            # The packed layout depends on the size of the image, not on that of the batch. One for
            # another size would be repacked at every call, which can take fifty times as long.
            # It depends on the number of threads too: one image on two of them is cut otherwise
            # than a batch, and ResNet-50 took 1.4 times as long. One thread leaves nothing to cut.
            with _one_thread():
                self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                    self.weight, padding, stride, dilation, groups, [1, *at.x_size]
                )
            # The post-operation for it is there for such weights, and one group, only.
            self.joins_residual = groups == 1

    def _takes_winograd(self, at: Situation, layout_of: Tensor) -> bool:
        if not at.native or _native.module is None or self.groups != 1 or len(at.x_size) != 3:
            return False
        if not (at.channels_last or is_channels_last_only(layout_of)):
            return False  # the output of torch's own convolution would be contiguous
        tiles = math.prod(-(-size // 4) for size in self.output_size[1:])
        channels = math.prod(self.weight.shape[:2])
        # Measured, for any number of images: what is read of the weight at all points, four times
        # the weight, is to stay in the second-level cache, or to be used by many tiles.
        if tiles < _MANY_TILES and (tiles < _SOME_TILES or channels > _CACHED_CHANNELS):
            return False
        geometry = [list(size) for size in (self.stride, self.padding, self.dilation)]
        algorithm, _ = _native.module.conv_path(
            "forward",
            str(at.dtype).removeprefix("torch."),
            [_MANY_TILES, *at.x_size],
            [_MANY_TILES, *self.output_size],
            list(self.weight.shape),
            *geometry,
        )
        return at.dtype == torch.float32 and algorithm == "winograd"

    def takes(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether ``residual`` has the size of the output."""
        return residual is None or (
            residual.shape[1:] == self.output_size and residual.size(0) == x.size(0)
        )

    def __call__(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float
    ) -> Tensor:
        """act( conv(x) + bias [+ residual] ), in torch's own memory format."""
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if not self.onednn:
            geometry = (self.stride, self.padding, self.dilation, self.groups)
            if x.is_cuda:
                fused = folded_convolution(
                    x,
                    self.weight,
                    self.wide_bias,
                    *geometry,
                    residual,
                    activation,
                    negative_slope,
                )
                if fused is not None:
                    return fused
            y = library_convolution(x, self.weight, self.bias, *geometry)
            return _finish(y, residual, activation, negative_slope)
        if torch.is_inference_mode_enabled():
            # An inference tensor has no version counter, so no bound could be kept about it.
            with torch.inference_mode(False), torch.no_grad():
                return self._onednn(x, residual, activation, negative_slope)
        return self._onednn(x, residual, activation, negative_slope)

    def _onednn(
        self, x: Tensor, residual: Tensor | None, activation: str, negative_slope: float
    ) -> Tensor:
        bound = self._bound(x, residual, activation)
        if self.at_points is not None:
            y = torch.ops.resops.conv_bn_act_folded(
                x,
                self.weight,
                self.at_points,
                self.wide_bias,
                residual,
                activation,
                negative_slope,
                self.padding,
            )
            self._remember(y, bound, activation, negative_slope)
            return y
        last: str | None = activation
        if bound is None or not bound < _NO_OVERFLOW[self.dtype]:
            last = None  # a NaN is possible, which the activations of oneDNN do not all keep
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        ops = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            if last == "leaky_relu":
                post: tuple[Any, ...] = ("leaky_relu", [negative_slope], "")
            else:
                post = _POST_OPS[last or "identity"]
            y = ops.default(x, self.weight, self.wide_bias, *geometry, *post)
            if last is None:
                y = _finish(y, None, activation, negative_slope)
        elif self.joins_residual and residual.dtype == self.dtype:
            relu = "relu" if last == "relu" else None
            residual = residual.contiguous(memory_format=_NHWC)
            y = ops.binary(
                x, residual, self.weight, self.bias, *geometry, "add", None, relu, [], None
            )
            if relu is None:
                y = _finish(y, None, activation, negative_slope)
        else:
            y = ops.default(x, self.weight, self.wide_bias, *geometry, *_POST_OPS["identity"])
            y = _finish(y, residual, activation, negative_slope)
        self._remember(y, bound, activation, negative_slope)
        return y

    def _remember(
        self, y: Tensor, bound: float | None, activation: str, negative_slope: float
    ) -> None:
        if bound is None:
            return
        if activation == "leaky_relu":
            bound *= max(1.0, abs(negative_slope))
        _magnitude.remember(y, bound)

    def _bound(self, x: Tensor, residual: Tensor | None, activation: str) -> float | None:
        """An upper bound on the argument of the activation; None where none is known or needed."""
        tensors = (x,) if residual is None else (x, residual)
        bounds = [_magnitude.known(t) for t in tensors]
        if activation == "identity" and None in bounds:
            return None
        bound = self._propagated(
            *[
                _magnitude.measure(t) if b is None else b
                for t, b in zip(tensors, bounds, strict=True)
            ]
        )
        if activation == "identity" or bound < _NO_OVERFLOW[self.dtype]:
            return bound
        return self._propagated(*[_magnitude.measure(t) for t in tensors])

    def _propagated(self, x: float, residual: float = 0.0) -> float:
        return 1.01 * (self.gain * x + self.offset + residual)


def _finish(y: Tensor, residual: Tensor | None, activation: str, negative_slope: float) -> Tensor:
    """act( y [+ residual] ), in place where that is possible."""
    if residual is not None:
        y = y.add_(residual) if residual.dtype == y.dtype else y + residual
    if activation == "relu":
        return y.relu_()
    if activation == "leaky_relu":
        return torch.nn.functional.leaky_relu_(y, negative_slope)
    return activate(y, activation, negative_slope)


def situation(x: Tensor, residual: Tensor | None) -> Situation | None:
    """The situation of this call, or None where its convolution may not be folded.

    It may not under the backend "reference", while something traces or transforms the call, or for
    an unusual or wrong argument: then the composition runs, and raises what is to be raised.
    """
    if type(x) not in PLAIN_TENSORS:
        return None
    if traced_to_aten():
        return None
    backend = _dispatch.get_backend()
    if backend != "auto" and (
        backend == "reference" or _dispatch.refusal(backend, "batch_norm", x) is not None
    ):
        return None
    device, dtype = x.device, x.dtype
    kind = device.type
    if kind not in ("cpu", "cuda") or x.layout != torch.strided or x.numel() == 0:
        return None
    autocast = torch.is_autocast_enabled(kind)
    if autocast:
        if dtype not in _CASTABLE:
            return None
        dtype = torch.get_autocast_dtype(kind)
    if dtype not in _DTYPES:
        return None
    if residual is not None:
        if type(residual) not in PLAIN_TENSORS or residual.device != device:
            return None
        if residual.dtype != dtype and not (dtype in _HALF and residual.dtype == torch.float32):
            return None
    channels_last = x.dim() == 4 and is_channels_last_only(x)
    onednn = torch._C._get_mkldnn_enabled()
    native = kind == "cpu" and _dispatch.refusal("native", "conv_bn_act", x) is None
    precision = _precision.get_conv_precision()
    return Situation(
        dtype,
        autocast,
        x.dtype,
        device,
        x.shape[1:],
        channels_last,
        onednn,
        native and backend != "triton",
        precision,
    )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _weights_fit(
    at: Situation, conv_weight: Tensor, conv_bias: Tensor | None, *pairs: tuple[Tensor | None, ...]
) -> bool:
    """Whether convolution and batch norm would take these tensors in this situation."""
    channels = (conv_weight.size(0),)
    conv_dtypes = _CASTABLE if at.autocast else (at.dtype,)
    norm_dtypes = (at.dtype, torch.float32) if at.dtype in _HALF else (at.dtype,)
    if conv_bias is not None and conv_bias.shape != channels:
        return False
    for kinds, group in (
        (conv_dtypes, (conv_weight, conv_bias)),
        *((norm_dtypes, p) for p in pairs),
    ):
        present = [t for t in group if t is not None]
        if any(type(t) not in PLAIN_TENSORS or t.device != at.device for t in present):
            return False
        if any(t.dtype not in kinds or t.layout != torch.strided for t in present):
            return False
    for pair in pairs:
        present = [t for t in pair if t is not None]
        if any(t.shape != channels for t in present) or len({t.dtype for t in present}) > 1:
            return False
    return True


def fold(
    at: Situation,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> FoldedConvolution | None:
    """The folded convolution for calls in situation ``at``, or None where there is none.

    There is none for unequal padding, for arguments that do not fit together, and for folded
    weights that are not finite in the dtype of the convolution: a tiny variance can do that.
    """
    if running_mean is None or running_var is None:
        return None
    if not _weights_fit(at, conv_weight, conv_bias, (weight, bias), (running_mean, running_var)):
        return None
    kernel = tuple(conv_weight.shape[2:])
    n = len(kernel)
    strides, dilations = size_tuple(stride, n), size_tuple(dilation, n)
    paddings = paddings_of(padding, kernel, dilations)
    if paddings is None or n != len(at.x_size) - 1 or not 1 <= n <= 3:
        return None
    if any(len(sizes) != n for sizes in (strides, paddings, dilations)):
        return None
    if min(*strides, *dilations, groups) < 1 or min(paddings) < 0 or not eps >= 0:
        return None
    if conv_weight.numel() == 0 or at.x_size[0] != conv_weight.size(1) * groups:
        return None
    geometry = [list(sizes) for sizes in (strides, paddings, dilations)]
    size = output_size([1, *at.x_size], list(conv_weight.shape), *geometry)[1:]
    if min(size[1:]) < 1 or conv_weight.size(0) % groups != 0:
        return None
    with torch.no_grad(), torch.autocast(at.device.type, enabled=False):
        folded = reference.fold(
            conv_weight, conv_bias, running_mean, running_var, weight, bias, eps
        )
        limit = torch.finfo(at.dtype).max
        if any(not float(t.abs().amax()) <= limit for t in folded):
            return None
        return FoldedConvolution(
            at, *folded, strides, paddings, dilations, groups, conv_weight, torch.Size(size)
        )


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """See :func:`resops.functional.conv_bn_act`."""
    if activation is None:
        activation = "identity"
    check_activation(activation)
    check_tensor("conv_bn_act", "input", x)
    check_tensor("conv_bn_act", "conv_weight", conv_weight)
    for name, t in (
        ("conv_bias", conv_bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
        ("residual", residual),
    ):
        if t is not None:
            check_tensor("conv_bn_act", name, t)
    unbatched = x.dim() == conv_weight.dim() - 1
    if unbatched:  # as F.conv2d takes it; to a batch norm its channels would be the batch
        x = x.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
    y: Tensor | None = None
    if not training and not torch.compiler.is_compiling():
        sources = (conv_weight, conv_bias, running_mean, running_var, weight, bias)
        at = None if wants_gradient(x, residual, *sources) else situation(x, residual)
        # On a GPU the check for weights that are not finite waits for it: at every call only for
        # those who ask for the kernel that needs the fold.
        by_name = _dispatch.get_backend() == "native"
        if at is not None and (at.device.type == "cpu" or by_name):
            folded = fold(at, *sources, eps, stride, padding, dilation, groups)
            if folded is not None and folded.takes(x, residual):
                y = folded(x, residual, activation, negative_slope)
    if y is None:
        y = batch_norm(
            convolution(x, conv_weight, conv_bias, stride, padding, dilation, groups),
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            activation=activation,
            negative_slope=negative_slope,
        )
    return y.squeeze(0) if unbatched else y
