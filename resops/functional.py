"""The ops as functions: see :mod:`resops.nn` for the layers made of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .ops.batch_norm import batch_norm as _batch_norm

__all__ = ["batch_norm_act"]


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
    negative_slope: float = 0.01,
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
        activation: "relu", "leaky_relu", "silu", "gelu" (exact) or None.
        negative_slope: of leaky_relu.
        process_group: for statistics over several processes; not there yet.

    Returns:
        Like ``input``, in its memory format (channels-last or contiguous).

    Raises:
        ValueError: fewer than two values per channel when training; eps not positive; one of the
            running statistics without the other; an unknown activation.
        RuntimeError: an argument whose size, dtype or device does not fit; no running statistics
            in evaluation.
        NotImplementedError: an integer or complex input; ``process_group`` given.
        BackendError: a backend chosen by name that cannot do this call.
    """
    if process_group is not None:
        raise NotImplementedError("batch_norm_act with a process_group is not implemented yet")
    return _batch_norm(
        input,
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
