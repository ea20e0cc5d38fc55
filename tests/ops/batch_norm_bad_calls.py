"""Wrong calls of batch_norm, and what each must raise. Run by tests/subprocess_calls.py.

Most of them crash torch's own raw ops, or read out of bounds there in silence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import resops
from resops.functional import batch_norm_act

N, C, H, W = 4, 6, 3, 5
NAN = math.nan


class Bad(NamedTuple):
    call: Callable[[], object]
    error: str  # classes, separated by |
    message: str  # a regular expression


def f32(*size: int, **kwargs: Any) -> torch.Tensor:
    return torch.ones(size, **kwargs)


def x_like(**kwargs: Any) -> torch.Tensor:
    return torch.arange(N * C * H * W, dtype=torch.float32).view(N, C, H, W).to(**kwargs)


def sparse() -> torch.Tensor:
    return x_like().to_sparse()


def meta(*size: int) -> torch.Tensor:
    return torch.empty(size, device="meta")


VALUE, RUNTIME, MISSING = "ValueError", "RuntimeError", "NotImplementedError"
SCHEMA = "RuntimeError|TypeError"  # refused by torch's own binding, which names the argument


def elements(name: str, got: int) -> str:
    return f"{name} should contain {C} elements not {got}"


# name: (replaced arguments, error, message); for the public function and for the op itself.
FORWARD: dict[str, tuple[dict[str, Any], str, str]] = {
    "running_mean_short": ({"running_mean": f32(C - 1)}, RUNTIME, elements("running_mean", C - 1)),
    "running_mean_long": ({"running_mean": f32(C + 1)}, RUNTIME, elements("running_mean", C + 1)),
    "running_var_empty": ({"running_var": f32(0)}, RUNTIME, elements("running_var", 0)),
    "running_var_one": ({"running_var": f32(1)}, RUNTIME, elements("running_var", 1)),
    "running_var_short": ({"running_var": f32(C - 1)}, RUNTIME, elements("running_var", C - 1)),
    "running_var_huge": ({"running_var": f32(1000)}, RUNTIME, elements("running_var", 1000)),
    "running_mean_2d": ({"running_mean": f32(C, 1)}, RUNTIME, "running_mean should be a vector"),
    "running_mean_float64": (
        {"running_mean": f32(C).double(), "running_var": f32(C).double()},
        RUNTIME,
        "mixed dtype.*running_mean",
    ),
    "running_mean_and_var_of_two_dtypes": (
        {"running_var": f32(C).double()},
        RUNTIME,
        "mixed dtype.*running_var",
    ),
    "running_mean_integer": (
        {"running_mean": f32(C).long(), "running_var": f32(C).long()},
        RUNTIME,
        "mixed dtype.*running_mean",
    ),
    "running_mean_on_meta": ({"running_mean": meta(C)}, RUNTIME, "device"),
    "running_var_on_meta": ({"running_var": meta(C)}, RUNTIME, "device"),
    "running_mean_requires_grad": (
        {"running_mean": f32(C).requires_grad_()},
        RUNTIME,
        "not differentiable with respect to argument 'running_mean'",
    ),
    "running_mean_sparse": (
        {"running_mean": f32(C).to_sparse(), "running_var": f32(C).to_sparse()},
        f"{RUNTIME}|{MISSING}",
        "running_mean|layout|Sparse",
    ),
    "only_running_mean": (
        {"running_var": None},
        VALUE,
        "running_mean and running_var must either both be None or neither be None",
    ),
    "only_running_var": (
        {"running_mean": None},
        VALUE,
        "running_mean and running_var must either both be None or neither be None",
    ),
    "evaluation_without_statistics": (
        {"running_mean": None, "running_var": None, "training": False},
        RUNTIME,
        "running_mean must be defined in evaluation mode",
    ),
    "evaluation_without_running_var": (
        {"running_var": None, "training": False},
        RUNTIME,
        "running_var must be defined in evaluation mode",
    ),
    "evaluation_with_short_running_var": (
        {"running_var": f32(C - 1), "training": False},
        RUNTIME,
        elements("running_var", C - 1),
    ),
    "weight_short": ({"weight": f32(C - 1)}, RUNTIME, elements("weight", C - 1)),
    "weight_empty": ({"weight": f32(0)}, RUNTIME, elements("weight", 0)),
    "weight_10d": ({"weight": f32(C, *[1] * 9)}, RUNTIME, "weight should be a vector"),
    "weight_10d_long": ({"weight": f32(C, *[2] * 9)}, RUNTIME, elements("weight", C * 512)),
    "weight_on_meta": ({"weight": meta(C)}, RUNTIME, "device"),
    "weight_integer": ({"weight": f32(C).int(), "bias": None}, RUNTIME, "mixed dtype.*weight"),
    "weight_complex": (
        {"weight": f32(C).to(torch.complex64), "bias": None},
        RUNTIME,
        "mixed dtype.*weight",
    ),
    "bias_short": ({"bias": f32(C - 1)}, RUNTIME, elements("bias", C - 1)),
    "bias_scalar": ({"bias": torch.tensor(1.0)}, RUNTIME, elements("bias", 1)),
    "weight_bf16_bias_float32": (
        {"x": x_like(dtype=torch.bfloat16), "weight": f32(C).bfloat16()},
        RUNTIME,
        "mixed dtype.*weight and bias",
    ),
    "float32_with_bf16_parameters": (
        {"weight": f32(C).bfloat16(), "bias": f32(C).bfloat16()},
        RUNTIME,
        "mixed dtype.*weight",
    ),
    "float32_with_float64_parameters": (
        {"weight": f32(C).double(), "bias": f32(C).double()},
        RUNTIME,
        "mixed dtype.*weight",
    ),
    "float64_with_float32_parameters": (
        {"x": x_like(dtype=torch.float64)},
        RUNTIME,
        "mixed dtype.*weight",
    ),
    "fp16_with_bf16_parameters": (
        {"x": x_like(dtype=torch.float16), "weight": f32(C).bfloat16(), "bias": None},
        RUNTIME,
        "mixed dtype.*weight",
    ),
    "input_integer": ({"x": x_like(dtype=torch.int32)}, MISSING, "not implemented for"),
    "input_bool": ({"x": x_like(dtype=torch.bool)}, MISSING, "not implemented for"),
    "input_complex": ({"x": x_like(dtype=torch.complex64)}, MISSING, "not implemented for"),
    "input_float8": (
        {"x": x_like(dtype=torch.float8_e4m3fn)},
        MISSING,
        "not implemented for",
    ),
    "input_sparse": ({"x": sparse()}, f"{MISSING}|{RUNTIME}", "layout|Sparse"),
    "input_1d": ({"x": f32(C)}, VALUE, "1-D input"),
    "input_0d": ({"x": torch.tensor(1.0)}, VALUE, "0-D input"),
    "input_one_value_per_channel": (
        {"x": f32(1, C, 1, 1)},
        VALUE,
        r"Expected more than 1 value per channel when training, got input size "
        r"torch\.Size\(\[1, 6, 1, 1\]\)",
    ),
    "input_of_other_channels": ({"x": f32(4, C + 1, 3, 5)}, RUNTIME, "should contain 7 elements"),
    "eps_zero": ({"eps": 0.0}, VALUE, "batch_norm eps must be positive during training, but got 0"),
    "eps_negative": ({"eps": -1.0}, VALUE, "eps must be positive during training, but got -1"),
    "eps_negative_in_evaluation": (
        {"eps": -1.0, "training": False},
        VALUE,
        "batch_norm eps must be non-negative, but got -1",
    ),
    "eps_nan": ({"eps": NAN}, VALUE, "eps must be positive during training, but got nan"),
    "eps_nan_in_evaluation": (
        {"eps": NAN, "training": False},
        VALUE,
        "eps must be non-negative, but got nan",
    ),
    "momentum_nan": ({"momentum": NAN}, VALUE, "momentum must be a number, but got nan"),
    "residual_half_batch": (
        {"residual": f32(N // 2, C, H, W)},
        RUNTIME,
        r"residual should have the size \[4, 6, 3, 5\] of the input, but got \[2, 6, 3, 5\]",
    ),
    "residual_broadcastable": ({"residual": f32(1, C, 1, 1)}, RUNTIME, "residual should have the"),
    "residual_1d": ({"residual": f32(C)}, RUNTIME, "residual should have the size"),
    "residual_empty": ({"residual": f32(0)}, RUNTIME, "residual should have the size"),
    "residual_on_meta": ({"residual": meta(N, C, H, W)}, RUNTIME, "device"),
    "activation_unknown": (
        {"activation": "tanh"},
        VALUE,
        "activation must be one of identity, relu, leaky_relu, silu, gelu, but got 'tanh'",
    ),
    "activation_empty": ({"activation": ""}, VALUE, "activation must be one of"),
}

GOOD: dict[str, Any] = {
    "x": None,
    "residual": None,
    "weight": f32(C),
    "bias": f32(C),
    "running_mean": f32(C),
    "running_var": f32(C),
    "training": True,
    "momentum": 0.1,
    "eps": 1e-5,
    "activation": "relu",
    "negative_slope": 0.01,
}


def functional(backend: str, **changes: Any) -> None:
    a = {**GOOD, "x": x_like(), **changes}
    with resops.backend(backend):
        batch_norm_act(a.pop("x"), **a)


def op_forward(**changes: Any) -> None:
    torch.ops.resops.batch_norm_forward(*{**GOOD, "x": x_like(), **changes}.values())


def fake_forward(**changes: Any) -> None:
    """The fake kernel refuses what the real one refuses: a compiled program fails early."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    a = {**GOOD, "x": x_like(), **changes}
    with FakeTensorMode() as mode:
        convert = mode.fake_tensor_converter.from_real_tensor
        fakes = [convert(mode, v) if isinstance(v, torch.Tensor) else v for v in a.values()]
        torch.ops.resops.batch_norm_forward(*fakes)


