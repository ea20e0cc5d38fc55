"""``batch_norm``: argument checks, backend choice, autograd Function and fake kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, _native, _triton
from .._autograd import apply_function, is_plain_call, traced_to_aten
from ..reference import batch_norm as reference
from ..reference.activation import ACTIVATIONS, MASKED_ACTIVATIONS, SMOOTH_ACTIVATIONS
from ..reference.layout import empty_output, mask_size, mask_sizes


def check_arguments(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    several: bool = False,
) -> None:
    """Raise what the C++ op raises for the same arguments (csrc/batch_norm.cpp), before any work.

    For the reference backend and the fake kernels; the compiled op checks for itself.

    Args:
        several: there are more values per channel, in other processes.
    """
    check_input("batch_norm", x)
    check_activation(activation)
    check_number("batch_norm_act", "momentum", momentum)
    check_number("batch_norm_act", "eps", eps)
    size = list(x.shape)
    count = size[0] * math.prod(size[2:])
    if training and count == 1 and not several:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}"
        )
    if training and not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not eps >= 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if momentum != momentum:  # NaN; torch.compile cannot trace math.isnan of a dynamic number
        raise ValueError("batch_norm momentum must be a number, but got nan")
    if not training:
        for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
            if statistic is None:
                raise RuntimeError(f"{name} must be defined in evaluation mode")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    _check_pair("weight", weight, "bias", bias, x)
    _check_pair("running_mean", running_mean, "running_var", running_var, x)
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if statistic is not None and statistic.requires_grad:
            raise RuntimeError(
                f"The function 'batch_norm' is not differentiable with respect to argument "
                f"'{name}'. This input cannot have requires_grad True."
            )
    if residual is not None:
        check_like("residual", residual, x)


def check_tensor(op: str, name: str, t: object) -> None:
    """Raise TypeError unless ``t`` is a tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(t).__name__}")


def check_number(op: str, name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a real number, or stands for one in a traced graph."""
    if not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{op}(): argument '{name}' must be a number, not {type(value).__name__}")


def check_input(op: str, x: Tensor) -> None:
    """Raise unless ``x`` is a strided floating-point tensor of 2 or more dimensions."""
    if x.dim() < 2:
        raise ValueError(
            f"{op} expects an input of size (N, C, *spatial), but got {x.dim()}-D input of size "
            f"{list(x.shape)}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise NotImplementedError(f'"{op}" not implemented for {x.dtype}')
    if x.layout != torch.strided:
        raise NotImplementedError(f'"{op}" not implemented for layout {x.layout}')


def check_activation(activation: str) -> None:
    """Raise unless ``activation`` is one of the fused ones."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, but got {activation!r}"
        )


def check_device(name: str, t: Tensor, x: Tensor) -> None:
    """Raise unless ``t`` is on the device of the input ``x``."""
    if t.device != x.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but input is on {x.device} and "
            f"{name} is on {t.device}"
        )


def check_like(name: str, t: Tensor, x: Tensor) -> None:
    """Raise unless ``t`` has the size, dtype and device of the input ``x``."""
    check_device(name, t, x)
    if t.shape != x.shape:
        raise RuntimeError(
            f"{name} should have the size {list(x.shape)} of the input, but got {list(t.shape)}"
        )
    if t.dtype != x.dtype:
        raise RuntimeError(f"{name} should have the dtype {x.dtype} of the input, got {t.dtype}")


def _check_pair(name1: str, t1: Tensor | None, name2: str, t2: Tensor | None, x: Tensor) -> None:
    """Raise unless both are None or vectors of C elements of one dtype that goes with x's."""
    channels = x.size(1)
    for name, t in ((name1, t1), (name2, t2)):
        if t is None:
            continue
        check_tensor("batch_norm", name, t)
        check_device(name, t, x)
        if t.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {t.numel()}")
        if t.dim() != 1:
            raise RuntimeError(
                f"{name} should be a vector of {channels} elements, but got size {list(t.shape)}"
            )
        half = x.dtype in (torch.float16, torch.bfloat16)
        if t.dtype != x.dtype and not (half and t.dtype == torch.float32):
            wanted = f"{x.dtype} or torch.float32" if half else f"{x.dtype}"
            raise RuntimeError(
                f"mixed dtype: expect {name} to have dtype {wanted} for an input of {x.dtype}, "
                f"but got {t.dtype}"
            )
    if t1 is not None and t2 is not None and t1.dtype != t2.dtype:
        raise RuntimeError(
            f"mixed dtype: expect {name1} and {name2} to have one dtype, but got {t1.dtype} and "
            f"{t2.dtype}"
        )


