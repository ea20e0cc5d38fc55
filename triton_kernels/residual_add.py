"""``residual_add``: y = act(alpha * x + beta * residual), and all four gradients.

A dense tensor (N, *) is walked as rows of ``width`` contiguous elements: one row per sample, or all
of it as one row where no weight and no padding of the mask tells samples apart. A program does one
block of one row and reads everything once. What kind each weight is, is a compile-time flag. The
gradient of a weight that spans a row is a sum of two stages: every program stores the sum of its
block, and a second kernel adds these in their order, so that the bits are the same in every run.
docs/math/residual_add.md has the formulas.

fp32, bf16 and fp16 tensors, computed in fp32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of a kernel are pointers and numbers, typed when it is compiled)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import ACTIVATIONS, MASKED, SMOOTH, activate, blocked_gradient, smooth_gradient
from .launch import check_like, dense, device_of, empty_output

_BLOCK = 1024  # elements of a program; a multiple of 8, so that it owns its bytes of the mask


@triton.jit
def _load(ptr, offsets, valid):
    return tl.load(ptr + offsets, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _weight(ptr, value, row, offsets, valid, KIND: tl.constexpr):
    """A weight along one row; KIND is constant, scalar, per_sample or elementwise."""
    if KIND == "elementwise":
        weight = _load(ptr, offsets, valid)
    elif KIND == "per_sample":
        weight = tl.load(ptr + row).to(tl.float32)
    elif KIND == "scalar":
        weight = tl.load(ptr).to(tl.float32)
    else:
        weight = tl.cast(value, tl.float32)  # a float64 under torch.compile
    return weight


@triton.jit
def _weights(
    alpha_ptr,
    beta_ptr,
    alpha_value,
    beta_value,
    row,
    offsets,
    valid,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
):
    """alpha and beta along one row; BETA may be complement: 1 - alpha."""
    alpha = _weight(alpha_ptr, alpha_value, row, offsets, valid, ALPHA)
    if BETA == "complement":
        beta = 1.0 - alpha
    else:
        beta = _weight(beta_ptr, beta_value, row, offsets, valid, BETA)
    return alpha, beta


@triton.jit
def _block(width, blocks, BLOCK: tl.constexpr):
    """Row, which of its columns exist, and offsets in memory of this program's elements."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, columns < width, row * width + columns


@triton.jit
def _mask_bytes(mask_step, blocks, BLOCK: tl.constexpr):
    """Offsets of this program's bytes of the mask, and which exist: ``mask_step`` in a row."""
    program = tl.program_id(0).to(tl.int64)
    byte = program % blocks * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    return program // blocks * mask_step + byte, byte < mask_step