BAD: dict[str, Bad] = {}
for _name, (_changes, _error, _message) in FORWARD.items():
    _callers: dict[str, Callable[..., None]] = {
        "functional": functools.partial(functional, "auto"),
        "reference": functools.partial(functional, "reference"),
        "op_forward": op_forward,
        "fake_forward": fake_forward,
    }
    for _prefix, _call in _callers.items():
        if _prefix == "fake_forward" and ("sparse" in _name or "meta" in _name):
            continue  # torch's fake tensors refuse these themselves
        BAD[f"{_prefix}_{_name}"] = Bad(functools.partial(_call, **_changes), _error, _message)

# Only the op: the public function promotes or names these differently.
BAD |= {
    "op_forward_residual_dtype": Bad(
        functools.partial(op_forward, residual=x_like(dtype=torch.bfloat16)),
        RUNTIME,
        "residual should have the dtype",
    ),
    "op_forward_activation_none": Bad(
        functools.partial(op_forward, activation=None), SCHEMA, "activation"
    ),
    "op_forward_momentum_none": Bad(
        functools.partial(op_forward, momentum=None), SCHEMA, "momentum"
    ),
    "op_forward_input_none": Bad(
        lambda: torch.ops.resops.batch_norm_forward(
            None, None, None, None, None, None, True, 0.1, 1e-5, "relu", 0.0
        ),
        MISSING,
        "no tensor arguments",
    ),
    "functional_process_group": Bad(
        lambda: batch_norm_act(x_like(), None, None, training=True, process_group=object()),
        "TypeError",
        "process_group",
    ),
    "functional_momentum_none": Bad(
        lambda: batch_norm_act(x_like(), f32(C), f32(C), training=True, momentum=None),
        "TypeError|RuntimeError",
        "momentum",
    ),
    "functional_input_array": Bad(
        lambda: batch_norm_act(x_like().numpy(), None, None, training=True),
        "TypeError",
        "input",
    ),
    "functional_residual_integer": Bad(
        lambda: batch_norm_act(
            x_like(), None, None, training=True, residual=x_like(dtype=torch.complex64)
        ),
        f"{MISSING}|{RUNTIME}",
        "residual|not implemented",
    ),
}