def backward_formulas(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    eps: float,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``batch_norm_backward`` in operations that autograd can follow, statistics included."""
    _check_backward(grad_y, x, residual, mask, weight, bias, mean, invstd, activation)
    if training:
        mean, var = reference.batch_norm_statistics(x)
        invstd = torch.rsqrt(var + eps)
    return reference.batch_norm_backward(
        grad_y,
        x,
        residual,
        mask,
        weight,
        bias,
        mean,
        invstd,
        training,
        activation,
        negative_slope,
        output_mask,
    )


class BatchNormFunction(torch.autograd.Function):
    """The phases of one backend, and what is kept between them.

    Saved: x, mean, invstd, weight, bias; with a residual the 1-bit mask for relu and leaky_relu,
    the residual itself for silu and gelu.
    """

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        activation: str,
        negative_slope: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _native_forward(
            x,
            residual,
            weight,
            bias,
            running_mean,
            running_var,
            training,
            momentum,
            eps,
            activation,
            negative_slope,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, bias, _, _, training, _, eps, activation, negative_slope = inputs
        _, mean, invstd, mask = output
        ctx.mark_non_differentiable(mean, invstd, mask)
        ctx.set_materialize_grads(False)
        kept = residual if activation in SMOOTH_ACTIVATIONS else None
        ctx.save_for_backward(x, kept, weight, bias, mean, invstd, mask)
        ctx.call = (training, eps, activation, negative_slope)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return BatchNormFunction.backward_by(_native_backward, ctx, grad_y)

    @staticmethod
    def backward_by(
        backward: Callable[..., Any], ctx: Any, grad_y: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 11
        x, residual, weight, bias, mean, invstd, mask = ctx.saved_tensors
        training, eps, activation, negative_slope = ctx.call
        needed = list(ctx.needs_input_grad[:4])
        # Without an activation the residual's gradient is grad_y itself: no kernel writes a copy.
        unchanged = activation == "identity" and needed[1]
        needed[1] = needed[1] and not unchanged
        saved = (grad_y, x, residual, mask, weight, bias, mean, invstd, training)
        if torch.is_grad_enabled():  # create_graph=True
            grads = backward_formulas(*saved, eps, activation, negative_slope, needed)
        else:
            grads = backward(*saved, activation, negative_slope, needed)
        grad_x, grad_residual, grad_weight, grad_bias = (
            g if need else None for g, need in zip(grads, needed, strict=True)
        )
        if unchanged:
            grad_residual = grad_y
        return (grad_x, grad_residual, grad_weight, grad_bias, *[None] * 7)


class TritonBatchNormFunction(BatchNormFunction):
    """The same with the kernels of Triton: so backward keeps the choice made in forward."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _triton_forward(*args)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return BatchNormFunction.backward_by(_triton_backward, ctx, grad_y)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """See :func:`resops.functional.batch_norm_act`."""
    check_tensor("batch_norm_act", "input", x)
    if activation is None:
        activation = "identity"
    if residual is not None:
        check_tensor("batch_norm_act", "residual", residual)
        if residual.dtype != x.dtype:
            # torch's own add promotes; under autocast a branch may come in another dtype.
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
    tensors = (x, residual, weight, bias, running_mean, running_var)
    args = (*tensors, training, momentum, eps, activation, negative_slope)
    backend = _dispatch.choose("batch_norm", x)
    if (
        backend == "native"
        and is_plain_call(tensors)
        # Anything else is converted, or refused by name, below.
        and type(training) is bool
        and type(momentum) is float
        and type(eps) is float
        and type(activation) is str
        and type(negative_slope) is float
    ):
        return _native_batch_norm(*args)
    check_activation(activation)
    if not isinstance(training, bool):
        raise TypeError(
            f"batch_norm_act(): argument 'training' must be bool, not {type(training).__name__}"
        )
    if backend == "reference" or traced_to_aten():
        # torch.jit.trace would record every look at a size; F.batch_norm checks there.
        if not torch.jit.is_tracing():  # type: ignore[attr-defined]
            check_arguments(*args[:-1])
        return reference.batch_norm(*args)
    if backend == "triton":
        check_arguments(*args[:-1])
        if torch.is_grad_enabled():
            return apply_function(TritonBatchNormFunction, *args)[0]
        return _triton_forward(*args)[0]
    if torch.is_grad_enabled():
        return apply_function(BatchNormFunction, *args)[0]
    return _native_forward(*args)[0]


def phases_of(backend: str) -> Any:
    """What has the functions batch_norm_statistics, batch_norm_apply and so on of a backend."""
    if backend == "reference":
        return reference
    return torch.ops.resops if backend == "native" else torch.ops.resops_triton


def batch_norm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, (C,) each, float32 (float64 for float64); no gradient.

    Args:
        x: (N, C, *spatial).
    """
    check_input("batch_norm", x)
    statistics = phases_of(_dispatch.choose("batch_norm", x)).batch_norm_statistics
    with torch.no_grad():
        mean, var = statistics(x)
    return mean, var


# Fake kernels: sizes, dtypes and strides of what the compiled ops return. They check what the
# compiled ops check: a call that mixes a meta tensor with others comes here.


def _check_statistics(x: Tensor, **statistics: Tensor | None) -> None:
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in statistics.items():
        if t is None:
            continue
        _check_pair(name, t, name, None, x)
        if t.dtype != wanted:
            raise RuntimeError(
                f"{name} should have dtype {wanted} for an input of {x.dtype}, but got {t.dtype}"
            )


def check_apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
) -> None:
    """Raise unless these go together in a pass that follows the statistics."""
    check_input("batch_norm", x)
    check_activation(activation)
    _check_pair("weight", weight, "bias", bias, x)
    _check_statistics(x, mean=mean, invstd=invstd)
    if residual is not None:
        check_like("residual", residual, x)


