"""Which kernel takes a folded convolution on a GPU, and why; the CUDA tensors hold nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import resops
from resops import _dispatch, _native
from resops.ops import conv_bn_act, conv_bn_act_gpu, convolution
from resops.reference import conv_bn_act as reference


@pytest.fixture
def built_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = _dispatch._KERNELS["native"] | {"conv_bn_act": frozenset({"cuda"})}
    monkeypatch.setitem(_dispatch._KERNELS, "native", devices)
    monkeypatch.setattr(_native, "error", None)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def tensors(dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> tuple[Tensor, Tensor]:
    kinds: Any = {"memory_format": torch.channels_last, "device": "cuda", "dtype": dtype}
    kinds |= kwargs
    x: Tensor = torch.empty((2, 8, 5, 7), **kinds)
    weight: Tensor = torch.empty((16, 8, 3, 3), **kinds)
    return x, weight


@pytest.mark.usefixtures("built_for_cuda", "cudnn", "fake")
def test_native_only_where_it_is_asked_for_by_name() -> None:
    x, weight = tensors()
    assert conv_bn_act.path(x, weight).backend == "cudnn"
    with resops.backend("native"):
        assert conv_bn_act.path(x, weight).backend == "native"
        assert conv_bn_act.path(x, weight, training=True).backend == "library"
    with resops.backend("reference"):
        assert conv_bn_act.path(x, weight).backend == "reference"


@pytest.mark.usefixtures("built_for_cuda", "fake")
def test_a_block_leaves_gradients_and_float32_to_the_library() -> None:
    geometry = convolution.Geometry((1, 1), (1, 1), (1, 1), 1)
    for dtype, chosen in ((torch.bfloat16, "fused"), (torch.float32, "library")):
        how = ("native", "fused", *tensors(dtype), geometry, True)
        assert convolution.choose("forward", *how) == chosen
        for phase in ("backward_data", "backward_weight"):
            assert convolution.choose(phase, *how) == "library"


@pytest.mark.usefixtures("built_for_cuda", "cudnn", "fake")
def test_what_the_native_kernel_does_not_take() -> None:
    x, weight = tensors()
    line = torch.empty(2, 8, 5, device="cuda", dtype=torch.bfloat16)
    cases: list[tuple[tuple[Tensor, Tensor], dict[str, Any], str]] = [
        (tensors(torch.float32), {}, "takes float16 and bfloat16, not torch.float32"),
        ((x, weight), {"groups": 2}, "takes one group, not 2"),
        (tensors(memory_format=torch.contiguous_format), {}, "returns channels-last"),
        ((x, weight), {"residual": x.float()}, "the residual has another dtype"),
        ((line, line), {}, "takes 2 spatial dimensions, not 1"),
    ]
    with resops.backend("native"):
        for arguments, settings, reason in cases:
            path = conv_bn_act.path(*arguments, **settings)
            assert path.backend != "native" and reason in path.reason, path


@pytest.mark.usefixtures("built_for_cuda", "fake")
def test_what_cudnn_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = tensors()
    assert "cuDNN is not available" in conv_bn_act.path(x, weight).reason
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for activation in (None, "silu"):
        path = conv_bn_act.path(x, weight, activation=activation)
        assert path.backend == "library" and "no convolution of cuDNN" in path.reason
    path = conv_bn_act.path(x, weight, residual=x.float())
    assert path.backend == "library" and "another dtype" in path.reason


@pytest.mark.usefixtures("fake")
def test_a_build_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = _dispatch._KERNELS["native"] | {"conv_bn_act": frozenset()}
    monkeypatch.setitem(_dispatch._KERNELS, "native", devices)
    x, weight = tensors()
    with resops.backend("native"):
        assert "no kernel for cuda tensors" in conv_bn_act.path(x, weight).reason


def test_wrong_activation_is_an_error() -> None:
    with pytest.raises(ValueError, match="activation must be one of"):
        conv_bn_act.path(torch.empty(1, 1, 1, 1), torch.empty(1, 1, 1, 1), activation="tanh")


# ---- the calls themselves, on a CPU with another in the kernel's place ---------------------------


class Recorded:
    """Ops in the place of torch.ops.aten and torch.ops.resops, by their documented meaning."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def cudnn_convolution_relu(self, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        self.calls.append("cudnn_convolution_relu")
        return reference.convolution(x, weight, bias, *rest).relu()

    def cudnn_convolution_add_relu(
        self, x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *rest: Any
    ) -> Tensor:
        self.calls.append("cudnn_convolution_add_relu")
        return (reference.convolution(x, weight, bias, *rest) + alpha * z).relu()

    def conv_bn_act_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        self.calls.append("conv_bn_act_forward")
        return reference.conv_bn_act_forward(*arguments)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("backend", ["native", "cudnn", "library"])
def test_folded_convolution(
    backend: str, with_residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = torch.randn(2, 4, 6, 5), torch.randn(8, 2, 3, 3), torch.randn(8)
    groups = 2
    if backend == "native":
        weight, groups = torch.randn(8, 4, 3, 3), 1
    geometry = ((2, 1), (1, 0), (1, 1))
    c = reference.convolution(x, weight, bias, *geometry, groups)
    residual = torch.randn_like(c) if with_residual else None
    recorded = Recorded()

    def chosen(*args: Any, **kwargs: Any) -> conv_bn_act.Path:
        return conv_bn_act.Path(backend, "")

    monkeypatch.setattr(conv_bn_act_gpu, "path", chosen)
    monkeypatch.setattr(torch.ops, "aten", recorded)
    monkeypatch.setattr(torch.ops, "resops", recorded)
    y = conv_bn_act_gpu.folded_convolution(
        x, weight, bias, *geometry, groups, residual, "relu", 0.0
    )
    monkeypatch.undo()
    if backend == "library":
        assert y is None and not recorded.calls
        return
    cudnn_op = "cudnn_convolution_add_relu" if with_residual else "cudnn_convolution_relu"
    assert recorded.calls == ["conv_bn_act_forward" if backend == "native" else cudnn_op]
    assert y is not None
    torch.testing.assert_close(y, (c if residual is None else c + residual).relu())
