"""conv_bn_act on a GPU: which kernel takes a convolution, and why another one does not.

While training, or where a gradient is asked for, convolutions and their gradients are cuDNN's,
through PyTorch. A folded convolution (evaluation) is computed

* by the kernel of csrc/cuda, where the backend "native" was chosen by name and takes the call;
* else by cuDNN with bias, residual and relu in its epilogue, where there is such an op;
* else by the library's convolution, followed by what is left.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _dispatch
from ..reference.conv_bn_act import Size
from .batch_norm import check_activation
from .conv_bn_act_convolution import convolution_path

_NHWC = torch.channels_last
_HALF = (torch.float16, torch.bfloat16)
_CUDNN_DTYPES = (*_HALF, torch.float32)
_OLDEST = (8, 0)  # compute capability
_OTHER_DTYPE = "the residual has another dtype than x"


class Path(NamedTuple):
    """What computes a convolution of conv_bn_act, and why.

    ``backend`` is "native" (a kernel of resops), "cudnn" (cuDNN, called with the epilogue),
    "library" (PyTorch's own convolution, whatever that calls) or "reference".
    """

    backend: str
    reason: str


def path(
    x: Tensor,
    conv_weight: Tensor,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    training: bool = False,
) -> Path:
    """What computes the convolution of a call of :func:`conv_bn_act` under the present setting.

    Args:
        training: the batch norm uses the batch's statistics, or a gradient is asked for.
    """
    activation = "identity" if activation is None else activation
    check_activation(activation)
    setting = _dispatch.get_backend()
    if setting == "reference":
        return Path("reference", "the backend 'reference' was chosen")
    if x.device.type == "cpu":
        geometry = (stride, padding, dilation, groups)
        algorithm, reason = convolution_path(x, conv_weight, None, *geometry)
        return Path("library" if algorithm == "library" else "native", f"{algorithm}: {reason}")
    library = "cuDNN" if x.device.type == "cuda" else x.device.type
    if training:
        return Path("library", f"training: convolutions and their gradients are {library}'s")
    if x.device.type != "cuda":
        return Path("library", f"evaluation on {x.device.type}: {library}'s convolution")
    if setting == "native":
        refused = native_refusal(x, conv_weight, groups, residual)
        if refused is None:
            return Path("native", "the backend 'native' was chosen, and its kernel takes the call")
    else:
        refused = "the native kernel is taken only where the backend 'native' was chosen by name"
    missing = _cudnn_refusal(x, residual, activation)
    if missing is None:
        return Path("cudnn", f"cuDNN's convolution with bias and relu; {refused}")
    return Path("library", f"the library's convolution: {missing}; {refused}")


def native_refusal(
    x: Tensor, conv_weight: Tensor, groups: int, residual: Tensor | None
) -> str | None:
    """Why the CUDA kernel does not take a convolution; None if it does.

    csrc/cuda/bindings/conv_bn_act.cpp raises for the same.
    """
    refused = _dispatch.refusal("native", "conv_bn_act", x)
    if refused is not None:
        return refused
    if x.dtype not in _HALF:
        return f"the native kernel takes float16 and bfloat16, not {x.dtype}"
    if x.dim() != 4:
        return f"the native kernel takes 2 spatial dimensions, not {x.dim() - 2}"
    if groups != 1:
        return f"the native kernel takes one group, not {groups}"
    if not any(t.is_contiguous(memory_format=_NHWC) for t in (x, conv_weight)):
        return "x and the weight are contiguous, and the native kernel returns channels-last"
    if residual is not None and residual.dtype != x.dtype:
        return _OTHER_DTYPE
    if torch.cuda.is_available() and torch.cuda.get_device_capability(x.device) < _OLDEST:
        return "the native kernel needs a GPU of compute capability 8.0 or newer"
    return None


def _cudnn_refusal(x: Tensor, residual: Tensor | None, activation: str) -> str | None:
    """Why cuDNN's convolution with an epilogue does not take a call; None if it does."""
    if not (torch.backends.cudnn.enabled and torch.backends.cudnn.is_available()):
        return "cuDNN is not available, or switched off"
    if activation != "relu":
        return f"PyTorch has no convolution of cuDNN that ends with {activation}"
    if x.dim() not in (4, 5) or x.dtype not in _CUDNN_DTYPES:
        return f"cuDNN's convolution with relu does not take {x.dim()}-D {x.dtype}"
    if residual is not None and residual.dtype != x.dtype:
        return _OTHER_DTYPE
    return None


def folded_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor | None:
    """act( conv(x) + bias [+ residual] ); None where the library's convolution should take it.

    Args:
        weight, bias: folded; the weight in the dtype of x, the bias in float32.
    """
    took = path(x, weight, groups=groups, residual=residual, activation=activation).backend
    if took == "native":
        y: Tensor = torch.ops.resops.conv_bn_act_forward(
            *([x], None, None, "identity", 0.0, weight, bias, residual, activation, negative_slope),
            *(stride, padding, dilation, False),
        )[0]
        return y
    if took != "cudnn":
        return None
    geometry = (bias.to(x.dtype), stride, padding, dilation, groups)
    if residual is None:
        y = torch.ops.aten.cudnn_convolution_relu(x, weight, *geometry)
    else:
        y = torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1, *geometry)
    return y
