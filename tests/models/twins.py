"""A network against its twin: the same modules and weights, computed by the reference backend."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import resops
from resops.nn.batch_norm import BatchNormAct
from resops.nn.instance_norm import InstanceNormAct
from tests.dispatch import counted_calls, native_calls

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def wild(model: Any) -> Any:
    """The model, with statistics and parameters of norms as after some training."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
                module.weight.uniform_(0.5, 1.2)
                module.bias.normal_(0, 0.2)
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 2)
    return model


@torch.no_grad()
def with_statistics_of(model: Any, x: Tensor) -> Any:
    """The model, whose running statistics become those of ``x``."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def outputs(y: Any) -> list[Tensor]:
    return [t for t in tree_leaves(y) if isinstance(t, Tensor)]


def distance(y: Any, exact: Any) -> float:
    pairs = list(zip(outputs(y), outputs(exact), strict=True))
    error = sum(float((a.detach().double() - b.double()).square().sum()) for a, b in pairs)
    return (error / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


def in_layout(x: Tensor, channels_last: bool) -> Tensor:
    layout = LAYOUTS[x.dim()] if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def _step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs of a forward pass, after a backward pass from a sum with fixed weights."""
    torch.manual_seed(5)  # the same random weights of joins and dropout for both
    found = outputs(model(x))
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in found]
    torch.autograd.backward(found, weights)
    return [y.detach() for y in found]


def assert_trains_as_twin(
    model: nn.Module, x: Tensor, channels_last: bool, *, zero: Sequence[str] = ()
) -> None:
    """Outputs, every gradient and running statistics of a training step, in float64.

    Smooth activations only: a value that is 0 but for rounding would decide about a gradient of
    relu. The two differ in the order of sums, 1e-16 each; statistics of few values magnify that.

    Args:
        zero: parts of names of parameters whose gradient is 0 on paper.
    """
    model = wild(copy.deepcopy(model)).double().train()
    if channels_last:
        model = model.to(memory_format=LAYOUTS[x.dim()])  # type: ignore[call-overload]
    twin = copy.deepcopy(model)
    x = in_layout(x.double(), channels_last)
    with counted_calls() as calls:
        found = _step(model, x)
    # Group norm has kernels where no gradient is recorded.
    kernels = any(isinstance(m, BatchNormAct | InstanceNormAct) for m in model.modules())
    assert native_calls(calls) or not kernels, "no kernel of resops ran"
    with resops.backend("reference"), counted_calls() as calls:
        expected = _step(twin, x)
        assert not native_calls(calls)
    for y, z in zip(found, expected, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-9)
    largest = max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, key
        assert float((p.grad - q.grad).abs().max()) <= 1e-8 * largest, key
        assert float(p.grad.abs().max()) > 0 or any(part in key for part in zero), key
    for (key, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=key)


@torch.no_grad()
def assert_evaluates_as_twin(
    model: nn.Module, x: Tensor, channels_last: bool, *, statistics: bool = False
) -> None:
    """Outputs in evaluation, folded, in float32 and by autocast to bfloat16: as near to those of
    the float64 network as the twin's are, but for the order of summation (2e-7) and, in 16 bits,
    where rounding happens (rule R's factor).

    Args:
        statistics: take those of ``x``; with wild ones, 600 residual blocks overflow.
    """
    model = wild(copy.deepcopy(model)).eval()
    if statistics:
        model = with_statistics_of(model, x)
    if channels_last:
        model = model.to(memory_format=LAYOUTS[x.dim()])  # type: ignore[call-overload]
    x = in_layout(x, channels_last)
    with resops.backend("reference"):
        exact = copy.deepcopy(model).double()(x.double())
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            expected_bf16 = model(x)
    assert distance(model(x), exact) <= 3 * distance(expected, exact) + 2e-7
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    for y, z in zip(outputs(found), outputs(expected_bf16), strict=True):
        assert y.dtype == z.dtype and y.shape == z.shape
    assert distance(found, exact) <= 3 * distance(expected_bf16, exact) + 2e-7


def assert_trains_in_bfloat16(model: nn.Module, x: Tensor) -> None:
    """A step under autocast: every parameter gets a finite gradient in float32."""
    model = copy.deepcopy(model).to(memory_format=LAYOUTS[x.dim()]).train()  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(y.float().square().mean() for y in outputs(model(in_layout(x, True))))
    assert isinstance(loss, Tensor)
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32, key
        assert p.grad.isfinite().all(), key


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
