"""The ops as functions: see :mod:`resops.nn` for the layers made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .ops.basic_block import basic_block as _basic_block
from .ops.batch_norm import batch_norm as _batch_norm
from .ops.batch_norm_act_max_pool import batch_norm_act_max_pool as _batch_norm_act_max_pool
from .ops.batch_norm_prelu import batch_norm_prelu as _batch_norm_prelu
from .ops.bottleneck import bottleneck as _bottleneck
from .ops.conv_bn_act import conv_bn_act as _conv_bn_act
from .ops.dense_block import dense_block as _dense_block
from .ops.dense_block import transition as _transition
from .ops.double_conv import double_conv as _double_conv
from .ops.residual_add import residual_add as _residual_add
from .ops.sync_batch_norm import sync_batch_norm as _sync_batch_norm
from .reference.conv_norm import ConvNorm
from .reference.dense_block import DenseLayer, NormConv

__all__ = [
    "ConvNorm",
    "DenseLayer",
    "NormConv",
    "basic_block",
    "batch_norm_act",
    "batch_norm_act_max_pool",
    "bottleneck",
    "conv_bn_act",
    "dense_block",
    "double_conv",
    "residual_add",
    "transition",
]


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    negative_slope: float | Tensor = 0.01,
    process_group: Any = None,
) -> Tensor:
    """Batch norm, residual addition and activation in one op.

    ``y = act(weight * (input - mean) / sqrt(var + eps) + bias [+ residual])`` with the batch's own
    mean and biased variance per channel when ``training``, the running ones otherwise (Ioffe and
    Szegedy, "Batch Normalization", 2015, Algorithms 1 and 2). Equal to ``F.batch_norm``, ``+``
    and the activation one after the other; first and second derivatives are those of autograd.

    Args:
        input: (N, C, *spatial), float32, bfloat16, float16 or float64; any strides.
        running_mean: (C,), updated in place when training, as
            ``(1 - momentum) * running_mean + momentum * mean``; None to keep none.
        running_var: (C,), likewise, with the unbiased variance.
        weight: (C,), gamma; None stands for 1. float32 or input's dtype, float64 for float64.
        bias: (C,), beta; None stands for 0. weight's dtype.
        training: normalise with the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance, inside the root.
        residual: like ``input``; added before the activation. Of another floating dtype, both
            are promoted as ``+`` would.
        activation: "relu", "leaky_relu", "silu", "gelu" (exact), "prelu" or None.
        negative_slope: of leaky_relu; of prelu, the learned slope, a tensor of one element.
        process_group: when training, take the statistics over all processes of this group of
            torch.distributed, which make the call together, some of them perhaps with an empty
            batch. One collective in each of the two passes. Gradients of weight and bias are those
            of this process.

    Returns:
        Like ``input``, in its memory format (channels-last or contiguous).

    Raises:
        ValueError: fewer than two values per channel when training; eps not positive; one of the
            running statistics without the other; an unknown activation.
        RuntimeError: an argument whose size, dtype or device does not fit; no running statistics
            in evaluation.
        NotImplementedError: an integer or complex input.
        BackendError: a backend chosen by name that cannot do this call.
    """
    if activation == "prelu" or isinstance(negative_slope, Tensor):
        if activation != "prelu":
            raise TypeError(
                "batch_norm_act(): argument 'negative_slope' is a tensor for activation 'prelu' "
                f"only, but got activation {activation!r}"
            )
        return _batch_norm_prelu(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            slope=negative_slope,  # type: ignore[arg-type]
            process_group=process_group,
        )
    if process_group is not None and training:
        return _sync_batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            momentum,
            eps,
            residual=residual,
            activation=activation,
            negative_slope=negative_slope,
            process_group=process_group,
        )
    # By position: keywords take a twentieth of the host time of the call.
    return _batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        residual,
        activation,
        negative_slope,
    )


def batch_norm_act_max_pool(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """Batch norm, activation and max-pool in one op: what follows the first convolution of a ResNet
    (He et al., "Deep Residual Learning for Image Recognition", 2015, Table 1).

    ``F.max_pool2d(act(F.batch_norm(input, ...)), kernel_size, stride, padding)``, without the
    tensor between the two. For the backward pass it keeps ``input`` and 8 bits for every window. A
    NaN in a window is its maximum, and of equal values the first one gets the gradient, as in
    PyTorch. First and second derivatives are those of autograd.

    Args:
        input: (N, C, H, W), float32, bfloat16, float16 or float64; any strides.
        running_mean, running_var, weight, bias, training, momentum, eps: as in
            :func:`batch_norm_act`.
        kernel_size: of a window, one number or (height, width); at most 256 positions.
        stride: from one window to the next; None for ``kernel_size``.
        padding: on each side, at most half of ``kernel_size``; never a maximum.
        dilation: 1.
        ceil_mode: False.
        activation: "relu", "leaky_relu", "silu", "gelu" (exact) or None.
        negative_slope: of leaky_relu.

    Returns:
        (N, C, OH, OW) with OH = (H + 2 * padding - kernel_size) // stride + 1, OW likewise; in
        input's dtype and memory format (channels-last or contiguous).

    Raises:
        ValueError: an input that is not (N, C, H, W); what :func:`batch_norm_act` raises.
        RuntimeError: windows that do not fit; what :func:`batch_norm_act` raises.
        NotImplementedError: another dilation, ceil_mode, a window of more than 256 positions, an
            integer or complex input.
        BackendError: a backend chosen by name that cannot do this call.
    """
    dilations = {dilation} if isinstance(dilation, int) else set(dilation)
    if ceil_mode or dilations != {1}:
        raise NotImplementedError(
            "batch_norm_act_max_pool takes dilation=1 and ceil_mode=False only, but got "
            f"dilation={dilation} and ceil_mode={ceil_mode}"
        )
    return _batch_norm_act_max_pool(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        activation=activation,
        negative_slope=negative_slope,
    )


def conv_bn_act(
    input: Tensor,
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
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """Convolution, batch norm, residual addition and activation.

    ``y = act(batch_norm(conv(input) + conv_bias) [+ residual])``. In training the library's
    convolution is followed by :func:`batch_norm_act`; in evaluation, where no gradient is asked
    for, the batch norm is folded into the convolution's weights (docs/math/conv_bn_act.md).

    Args:
        input: (N, C_in, *spatial) with 1 to 3 spatial dimensions, or one image (C_in, *spatial),
            as ``F.conv2d`` takes it: a batch of one.
        conv_weight: (C, C_in / groups, *kernel).
        conv_bias: (C,) or None.
        running_mean, running_var, weight, bias, training, momentum, eps: as in
            :func:`batch_norm_act`, (C,) each.
        stride, padding, dilation, groups: as in ``F.conv2d``; padding may be "same" or "valid".
        residual: like the output; added before the activation.
        activation: "relu", "leaky_relu", "silu", "gelu" (exact) or None.
        negative_slope: of leaky_relu.

    Returns:
        (N, C, *spatial), in the memory format that the convolution returns; (C, *spatial) for one
        image.

    Raises:
        ValueError: a conv_weight without 1 to 3 kernel dimensions; an unknown activation; what
            :func:`batch_norm_act` raises.
        RuntimeError: sizes, dtypes or devices that do not fit, in PyTorch's own words.
    """
    return _conv_bn_act(
        input,
        conv_weight,
        conv_bias,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        residual=residual,
        activation=activation,
        negative_slope=negative_slope,
    )


def residual_add(
    input: Tensor,
    residual: Tensor,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor | str = 1.0,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    alpha_backward: float | Tensor | None = None,
    beta_backward: float | Tensor | str | None = None,
) -> Tensor:
    """Weighted residual addition and activation in one op.

    ``y = act(alpha * input + beta * residual)``: the join of He, Zhang, Ren and Sun, "Deep
    Residual Learning for Image Recognition", 2016, Eq. 1, where both weights are 1. Each weight is

    * a number: 1 / sqrt(2) keeps the variance of a sum of two;
    * a tensor of one element: a learnable scalar (SkipInit, Fixup);
    * a tensor of size (N,) or (N, 1, ..., 1): one weight per sample (stochastic depth, ShakeDrop,
      shake-shake);
    * a tensor of input's size: a gate (Highway Networks).

    A tensor of size (N,) goes by samples, also where broadcasting would take another dimension.
    docs/math/residual_add.md has the papers. First and second derivatives are those of autograd.

    Args:
        input: (N, *), float32, bfloat16, float16 or float64; any strides. The branch.
        residual: like ``input``. The shortcut. Of another floating dtype, both are promoted as
            ``+`` would.
        alpha: weight of ``input``. A scalar or per-sample tensor is float32 or of input's dtype,
            float64 for float64; an elementwise one of input's dtype, or promoted with it.
        beta: weight of ``residual``, likewise; "complement" stands for ``1 - alpha``.
        activation: "relu", "leaky_relu", "silu", "gelu" (exact) or None.
        negative_slope: of leaky_relu.
        alpha_backward: the weight that stands in alpha's place in the backward pass (shake-shake,
            ShakeDrop); alpha and beta have no gradient then. None for alpha, or, if
            ``beta_backward`` is not None either, for no such weights.
        beta_backward: likewise in beta's place; None for beta, where "complement" means
            ``1 - alpha_backward``.

    Returns:
        Like ``input``, in its memory format (channels-last or contiguous).

    Raises:
        ValueError: an unknown activation; backward weights beside silu or gelu; a string other than
            "complement"; an input without dimensions.
        TypeError: a weight that is neither a number nor a tensor.
        RuntimeError: an argument whose size, dtype or device does not fit.
        NotImplementedError: an integer or complex input.
        BackendError: a backend chosen by name that cannot do this call.
    """
    return _residual_add(
        input,
        residual,
        alpha,
        beta,
        activation=activation,
        negative_slope=negative_slope,
        alpha_backward=alpha_backward,
        beta_backward=beta_backward,
    )


def bottleneck(
    input: Tensor,
    conv1: ConvNorm,
    conv2: ConvNorm,
    conv3: ConvNorm,
    shortcut: ConvNorm | None = None,
    *,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    recompute: bool = False,
) -> Tensor:
    """A bottleneck block, join included, as one op that saves little for the backward pass.

    ``y = act( norm3(conv3(act(norm2(conv2(act(norm1(conv1(input)))))))) + shortcut(input) )`` (He,
    Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015, Figure 5, right). The
    convolutions are 1x1, 3x3 and 1x1 there; here they may be any that fit. Equal to the layers one
    after the other; first and second derivatives are those of autograd.

    Saved for the backward pass are the input, the raw outputs of the convolutions, mean and invstd
    of each norm and one bit per element of the output. The normalised activations between the
    convolutions are computed again (docs/math/bottleneck.md).

    Args:
        input: (N, C_in, *spatial) with 1 to 3 spatial dimensions; float32, bfloat16, float16 or
            float64; any strides.
        conv1, conv2, conv3: a convolution and its batch norm each: tensors and settings of
            :func:`conv_bn_act`. ResNet v1.5 has the stride in ``conv2``, v1 in ``conv1``.
        shortcut: likewise, without activation; None for the identity.
        activation: after each norm but the shortcut's, the last one after the addition: "relu",
            "leaky_relu", "silu", "gelu" (exact) or None.
        negative_slope: of leaky_relu.
        recompute: do not save the outputs of ``conv3`` and ``shortcut`` either, the widest, and run
            these convolutions again in the backward pass.

    Returns:
        (N, C, *spatial) of the last convolution's output.

    Raises:
        ValueError: an unknown activation; what :func:`batch_norm_act` refuses.
        TypeError: an argument that is no ConvNorm, or of it a tensor that is none.
        RuntimeError: an argument whose size, dtype or device does not fit; branch and shortcut
            that differ in size.
        NotImplementedError: an integer or complex input.
        BackendError: a backend chosen by name that cannot do this call.
    """
    return _bottleneck(
        input,
        conv1,
        conv2,
        conv3,
        shortcut,
        activation=activation,
        negative_slope=negative_slope,
        recompute=recompute,
    )


def basic_block(
    input: Tensor,
    conv1: ConvNorm,
    conv2: ConvNorm,
    shortcut: ConvNorm | None = None,
    *,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    recompute: bool = False,
) -> Tensor:
    """A basic block, join included, as one op that saves little for the backward pass.

    ``y = act( norm2(conv2(act(norm1(conv1(input))))) + shortcut(input) )``: two 3x3 convolutions in
    Figure 5, left, of the paper that :func:`bottleneck` names. Arguments, what is saved and what
    is raised are as there; ``recompute`` is about ``conv2`` and ``shortcut``.
    """
    return _basic_block(
        input,
        conv1,
        conv2,
        shortcut,
        activation=activation,
        negative_slope=negative_slope,
        recompute=recompute,
    )


def double_conv(
    input: Tensor | Sequence[Tensor],
    conv1: ConvNorm,
    conv2: ConvNorm,
    *,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """Two convolutions, each with its norm and activation, as one op that saves little.

    ``act( norm2(conv2(act(norm1(conv1(input))))) )``, what a U-Net is made of (Ronneberger, Fischer
    and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015). Equal to the
    layers one after the other; first and second derivatives are those of autograd.

    Saved for the backward pass are the input, the raw outputs of the convolutions, mean and invstd
    of each norm. The activation between the convolutions is computed again, and so is, where
    ``input`` is itself the output of such a call, the input (docs/math/double_conv.md).

    Args:
        input: (N, C_in, *spatial) with 1 to 3 spatial dimensions; float32, bfloat16, float16 or
            float64; any strides. Or several such, side by side along the channels, which are not
            concatenated where the convolution's kernels take slices.
        conv1, conv2: a convolution and its batch norm each: tensors and settings of
            :func:`conv_bn_act`.
        activation: after each norm: "relu", "leaky_relu", "silu", "gelu" (exact) or None.
        negative_slope: of leaky_relu.

    Returns:
        (N, C, *spatial) of the second convolution's output.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError, BackendError: as in
            :func:`bottleneck`.
    """
    return _double_conv(input, conv1, conv2, activation=activation, negative_slope=negative_slope)


def dense_block(
    input: Tensor | Sequence[Tensor],
    layers: Sequence[DenseLayer],
    transition: NormConv | None = None,
    *,
    drop_rate: float = 0.0,
    accumulate_in_float32: bool = False,
) -> Tensor:
    """A dense block, and the transition behind it, as one op on one buffer.

    Each layer is ``conv2(relu(norm2(conv1(relu(norm1(features))))))`` of all features so far, the
    input and the outputs of the layers before it (Huang, Liu, van der Maaten and Weinberger,
    "Densely Connected Convolutional Networks", 2017, section 3). Equal to the layers one after the
    other with concatenations between them; first and second derivatives are those of autograd.

    Nothing is concatenated: all channels are in one buffer, each with its statistics computed once
    for all norms that read it. Saved for the backward pass are the buffer, the raw output of each
    ``conv1``, and statistics; the gradient of a channel is made once, from one sum over all norms
    that read it (docs/math/dense_block.md).

    Norms of one block of which only some train, or with differing ``eps``, are computed layer by
    layer; ``resops.ops.dense_block.fallback_reason`` says so, and :func:`resops.explain`.

    Without a transition the output is the buffer itself, which the backward pass reads: after an
    in-place operation on it (``F.relu(y, inplace=True)``) backward raises a RuntimeError.

    Args:
        input: (N, C, H, W), float32, bfloat16, float16 or float64; any strides. Or several such
            tensors, of which the features are the channels one after the other.
        layers: :class:`DenseLayer` of two :class:`NormConv`, a batch norm, a ReLU and a convolution
            without bias of stride 1, odd kernel and a padding that keeps the image's size: 1x1 and
            3x3 in DenseNet-B.
        transition: a batch norm, a ReLU and a 1x1 convolution, behind which images are averaged
            over 2x2; None to return all features.
        drop_rate: of dropout on the output of each layer; 0 for none, as in evaluation.
        accumulate_in_float32: keep the sum over norms in float32 where ``input`` has 16 bits.

    Returns:
        channels-last: (N, C + all new channels, H, W), or what the transition makes of it.

    Raises:
        TypeError: an argument that is none of these types.
        ValueError: no layer and no transition; a drop_rate that is no probability; what
            :func:`batch_norm_act` refuses.
        RuntimeError: an argument whose size, dtype or device does not fit.
        NotImplementedError: an integer or complex input.
        BackendError: a backend chosen by name that cannot do this call.
    """
    return _dense_block(
        input,
        layers,
        transition,
        drop_rate=drop_rate,
        accumulate_in_float32=accumulate_in_float32,
    )


def transition(input: Tensor, norm_conv: NormConv) -> Tensor:
    """What is between two dense blocks: batch norm, ReLU, 1x1 convolution, average pool 2x2.

    The pool comes first, which gives the same with a quarter of the multiplications. Saved for the
    backward pass are the input and statistics. A block with its transition behind it is better
    given to :func:`dense_block` as a whole, which has the statistics already.

    Args:
        input: (N, C, H, W), as :func:`dense_block` takes it.
        norm_conv: tensors and settings.

    Returns:
        (N, channels of the convolution, H // 2, W // 2), channels-last.
    """
    return _transition(input, norm_conv)
