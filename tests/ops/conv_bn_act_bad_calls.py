"""Wrong calls of the phases of a convolution as ops, and what each must raise. Run by
tests/subprocess_calls.py; those of the forward phase also by tests/simt/test_bindings.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import resops  # noqa: F401 (it registers the ops)

HALF = torch.float16
VALUE, RUNTIME, MISSING = ValueError, RuntimeError, NotImplementedError
GEOMETRY = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}


class Bad(NamedTuple):
    changes: dict[str, Any]
    error: type[Exception]
    message: str  # a regular expression


def half(*size: int, **kwargs: Any) -> Tensor:
    return torch.ones(size, dtype=HALF, **kwargs)


def good_forward() -> dict[str, Any]:
    """Arguments in the order of the schema."""
    return {
        "inputs": [half(2, 8, 5, 5)],
        "scale": None,
        "shift": None,
        "prologue": "identity",
        "prologue_slope": 0.1,
        "conv_weight": half(4, 8, 3, 3),
        "conv_bias": None,
        "residual": None,
        "activation": "identity",
        "negative_slope": 0.1,
        **GEOMETRY,
        "statistics": False,
    }


def good_backward_data() -> dict[str, Any]:
    return {
        "grad_y": half(2, 4, 5, 5),
        "conv_weight": half(4, 8, 3, 3),
        "input_size": [2, 8, 5, 5],
        "x": half(2, 8, 5, 5),
        "scale": torch.ones(8),
        "shift": torch.ones(8),
        "prologue": "relu",
        "prologue_slope": 0.1,
        "mean": torch.ones(8),
        "invstd": torch.ones(8),
        "addend": None,
        **GEOMETRY,
    }


def good_backward_weight() -> dict[str, Any]:
    return {
        "grad_y": half(2, 4, 5, 5),
        "inputs": [half(2, 8, 5, 5)],
        "scale": None,
        "shift": None,
        "prologue": "identity",
        "prologue_slope": 0.1,
        "weight_size": [4, 8, 3, 3],
        **GEOMETRY,
    }


def good_folded() -> dict[str, Any]:
    return {
        "x": torch.ones(2, 16, 9, 8),
        "conv_weight": torch.ones(16, 16, 3, 3),
        "prepared": torch.empty(0),
        "conv_bias": torch.ones(16),
        "residual": None,
        "activation": "relu",
        "negative_slope": 0.0,
        "stride": [1, 1],
        "padding": [1, 1],
    }


INPUTS = {
    "no inputs": Bad({"inputs": []}, VALUE, "inputs should have at least one tensor"),
    "2-D input": Bad({"inputs": [half(2, 8)]}, VALUE, r"inputs\[0\] of size \[2, 8\]"),
    "slices of two sizes": Bad(
        {"inputs": [half(2, 4, 5, 5), half(2, 4, 5, 6)]},
        RUNTIME,
        r"inputs\[1\] should have the size .* but for the channels",
    ),
    "slices of two dtypes": Bad(
        {"inputs": [half(2, 4, 5, 5), torch.ones(2, 4, 5, 5)]},
        RUNTIME,
        r"inputs\[1\] should have the dtype",
    ),
    "integer input": Bad(
        {"inputs": [torch.ones(2, 8, 5, 5).int()]}, MISSING, "not implemented for 'Int'"
    ),
    "only scale": Bad({"scale": torch.ones(8)}, VALUE, "scale and shift must either both be None"),
    "scale short": Bad(
        {"scale": torch.ones(7), "shift": torch.ones(8)},
        RUNTIME,
        "scale should contain 8 elements not 7",
    ),
    "shift of another dtype": Bad(
        {"scale": torch.ones(8), "shift": torch.ones(8).half()},
        RUNTIME,
        "shift should have dtype Float",
    ),
    "prologue without scale": Bad(
        {"prologue": "relu"}, VALUE, "prologue should be 'identity' without scale"
    ),
    "prologue unknown": Bad(
        {"prologue": "tanh"}, VALUE, "activation must be one of .* but got 'tanh'"
    ),
}
SETTINGS = {
    "one stride": Bad({"stride": [1]}, RUNTIME, "expected stride to be a list of 2 values"),
    "stride 0": Bad({"stride": [1, 0]}, RUNTIME, "stride should be at least 1"),
    "padding -1": Bad({"padding": [-1, 1]}, RUNTIME, "padding should be at least 0"),
    "padding huge": Bad({"padding": [2**62, 1]}, RUNTIME, "padding should be at least 0 and at"),
    "dilation 0": Bad({"dilation": [1, 0]}, RUNTIME, "dilation should be at least 1"),
    "dilation INT64_MIN": Bad({"dilation": [-(2**63), 1]}, RUNTIME, "dilation should be at least"),
    "dilated out of the input": Bad(
        {"dilation": [4, 1]}, RUNTIME, "Kernel size can't be greater than actual input size"
    ),
}
CONV_WEIGHT = {
    "weight of another dtype": Bad(
        {"conv_weight": torch.ones(4, 8, 3, 3)}, RUNTIME, "conv_weight should have the dtype"
    ),
    "weight of 7 channels": Bad(
        {"conv_weight": half(4, 7, 3, 3)}, RUNTIME, "expects an input with 7 channels, but got 8"
    ),
    "weight of one dimension": Bad(
        {"conv_weight": half(4, 8, 3)},
        RUNTIME,
        "conv_weight should have size .* with 2 kernel dimensions",
    ),
    "weight of no filters": Bad(
        {"conv_weight": half(0, 8, 3, 3)}, RUNTIME, "conv_weight should have sizes of at least 1"
    ),
    "kernel larger than the input": Bad(
        {"conv_weight": half(4, 8, 9, 3)},
        RUNTIME,
        "Kernel size can't be greater than actual input size",
    ),
}
FORWARD = {
    **INPUTS,
    **SETTINGS,
    **CONV_WEIGHT,
    "bias long": Bad(
        {"conv_bias": torch.ones(5)}, RUNTIME, "conv_bias should contain 4 elements not 5"
    ),
    "bias fp64": Bad(
        {"conv_bias": torch.ones(4).double()}, RUNTIME, "mixed dtype: expect conv_bias"
    ),
    "residual of another size": Bad(
        {"residual": half(2, 4, 5, 4)}, RUNTIME, r"residual should have the size \[2, 4, 5, 5\]"
    ),
    "residual of another dtype": Bad(
        {"residual": torch.ones(2, 4, 5, 5)}, RUNTIME, "residual should have the dtype Half"
    ),
    "activation unknown": Bad(
        {"activation": "swish"}, VALUE, "activation must be one of .* but got 'swish'"
    ),
    "statistics of an activation": Bad(
        {"statistics": True, "activation": "relu"}, VALUE, "activation should be 'identity'"
    ),
    "statistics beside a residual": Bad(
        {"statistics": True, "residual": half(2, 4, 5, 5)}, VALUE, "residual should be None"
    ),
}
BACKWARD_DATA = {
    **SETTINGS,
    **CONV_WEIGHT,
    "grad_y of another size": Bad(
        {"grad_y": half(2, 4, 5, 4)}, RUNTIME, r"grad_y should have the size \[2, 4, 5, 5\]"
    ),
    "grad_y of half the batch": Bad(
        {"grad_y": half(1, 4, 5, 5)}, RUNTIME, r"grad_y should have the size \[2, 4, 5, 5\]"
    ),
    "integer grad_y": Bad(
        {"grad_y": torch.ones(2, 4, 5, 5).int()}, MISSING, "not implemented for 'Int'"
    ),
    "input_size of 2": Bad({"input_size": [2, 8]}, VALUE, r"input_size of size \[2, 8\]"),
    "input_size negative": Bad(
        {"input_size": [-2, 8, 5, 5]}, RUNTIME, "input_size should have no negative size"
    ),
    "input_size of another input": Bad(
        {"input_size": [2, 8, 6, 5]}, RUNTIME, "grad_y should have the size"
    ),
    "x of another size": Bad(
        {"x": half(2, 8, 5, 4)}, RUNTIME, r"x should have the size \[2, 8, 5, 5\]"
    ),
    "x of another dtype": Bad({"x": torch.ones(2, 8, 5, 5)}, RUNTIME, "x should have the dtype"),
    "x missing": Bad({"x": None}, VALUE, "x should be given beside scale and shift"),
    "scale short": Bad({"scale": torch.ones(7)}, RUNTIME, "scale should contain 8 elements not 7"),
    "shift missing": Bad({"shift": None}, VALUE, "scale and shift must either both be None"),
    "prologue unknown": Bad({"prologue": ""}, VALUE, "activation must be one of"),
    "mean short": Bad({"mean": torch.ones(0)}, RUNTIME, "mean should contain 8 elements not 0"),
    "invstd missing": Bad({"invstd": None}, VALUE, "mean and invstd must either both be None"),
    "invstd of another dtype": Bad({"invstd": half(8)}, RUNTIME, "invstd should have dtype Float"),
    "addend of another size": Bad(
        {"addend": half(2, 8, 5)}, RUNTIME, r"addend should have the size \[2, 8, 5, 5\]"
    ),
}
BACKWARD_WEIGHT = {
    **INPUTS,
    **SETTINGS,
    "grad_y of another size": Bad(
        {"grad_y": half(2, 4, 5, 4)}, RUNTIME, r"grad_y should have the size \[2, 4, 5, 5\]"
    ),
    "grad_y of another dtype": Bad(
        {"grad_y": torch.ones(2, 4, 5, 5)}, RUNTIME, "grad_y should have the dtype"
    ),
    "weight_size of another input": Bad(
        {"weight_size": [4, 7, 3, 3]}, RUNTIME, "expects an input with 7 channels, but got 8"
    ),
    "weight_size of 3": Bad({"weight_size": [4, 8, 3]}, RUNTIME, "weight_size should have size"),
    "weight_size negative": Bad(
        {"weight_size": [4, 8, -3, 3]}, RUNTIME, "weight_size should have sizes of at least 1"
    ),
    "weight_size huge": Bad(
        {"weight_size": [2**62, 8, 3, 3]}, RUNTIME, "weight_size should have sizes of at least 1"
    ),
}
FOLDED = {
    "fp64": Bad({"x": torch.ones(2, 16, 9, 8).double()}, RUNTIME, "conv_weight|x should|Double"),
    "weight of other channels": Bad(
        {"conv_weight": torch.ones(16, 8, 3, 3)}, RUNTIME, "expects an input with 8 channels"
    ),
    "kernel of 3x2": Bad({"conv_weight": torch.ones(16, 16, 3, 2)}, RUNTIME, "conv_weight|kernel"),
    "bias short": Bad(
        {"conv_bias": torch.ones(3)}, RUNTIME, "conv_bias should contain 16 elements not 3"
    ),
    "residual of half the batch": Bad(
        {"residual": torch.ones(1, 16, 9, 8)}, RUNTIME, "residual should have the size"
    ),
    "one padding": Bad({"padding": [1]}, RUNTIME, "expected padding to be a list of 2 values"),
    "activation unknown": Bad({"activation": "tanh"}, VALUE, "activation must be one of"),
}
GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "forward": good_forward,
    "backward_data": good_backward_data,
    "backward_weight": good_backward_weight,
    "folded": good_folded,
}
# Of another device: dispatched to the fake kernels.
META: dict[str, tuple[str, Tensor | list[Tensor]]] = {
    "forward": ("conv_weight", half(4, 8, 3, 3, device="meta")),
    "backward_data": ("mean", torch.ones(8, device="meta")),
    "backward_weight": ("inputs", [half(2, 8, 5, 5, device="meta")]),
    "folded": ("conv_bias", torch.ones(16, device="meta")),
}
TABLES = {
    phase: {**table, f"{name} on meta": Bad({name: t}, RUNTIME, f"{name}.* is on meta")}
    for (phase, (name, t)), table in zip(
        META.items(), (FORWARD, BACKWARD_DATA, BACKWARD_WEIGHT, FOLDED), strict=True
    )
}


def call(phase: str, changes: dict[str, Any]) -> Any:
    op = getattr(torch.ops.resops, f"conv_bn_act_{phase}")
    return op(*{**GOOD[phase](), **changes}.values())


BAD = {f"{phase}: {name}": bad for phase, table in TABLES.items() for name, bad in table.items()}
CALLS = {
    f"{phase}: {name}": functools.partial(call, phase, bad.changes)
    for phase, table in TABLES.items()
    for name, bad in table.items()
}