@triton.jit
def residual_add_forward_kernel(
    x_ptr,
    residual_ptr,
    alpha_ptr,
    beta_ptr,
    y_ptr,
    mask_ptr,
    alpha_value,
    beta_value,
    negative_slope,
    width,
    mask_step,
    blocks,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, valid, offsets = _block(width, blocks, BLOCK)
    alpha, beta = _weights(
        alpha_ptr, beta_ptr, alpha_value, beta_value, row, offsets, valid, ALPHA, BETA
    )
    z = alpha * _load(x_ptr, offsets, valid) + beta * _load(residual_ptr, offsets, valid)
    y = activate(z, tl.cast(negative_slope, tl.float32), ACTIVATION)
    if ACTIVATION == "relu" or ACTIVATION == "leaky_relu":
        bits = tl.where(valid, tl.where(z <= 0, 0, 1), 0)  # 1 where z is NaN
        bits = tl.reshape(bits, (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
        packed = tl.sum(bits, axis=1).to(tl.uint8)
        places, exist = _mask_bytes(mask_step, blocks, BLOCK)
        tl.store(mask_ptr + places, packed, mask=exist)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def residual_add_backward_kernel(
    grad_y_ptr,
    x_ptr,
    residual_ptr,
    alpha_ptr,
    beta_ptr,
    mask_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    grad_alpha_ptr,  # like x, or one sum per program
    grad_beta_ptr,
    alpha_value,
    beta_value,
    negative_slope,
    width,
    mask_step,
    blocks,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    NEED_ALPHA: tl.constexpr,
    NEED_BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, valid, offsets = _block(width, blocks, BLOCK)
    g = _load(grad_y_ptr, offsets, valid)
    SMOOTH: tl.constexpr = ACTIVATION == "silu" or ACTIVATION == "gelu"
    if NEED_X or NEED_RESIDUAL or SMOOTH:
        alpha, beta = _weights(
            alpha_ptr, beta_ptr, alpha_value, beta_value, row, offsets, valid, ALPHA, BETA
        )
    if ACTIVATION == "relu" or ACTIVATION == "leaky_relu":
        places, exist = _mask_bytes(mask_step, blocks, BLOCK)
        packed = tl.load(mask_ptr + places, mask=exist, other=0).to(tl.int32)
        bits = packed[:, None] >> tl.arange(0, 8)[None, :]
        blocked = tl.reshape(bits & 1, (BLOCK,)) == 0
        g = blocked_gradient(g, blocked, tl.cast(negative_slope, tl.float32), ACTIVATION)
    elif SMOOTH:
        z = alpha * _load(x_ptr, offsets, valid) + beta * _load(residual_ptr, offsets, valid)
        g = smooth_gradient(g, z, ACTIVATION)
    if NEED_X or NEED_RESIDUAL:
        if NEED_X:
            tl.store(grad_x_ptr + offsets, (alpha * g).to(grad_x_ptr.dtype.element_ty), mask=valid)
        if NEED_RESIDUAL:
            grad_residual = (beta * g).to(grad_residual_ptr.dtype.element_ty)
            tl.store(grad_residual_ptr + offsets, grad_residual, mask=valid)
    if NEED_ALPHA:
        factor = _load(x_ptr, offsets, valid)
        if BETA == "complement":
            factor -= _load(residual_ptr, offsets, valid)
        _store_weight_grad(grad_alpha_ptr, g * factor, offsets, valid, ALPHA)
    if NEED_BETA:
        product = g * _load(residual_ptr, offsets, valid)
        _store_weight_grad(grad_beta_ptr, product, offsets, valid, BETA)


@triton.jit
def _store_weight_grad(ptr, product, offsets, valid, KIND: tl.constexpr):
    if KIND == "elementwise":
        tl.store(ptr + offsets, product.to(ptr.dtype.element_ty), mask=valid)
    else:
        tl.store(ptr + tl.program_id(0).to(tl.int64), tl.sum(product, axis=0))


@triton.jit
def residual_add_backward_sum_kernel(sums_ptr, grad_ptr, count, BLOCK: tl.constexpr):
    """The sum of ``count`` values for every program, in double and in their order."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, count, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(sums_ptr + row * count + columns, mask=columns < count, other=0.0)
        total += values.to(tl.float64)
    result = tl.sum(total, axis=0).to(tl.float32)
    tl.store(grad_ptr + row, result.to(grad_ptr.dtype.element_ty))


# ---- launchers ----------------------------------------------------------------------------------


def residual_add_forward(
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
    """y, like x, and the mask: (N, ceil(L / 8)) bytes after relu and leaky_relu, else empty.

    Raises:
        NotImplementedError: a dtype or an activation that these kernels do not have.
        ValueError: a size that does not fit.
    """
    _check(x, activation, residual=residual)
    kinds = _kinds(x, alpha, beta, complement)
    y = empty_output(x)
    masked = activation in MASKED
    size = (x.size(0), (_length(x) + 7) // 8) if masked else (0,)
    mask = torch.empty(size, dtype=torch.uint8, device=x.device)
    if x.numel() == 0:
        return y, mask
    rows, width, block = _walk(x, kinds, masked)
    blocks = triton.cdiv(width, block)
    with device_of(x):
        residual_add_forward_kernel[(rows * blocks,)](
            dense(x, y),
            dense(residual, y),
            _values(alpha, kinds[0], y),
            _values(beta, kinds[1], y),
            y,
            mask,
            float(alpha_value),
            float(beta_value),
            float(negative_slope),
            width,
            triton.cdiv(width, 8),
            blocks,
            ALPHA=kinds[0],
            BETA=kinds[1],
            ACTIVATION=activation,
            BLOCK=block,
        )
    return y, mask


def residual_add_backward(
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
    """Gradients of x, residual, alpha and beta; those not in ``output_mask`` are empty.

    Args:
        grad_y: in the memory order of y, in which the mask's bits are.
        x, residual: where a weight's gradient or a smooth activation needs them.

    Raises:
        NotImplementedError: a dtype or an activation that these kernels do not have.
        ValueError: a size that does not fit; a tensor that is needed and None.
    """
    _check(grad_y, activation, x=x, residual=residual)
    kinds = _kinds(grad_y, alpha, beta, complement)
    need_x, need_residual, need_alpha, need_beta = output_mask
    smooth = activation in SMOOTH and any(output_mask)
    with_x = need_alpha or smooth
    with_residual = need_beta or (need_alpha and complement) or smooth
    for name, t, needed in (
        ("x", x, with_x),
        ("residual", residual, with_residual),
        ("alpha", alpha, need_alpha),
        ("beta", beta, need_beta),
        ("mask", mask, activation in MASKED),
    ):
        if needed and t is None:
            raise ValueError(f"{name} should be given for this activation and output_mask")
    masked = activation in MASKED
    if masked and mask is not None:
        size = (grad_y.size(0), (_length(grad_y) + 7) // 8)
        if (tuple(mask.shape), mask.dtype, mask.device) != (size, torch.uint8, grad_y.device):
            raise ValueError(
                f"mask should have {list(size)} bytes on {grad_y.device}, but got {mask.dtype} of "
                f"size {list(mask.shape)} on {mask.device}"
            )
    rows, width, block = _walk(grad_y, kinds, masked)
    blocks = triton.cdiv(width, block)
    like_x = empty_output(grad_y)
    grad_x = torch.empty_like(like_x) if need_x else grad_y.new_empty(0)
    grad_residual = torch.empty_like(like_x) if need_residual else grad_y.new_empty(0)
    # What the kernel writes, and what comes of it.
    written: list[Tensor | None] = []
    grads: list[Tensor] = []
    for weight, kind, needed in ((alpha, kinds[0], need_alpha), (beta, kinds[1], need_beta)):
        if weight is None or not needed:
            dtype = torch.float32 if weight is None else weight.dtype
            written.append(None)
            grads.append(grad_y.new_empty(0, dtype=dtype))
        elif kind == "elementwise":
            grads.append(torch.empty_like(like_x))
            written.append(grads[-1])
        else:
            grads.append(weight.new_zeros(weight.shape))
            written.append(grad_y.new_empty(rows * blocks, dtype=torch.float32))
    if grad_y.numel() > 0 and any(output_mask):
        if masked:
            assert mask is not None
            mask = mask.contiguous()
        with device_of(grad_y):
            residual_add_backward_kernel[(rows * blocks,)](
                dense(grad_y, like_x),
                dense(x, like_x) if x is not None and with_x else None,
                dense(residual, like_x) if residual is not None and with_residual else None,
                _values(alpha, kinds[0], like_x),
                _values(beta, kinds[1], like_x),
                mask if masked else None,
                grad_x if need_x else None,
                grad_residual if need_residual else None,
                *written,
                float(alpha_value),
                float(beta_value),
                float(negative_slope),
                width,
                triton.cdiv(width, 8),
                blocks,
                ALPHA=kinds[0],
                BETA=kinds[1],
                ACTIVATION=activation,
                NEED_X=need_x,
                NEED_RESIDUAL=need_residual,
                NEED_ALPHA=need_alpha,
                NEED_BETA=need_beta,
                BLOCK=block,
            )
            for sums, grad, kind in zip(written, grads, kinds, strict=True):
                if sums is not None and kind != "elementwise":
                    count = sums.numel() // grad.numel()
                    residual_add_backward_sum_kernel[(grad.numel(),)](
                        sums, grad, count, BLOCK=_power_of_2(count)
                    )
    return grad_x, grad_residual, grads[0], grads[1]


def _check(like: Tensor, activation: str, **tensors: Tensor | None) -> None:
    if activation not in ACTIVATIONS:
        raise NotImplementedError(
            f"residual_add of triton has {', '.join(ACTIVATIONS)}, but not {activation!r}"
        )
    if like.dim() == 0:
        raise ValueError("residual_add expects an input of size (N, *), but got 0-D input")
    check_like("residual_add", like, **tensors)


def _kinds(x: Tensor, alpha: Tensor | None, beta: Tensor | None, complement: bool) -> list[str]:
    kinds = []
    column = torch.Size([*x.shape[:1], *[1] * (x.dim() - 1)])
    for name, t in (("alpha", alpha), ("beta", beta)):
        if t is None:
            kinds.append("constant")
        elif t.numel() == 1:
            kinds.append("scalar")
        elif t.shape in (x.shape[:1], column):
            kinds.append("per_sample")
        elif t.shape == x.shape:
            kinds.append("elementwise")
        else:
            raise ValueError(
                f"{name} should have 1 element, the size {list(x.shape[:1])} or {list(column)} "
                f"for one value per sample, or the size {list(x.shape)} of the input, but got "
                f"size {list(t.shape)}"
            )
    if complement:
        if beta is not None:
            raise ValueError("beta should be None with complement=True, which makes it 1 - alpha")
        kinds[1] = "complement"
    return kinds


def _length(x: Tensor) -> int:
    return math.prod(x.shape[1:])


def _power_of_2(count: int) -> int:
    return min(max(triton.next_power_of_2(count), 8), _BLOCK)


def _walk(x: Tensor, kinds: list[str], masked: bool) -> tuple[int, int, int]:
    """Rows, elements of a row, and of a program."""
    one_row = "per_sample" not in kinds and (not masked or _length(x) % 8 == 0)
    rows, width = (1, x.numel()) if one_row else (x.size(0), _length(x))
    return rows, width, _power_of_2(width)


def _values(weight: Tensor | None, kind: str, like: Tensor) -> Tensor | None:
    """A weight's values one after the other."""
    if weight is None:
        return None
    return dense(weight, like) if kind == "elementwise" else weight.contiguous()