# ---- the other ops ------------------------------------------------------------------------------


def mask_bytes() -> torch.Tensor:
    return torch.full((N * C * ((H * W + 7) // 8),), 255, dtype=torch.uint8)


def op_apply(**changes: Any) -> None:
    a = {
        "x": x_like(),
        "residual": None,
        "weight": f32(C),
        "bias": f32(C),
        "mean": f32(C),
        "invstd": f32(C),
        "activation": "relu",
        "negative_slope": 0.01,
        **changes,
    }
    torch.ops.resops.batch_norm_apply(*a.values())


SAVED: dict[str, Any] = {
    "grad_y": None,
    "x": None,
    "residual": None,
    "mask": None,
    "weight": f32(C),
    "bias": f32(C),
    "mean": f32(C),
    "invstd": f32(C),
}


def op_backward_reduce(**changes: Any) -> None:
    a = {**SAVED, "grad_y": x_like(), "x": x_like(), "act": "relu", "slope": 0.01, **changes}
    torch.ops.resops.batch_norm_backward_reduce(*a.values())


def op_backward_apply(**changes: Any) -> None:
    a = {
        **SAVED,
        "grad_y": x_like(),
        "x": x_like(),
        "mean_grad": f32(C),
        "mean_grad_xhat": f32(C),
        "act": "relu",
        "slope": 0.01,
        "need_grad_x": True,
        "need_grad_residual": True,
        **changes,
    }
    torch.ops.resops.batch_norm_backward_apply(*a.values())


def op_backward(**changes: Any) -> None:
    a = {
        **SAVED,
        "grad_y": x_like(),
        "x": x_like(),
        "training": True,
        "act": "relu",
        "slope": 0.01,
        "output_mask": [True] * 4,
        **changes,
    }
    torch.ops.resops.batch_norm_backward(*a.values())


STATISTICS: dict[str, tuple[dict[str, Any], str, str]] = {
    "mean_short": ({"mean": f32(C - 1)}, RUNTIME, elements("mean", C - 1)),
    "mean_empty": ({"mean": f32(0)}, RUNTIME, elements("mean", 0)),
    "mean_2d": ({"mean": f32(1, C)}, RUNTIME, "mean should be a vector"),
    "mean_float64": ({"mean": f32(C).double()}, RUNTIME, "mean should have dtype"),
    "mean_bf16": ({"mean": f32(C).bfloat16()}, RUNTIME, "mean should have dtype"),
    "mean_on_meta": ({"mean": meta(C)}, RUNTIME, "device"),
    "invstd_short": ({"invstd": f32(C - 1)}, RUNTIME, elements("invstd", C - 1)),
    "invstd_of_another_shape_than_mean": ({"invstd": f32(C, 2)}, RUNTIME, "invstd"),
    "invstd_integer": ({"invstd": f32(C).int()}, RUNTIME, "invstd should have dtype"),
    "weight_short": ({"weight": f32(C - 1)}, RUNTIME, elements("weight", C - 1)),
    "weight_10d": ({"weight": f32(C, *[1] * 9)}, RUNTIME, "weight should be a vector"),
    "bias_long": ({"bias": f32(C + 9)}, RUNTIME, elements("bias", C + 9)),
    "input_integer": ({"x": x_like(dtype=torch.int64)}, MISSING, "not implemented for"),
    "input_1d": ({"x": f32(C)}, VALUE, "1-D input"),
}
GRADIENTS: dict[str, tuple[dict[str, Any], str, str]] = {
    **STATISTICS,
    "grad_y_half_batch": (
        {"grad_y": f32(N // 2, C, H, W)},
        RUNTIME,
        r"grad_y should have the size \[4, 6, 3, 5\] of the input, but got \[2, 6, 3, 5\]",
    ),
    "grad_y_transposed": ({"grad_y": f32(N, C, W, H)}, RUNTIME, "grad_y should have the size"),
    "grad_y_flat": ({"grad_y": f32(N * C * H * W)}, RUNTIME, "grad_y should have the size"),
    "grad_y_empty": ({"grad_y": f32(0)}, RUNTIME, "grad_y should have the size"),
    "grad_y_of_another_dtype": (
        {"grad_y": x_like(dtype=torch.float16)},
        RUNTIME,
        "grad_y should have the dtype",
    ),
    "grad_y_on_meta": ({"grad_y": meta(N, C, H, W)}, RUNTIME, "device"),
    "grad_y_sparse": ({"grad_y": sparse()}, f"{RUNTIME}|{MISSING}", "grad_y|layout|Sparse"),
    "mask_short": ({"mask": mask_bytes()[:-1]}, RUNTIME, "mask should be a vector of 48 bytes"),
    "mask_one_byte": ({"mask": mask_bytes()[:1]}, RUNTIME, "mask should be a vector of 48 bytes"),
    "mask_long": ({"mask": torch.cat([mask_bytes()] * 2)}, RUNTIME, "mask should be a vector"),
    "mask_2d": ({"mask": mask_bytes().view(2, -1)}, RUNTIME, "mask should be a vector"),
    "mask_bool": ({"mask": mask_bytes().bool()}, RUNTIME, "mask should have dtype"),
    "mask_of_floats": ({"mask": x_like()}, RUNTIME, "mask should have dtype"),
    "mask_of_an_activation_without": (
        {"mask": mask_bytes(), "act": "silu"},
        RUNTIME,
        "mask should be empty",
    ),
    "residual_half_batch": (
        {"residual": f32(N // 2, C, H, W), "act": "silu"},
        RUNTIME,
        "residual should have the size",
    ),
    "residual_of_another_dtype": (
        {"residual": x_like(dtype=torch.float64), "act": "gelu"},
        RUNTIME,
        "residual should have the dtype",
    ),
    "activation_unknown": ({"act": "softplus"}, VALUE, "activation must be one of"),
}
SUMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "mean_grad_short": ({"mean_grad": f32(C - 1)}, RUNTIME, elements("mean_grad", C - 1)),
    "mean_grad_xhat_short": ({"mean_grad_xhat": f32(1)}, RUNTIME, elements("mean_grad_xhat", 1)),
    "mean_grad_float64": ({"mean_grad": f32(C).double()}, RUNTIME, "mean_grad should have dtype"),
    "only_mean_grad": (
        {"mean_grad_xhat": None},
        VALUE,
        "mean_grad and mean_grad_xhat must either both be None or neither be None",
    ),
    "only_mean_grad_xhat": ({"mean_grad": None}, VALUE, "mean_grad and mean_grad_xhat must"),
    "need_nothing_but_wrong_mean_grad": (
        {"mean_grad": f32(C + 1), "need_grad_x": False, "need_grad_residual": False},
        RUNTIME,
        elements("mean_grad", C + 1),
    ),
}
APPLY: dict[str, tuple[dict[str, Any], str, str]] = {
    **STATISTICS,
    "residual_half_batch": (
        {"residual": f32(N // 2, C, H, W)},
        RUNTIME,
        "residual should have the size",
    ),
    "residual_of_another_dtype": (
        {"residual": x_like(dtype=torch.bfloat16)},
        RUNTIME,
        "residual should have the dtype",
    ),
    "activation_unknown": ({"activation": "elu"}, VALUE, "activation must be one of"),
}
for _op, _table in (
    (op_apply, APPLY),
    (op_backward_reduce, GRADIENTS),
    (op_backward_apply, {**GRADIENTS, **SUMS}),
    (op_backward, GRADIENTS),
):
    for _name, (_changes, _error, _message) in _table.items():
        BAD[f"{_op.__name__}_{_name}"] = Bad(functools.partial(_op, **_changes), _error, _message)

BAD |= {
    "op_backward_output_mask_short": Bad(
        functools.partial(op_backward, output_mask=[True, False]), SCHEMA, "array of size 4"
    ),
    "op_backward_output_mask_long": Bad(
        functools.partial(op_backward, output_mask=[True] * 5), SCHEMA, "array of size 4"
    ),
    "op_statistics_1d": Bad(
        lambda: torch.ops.resops.batch_norm_statistics(f32(C)), VALUE, "1-D input"
    ),
    "op_statistics_0d": Bad(
        lambda: torch.ops.resops.batch_norm_statistics(torch.tensor(1.0)), VALUE, "0-D input"
    ),
    "op_statistics_integer": Bad(
        lambda: torch.ops.resops.batch_norm_statistics(x_like(dtype=torch.uint8)),
        MISSING,
        "not implemented for",
    ),
    "op_statistics_sparse": Bad(
        lambda: torch.ops.resops.batch_norm_statistics(sparse()),
        f"{MISSING}|{RUNTIME}",
        "layout|Sparse",
    ),
    "op_statistics_none": Bad(
        lambda: torch.ops.resops.batch_norm_statistics(None), MISSING, "no tensor arguments"
    ),
}

CALLS = {name: bad.call for name, bad in BAD.items()}
