"""``residual_add``: argument checks, backend choice, autograd Function and fake kernels."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _dispatch, _native, _triton
from .._autograd import apply_function, is_plain_call, traced_to_aten
from ..reference import residual_add as reference
from ..reference.activation import MASKED_ACTIVATIONS, SMOOTH_ACTIVATIONS
from ..reference.layout import empty_output
from ..reference.residual_add import Weight, mask_size, weight_kind
from .batch_norm import check_activation, check_input, check_like, check_tensor

_HALF = (torch.float16, torch.bfloat16)


def check_arguments(
    x: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    alpha_value: float,
    beta_value: float,
    complement: bool,
    activation: str,
) -> None:
    """Raise what the C++ op raises for the same arguments (csrc/residual_add.cpp), before any work.

    For the reference backend and the fake kernels; the compiled op checks for itself.
    """
    check_activation(activation)
    check_input("residual_add", x.unsqueeze(1) if x.dim() == 1 else x)
    check_device("residual", residual, x)
    check_like("residual", residual, x)
    check_weight("alpha", alpha, x)
    check_weight("beta", beta, x)
    if complement and beta is not None:
        raise ValueError("beta should be None with complement=True, which makes it 1 - alpha")


def check_backward_arguments(
    grad_y: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    complement: bool,
    mask: Tensor | None,
    activation: str,
    output_mask: list[bool],
) -> None:
    """Raise what the C++ op raises for the same arguments; for the fake kernel."""
    check_arguments(grad_y, grad_y, alpha, beta, 1.0, 1.0, complement, activation)
    for name, t in (("x", x), ("residual", residual)):
        if t is not None:
            check_like(name, t, grad_y)
    _, _, need_alpha, need_beta = output_mask
    for name, weight, needed in (("alpha", alpha, need_alpha), ("beta", beta, need_beta)):
        if needed and weight is None:
            raise ValueError(f"{name} is None, not a tensor, and has no gradient")
    need_z = activation in SMOOTH_ACTIVATIONS and any(output_mask)
    for name, t, by, needed in (
        ("x", x, "alpha", need_alpha),
        ("residual", residual, "beta", need_beta or (need_alpha and complement)),
    ):
        if t is None and (need_z or needed):
            raise RuntimeError(
                f"{name} should be given for the gradient of {by} and of a smooth activation"
            )
    if activation not in MASKED_ACTIVATIONS:
        if mask is not None and mask.numel() > 0:
            raise RuntimeError("mask should be empty for an activation without one")
        return
    if mask is None:
        raise RuntimeError("mask should be given for relu and leaky_relu")
    check_device("mask", mask, grad_y)
    if mask.dtype != torch.uint8:
        raise RuntimeError(f"mask should have dtype Byte, but got {mask.dtype}")
    if tuple(mask.shape) != mask_size(grad_y):
        raise RuntimeError(
            f"mask should have the size {list(mask_size(grad_y))}, but got {list(mask.shape)}"
        )


def check_device(name: str, t: Tensor, x: Tensor) -> None:
    """Raise unless ``t`` is a strided tensor on the device of the input ``x``."""
    if t.device != x.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but input is on {x.device} and "
            f"{name} is on {t.device}"
        )
    if t.layout != torch.strided:
        raise RuntimeError(f"{name} should be a strided tensor, but has layout {t.layout}")


def check_weight(name: str, weight: Tensor | None, x: Tensor) -> None:
    """Raise unless ``weight`` is None or has one of the three sizes, and a dtype that goes with
    x's."""
    if weight is None:
        return
    check_device(name, weight, x)
    kind = weight_kind(weight, x)
    if kind is None:
        raise RuntimeError(
            f"{name} should have 1 element, the size {list(x.shape[:1])} or "
            f"{[x.size(0), *[1] * (x.dim() - 1)]} for one value per sample, or the size "
            f"{list(x.shape)} of the input, but got size {list(weight.shape)}"
        )
    if kind == "elementwise":
        check_like(name, weight, x)
    elif weight.dtype != x.dtype and not (x.dtype in _HALF and weight.dtype == torch.float32):
        wanted = f"{x.dtype} or torch.float32" if x.dtype in _HALF else f"{x.dtype}"
        raise RuntimeError(
            f"mixed dtype: expect {name} to have dtype {wanted} for an input of {x.dtype}, but "
            f"got {weight.dtype}"
        )