def _check_backward(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
) -> None:
    check_apply(x, residual, weight, bias, mean, invstd, activation)
    check_like("grad_y", grad_y, x)
    if mask is None or mask.numel() == 0:
        if residual is not None and activation in MASKED_ACTIVATIONS and x.numel() > 0:
            raise RuntimeError(
                "mask should be given for relu and leaky_relu with a residual: it has the signs"
            )
        return
    check_device("mask", mask, x)
    size = mask_size(empty_output(x))
    if activation not in MASKED_ACTIVATIONS:
        raise RuntimeError("mask should be empty for an activation without one")
    if mask.dtype != torch.uint8:
        raise RuntimeError(f"mask should have dtype torch.uint8, but got {mask.dtype}")
    # Inductor gives a convolution's output other strides than it had when the mask was traced, and
    # takes them back before the kernel runs: in between either layout may be seen here.
    if mask.dim() != 1 or mask.numel() not in (size, *mask_sizes(x)):
        raise RuntimeError(
            f"mask should be a vector of {size} bytes, but got size {list(mask.shape)}"
        )


def statistic_like(x: Tensor) -> Tensor:
    """An uninitialised vector of C values in the dtype of x's statistics."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(x.size(1), dtype=dtype, device=x.device)


def empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What stands for a gradient that was not asked for."""
    return torch.empty(0, dtype=dtype, device=x.device)


def parameter_grad_like(x: Tensor, parameter: Tensor | None, mean: Tensor, needed: bool) -> Tensor:
    """An uninitialised gradient of weight or bias; empty where it is not needed."""
    dtype = mean.dtype if parameter is None else parameter.dtype
    return torch.empty(x.size(1) if needed else 0, dtype=dtype, device=x.device)


def _mask_like(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    masked = residual is not None and activation in MASKED_ACTIVATIONS
    return torch.empty(mask_size(y) if masked else 0, dtype=torch.uint8, device=y.device)


def _fake_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    check_input("batch_norm", x)
    return statistic_like(x), statistic_like(x)


def _fake_apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    check_apply(x, residual, weight, bias, mean, invstd, activation)
    y = empty_output(x)
    return y, _mask_like(y, residual, activation)


def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_arguments(
        x, residual, weight, bias, running_mean, running_var, training, momentum, eps, activation
    )
    y = empty_output(x)
    return y, statistic_like(x), statistic_like(x), _mask_like(y, residual, activation)


def _fake_backward_reduce(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    _check_backward(grad_y, x, residual, mask, weight, bias, mean, invstd, activation)
    return statistic_like(x), statistic_like(x)


def _fake_backward_apply(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mean_grad: Tensor | None,
    mean_grad_xhat: Tensor | None,
    activation: str,
    negative_slope: float,
    need_grad_x: bool,
    need_grad_residual: bool,
) -> tuple[Tensor, Tensor]:
    _check_backward(grad_y, x, residual, mask, weight, bias, mean, invstd, activation)
    if (mean_grad is None) != (mean_grad_xhat is None):
        raise ValueError("mean_grad and mean_grad_xhat must either both be None or neither be None")
    _check_statistics(x, mean_grad=mean_grad, mean_grad_xhat=mean_grad_xhat)
    return (
        empty_output(x) if need_grad_x else empty(x, x.dtype),
        empty_output(x) if need_grad_residual else empty(x, x.dtype),
    )


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad_y, x, residual, mask, weight, bias, mean, invstd, activation)
    return (
        empty_output(x) if output_mask[0] else empty(x, x.dtype),
        empty_output(x) if output_mask[1] else empty(x, x.dtype),
        parameter_grad_like(x, weight, mean, output_mask[2]),
        parameter_grad_like(x, bias, mean, output_mask[3]),
    )


_fakes: dict[str, Callable[..., Any]] = {
    "statistics": _fake_statistics,
    "apply": _fake_apply,
    "forward": _fake_forward,
    "backward_reduce": _fake_backward_reduce,
    "backward_apply": _fake_backward_apply,
    "backward": _fake_backward,
}
if _native.module is not None:
    for _phase, _fake in _fakes.items():
        torch.library.register_fake(f"resops::batch_norm_{_phase}", _fake)
    torch.library.impl(
        "resops::batch_norm_backward_formulas", "CompositeImplicitAutograd", backward_formulas
    )

    # The overloads themselves: resolving them anew costs 2 us a call.
    _native_forward = torch.ops.resops.batch_norm_forward.default
    _native_backward = torch.ops.resops.batch_norm_backward.default
    _native_batch_norm = _native.module.batch_norm

_triton_ops = {
    _phase: _triton.register(
        "batch_norm", _phase, getattr(reference, f"batch_norm_{_phase}"), _fake
    )
    for _phase, _fake in _fakes.items()
}
_triton_forward, _triton_backward = _triton_ops["forward"], _triton_ops["backward"]