def backward_formulas(
    grad_y: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    alpha_value: float,
    beta_value: float,
    complement: bool,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``residual_add_backward`` in operations that autograd can follow."""
    check_backward_arguments(
        grad_y, x, residual, alpha, beta, complement, mask, activation, output_mask
    )
    return reference.residual_add_backward(
        grad_y,
        x,
        residual,
        alpha,
        beta,
        alpha_value,
        beta_value,
        complement,
        mask,
        activation,
        negative_slope,
        output_mask,
    )


class ResidualAddFunction(torch.autograd.Function):
    """The two passes of the native backend, and what is kept between them.

    Saved: 1 bit per element for relu and leaky_relu; x and residual only for silu, gelu and the
    gradients of weights; the weights that backward multiplies by.
    """

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor,
        alpha: Tensor | None,
        beta: Tensor | None,
        alpha_value: float,
        beta_value: float,
        complement: bool,
        activation: str,
        negative_slope: float,
        backward_alpha: Tensor | None,
        backward_beta: Tensor | None,
        backward_values: tuple[float, float, bool] | None,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.resops.residual_add_forward(
            x,
            residual,
            alpha,
            beta,
            alpha_value,
            beta_value,
            complement,
            activation,
            negative_slope,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, alpha, beta, *values, activation, negative_slope = inputs[:9]
        y, mask = output
        if inputs[11] is not None:
            alpha, beta, values = inputs[9], inputs[10], inputs[11]
        complement = values[2]
        need_x, need_residual, need_alpha, need_beta = ctx.needs_input_grad[:4]
        smooth = activation in SMOOTH_ACTIVATIONS
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if smooth or need_alpha else None,
            residual if smooth or need_beta or (need_alpha and complement) else None,
            alpha if smooth or need_alpha or need_x or (need_residual and complement) else None,
            beta if smooth or need_beta or need_residual else None,
            mask,
        )
        ctx.call = (*values, activation, negative_slope)
        ctx.memory_format = _memory_format(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        native = torch.ops.resops.residual_add_backward
        return ResidualAddFunction.backward_by(native, ctx, grad_y)

    @staticmethod
    def backward_by(
        backward: Callable[..., Any], ctx: Any, grad_y: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 12
        x, residual, alpha, beta, mask = ctx.saved_tensors
        alpha_value, beta_value, complement, activation, negative_slope = ctx.call
        need_x, need_residual, need_alpha, need_beta = ctx.needs_input_grad[:4]
        # As PyTorch's own +: a gradient that equals grad_y is grad_y, and two equal ones are one.
        # (A weight that is a tensor is saved where x or residual needs its gradient.)
        identity = activation == "identity"
        same_x = need_x and identity and alpha is None and alpha_value == 1
        constant_beta = need_residual and beta is None and not complement
        same_residual = constant_beta and identity and beta_value == 1
        shared = constant_beta and need_x and alpha is None and alpha_value == beta_value
        computed = [
            need_x and not same_x,
            need_residual and not same_residual and not shared,
            need_alpha,
            need_beta,
        ]
        grads: tuple[Tensor, ...] = (grad_y,) * 4
        if any(computed):
            if torch.is_grad_enabled():  # create_graph=True
                backward = backward_formulas
            grads = backward(
                _in_memory_order(grad_y, ctx.memory_format),
                x,
                residual,
                alpha,
                beta,
                alpha_value,
                beta_value,
                complement,
                mask,
                activation,
                negative_slope,
                computed,
            )
        grad_x = grad_y if same_x else grads[0]
        grad_residual = grad_y if same_residual else grad_x if shared else grads[1]
        return (
            grad_x if need_x else None,
            grad_residual if need_residual else None,
            grads[2] if need_alpha else None,
            grads[3] if need_beta else None,
            *[None] * 8,
        )


class TritonResidualAddFunction(ResidualAddFunction):
    """The same with the kernels of Triton: so backward keeps the choice made in forward."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor] = _triton_forward(*args[:9])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return ResidualAddFunction.backward_by(_triton_backward, ctx, grad_y)


def _memory_format(y: Tensor) -> torch.memory_format | None:
    """Of a dense output; None for a 1-D channels-last one, whose format has no name."""
    if y.is_contiguous():
        return torch.contiguous_format
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(y.dim())


def _in_memory_order(grad_y: Tensor, memory_format: torch.memory_format | None) -> Tensor:
    """``grad_y`` in the memory order of y, in which the mask is; itself where it already is."""
    if memory_format is None:
        return grad_y.transpose(1, 2).contiguous().transpose(1, 2)
    return grad_y.contiguous(memory_format=memory_format)


class _Weights(NamedTuple):
    """alpha and beta as the ops take them."""

    alpha: Tensor | None
    beta: Tensor | None
    alpha_value: float
    beta_value: float
    complement: bool

    def promoted(self, x: Tensor, dtype: torch.dtype) -> _Weights:
        """Beside an ``x`` promoted to ``dtype``: elementwise tensors are promoted too, others are
        widened where they are the narrower ones."""
        if _fits(self.alpha, dtype) and _fits(self.beta, dtype):
            return self
        return self._replace(
            alpha=_promote(self.alpha, x, dtype), beta=_promote(self.beta, x, dtype)
        )

    def detached(self) -> _Weights:
        alpha, beta = (None if t is None else t.detach() for t in (self.alpha, self.beta))
        return self._replace(alpha=alpha, beta=beta)


def _fits(weight: Tensor | None, dtype: torch.dtype) -> bool:
    return weight is None or weight.dtype == dtype


def _promote(weight: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    if weight is None or weight.dtype == dtype or not weight.is_floating_point():
        return weight
    wider = torch.promote_types(weight.dtype, dtype) == dtype
    return weight.to(dtype) if wider or weight_kind(weight, x) == "elementwise" else weight


def _parse(alpha: Any, beta: Any, suffix: str = "") -> _Weights:
    alpha_tensor, alpha_value = _parse_weight("alpha" + suffix, alpha, "")
    if isinstance(beta, str) and beta == "complement":
        return _Weights(alpha_tensor, None, alpha_value, 1 - alpha_value, alpha_tensor is not None)
    beta_tensor, beta_value = _parse_weight("beta" + suffix, beta, " or 'complement'")
    return _Weights(alpha_tensor, beta_tensor, alpha_value, beta_value, False)


def _parse_weight(name: str, weight: Any, others: str) -> tuple[Tensor | None, float]:
    if isinstance(weight, Tensor):
        return weight, 1.0
    if isinstance(weight, float | int):
        return None, weight
    if isinstance(weight, numbers.Real):
        return None, float(weight)
    error = ValueError if isinstance(weight, str) else TypeError
    raise error(f"{name} must be a number or a tensor{others}, but got {weight!r}")


def _common_dtype(x: Tensor, residual: Tensor, *weights: _Weights) -> torch.dtype:
    """What PyTorch's + and * promote to, where scalar and per-sample weights have no say."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    for weight in (t for w in weights for t in w[:2]):
        if (
            weight is not None
            and weight.dtype != dtype
            and weight.is_floating_point()
            and weight_kind(weight, x) == "elementwise"
        ):
            dtype = torch.promote_types(dtype, weight.dtype)
    return dtype


def residual_add(
    x: Tensor,
    residual: Tensor,
    alpha: Weight = 1.0,
    beta: Weight | str = 1.0,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    alpha_backward: Weight | None = None,
    beta_backward: Weight | str | None = None,
) -> Tensor:
    """See :func:`resops.functional.residual_add`."""
    if activation is None:
        activation = "identity"
    check_tensor("residual_add", "input", x)
    check_tensor("residual_add", "residual", residual)
    if (
        # Constant weights; anything else is converted, or refused by name, below.
        type(alpha) is float
        and type(beta) is float
        and alpha_backward is None
        and beta_backward is None
        and x.dtype == residual.dtype
        and type(activation) is str
        and type(negative_slope) is float
        and is_plain_call((x, residual))
        and _dispatch.choose("residual_add", x) == "native"
    ):
        return _native_residual_add(x, residual, alpha, beta, activation, negative_slope)
    check_activation(activation)
    weights, backward = _parse(alpha, beta), None
    if alpha_backward is not None or beta_backward is not None:
        if activation in SMOOTH_ACTIVATIONS:
            raise ValueError(
                "alpha_backward and beta_backward go with identity, relu and leaky_relu only, "
                f"but activation is {activation!r}"
            )
        backward = _parse(
            alpha if alpha_backward is None else alpha_backward,
            beta if beta_backward is None else beta_backward,
            "_backward",
        )
    dtype = _common_dtype(x, residual, *(w for w in (weights, backward) if w is not None))
    if x.dtype != dtype or residual.dtype != dtype:
        # torch's own + promotes; under autocast a branch may come in another dtype.
        x, residual = x.to(dtype), residual.to(dtype)
    weights = weights.promoted(x, dtype)
    if backward is not None:
        weights, backward = weights.detached(), backward.promoted(x, dtype).detached()
        check_weight("alpha_backward", backward.alpha, x)
        check_weight("beta_backward", backward.beta, x)

    chosen = _dispatch.choose("residual_add", x)
    if chosen == "reference" or traced_to_aten():
        check_arguments(x, residual, *weights, activation)
        return reference.residual_add(
            x, residual, *_as_given(weights), activation, negative_slope, *_as_given(backward)
        )
    triton = chosen == "triton"
    if triton:
        check_arguments(x, residual, *weights, activation)
    if torch.is_grad_enabled():
        tensors = (None, None) if backward is None else backward[:2]
        values = None if backward is None else backward[2:]
        return apply_function(
            TritonResidualAddFunction if triton else ResidualAddFunction,
            x,
            residual,
            *weights,
            activation,
            negative_slope,
            *tensors,
            values,
        )[0]
    forward = _triton_forward if triton else torch.ops.resops.residual_add_forward
    return forward(x, residual, *weights, activation, negative_slope)[0]


def _as_given(weights: _Weights | None) -> tuple[Any, Any]:
    """alpha and beta as the definition takes them."""
    if weights is None:
        return None, None
    alpha = weights.alpha_value if weights.alpha is None else weights.alpha
    beta = weights.beta_value if weights.beta is None else weights.beta
    return alpha, "complement" if weights.complement else beta


# Fake kernels: sizes, dtypes and strides of what the compiled ops return.


def _fake_forward(
    x: Tensor,
    residual: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    alpha_value: float,
    beta_value: float,
    complement: bool,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    check_arguments(x, residual, alpha, beta, alpha_value, beta_value, complement, activation)
    size = mask_size(x) if activation in MASKED_ACTIVATIONS else (0,)
    return empty_output(x), torch.empty(size, dtype=torch.uint8, device=x.device)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    alpha_value: float,
    beta_value: float,
    complement: bool,
    mask: Tensor | None,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_backward_arguments(
        grad_y, x, residual, alpha, beta, complement, mask, activation, output_mask
    )

    def like_x(needed: bool) -> Tensor:
        return empty_output(grad_y) if needed else grad_y.new_empty(0)

    def like_weight(weight: Tensor | None, needed: bool) -> Tensor:
        if weight is None or not needed:
            dtype = torch.float64 if grad_y.dtype == torch.float64 else torch.float32
            return grad_y.new_empty(0, dtype=dtype if weight is None else weight.dtype)
        if weight_kind(weight, grad_y) == "elementwise":
            return empty_output(grad_y)
        return weight.new_empty(weight.shape)

    return (
        like_x(output_mask[0]),
        like_x(output_mask[1]),
        like_weight(alpha, output_mask[2]),
        like_weight(beta, output_mask[3]),
    )


if _native.module is not None:
    torch.library.impl(
        "resops::residual_add_backward_formulas", "CompositeImplicitAutograd", backward_formulas
    )
    torch.library.register_fake("resops::residual_add_forward", _fake_forward)
    torch.library.register_fake("resops::residual_add_backward", _fake_backward)
    _native_residual_add = _native.module.residual_add

_triton_forward, _triton_backward = (
    _triton.register("residual_add", phase, getattr(reference, f"residual_add_{phase}"), fake)
    for phase, fake in (("forward", _fake_forward), ("backward", _fake_backward))
)
