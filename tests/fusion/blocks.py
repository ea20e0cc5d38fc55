"""Blocks as users write them, and what fused models are compared by."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops


class Residual(nn.Module):
    """relu( bn2(conv2( relu(bn1(conv1(x))) )) + x )"""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class PreActivation(nn.Module):
    """conv(silu(bn(x))) + x"""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.bn(x))) + x


def small_net() -> nn.Sequential:
    """A stem, two blocks and a head: every norm can be fused."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2),
        Residual(),
        PreActivation(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.BatchNorm1d(5),
        nn.GELU(),
    )


def filled(model: Any) -> Any:
    """``model`` with weights and statistics that are not their initial values."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                for t, low, high in (
                    (module.running_mean, -0.3, 0.3),
                    (module.running_var, 0.5, 2.0),
                    (module.weight, 0.5, 1.2),
                    (module.bias, -0.2, 0.2),
                ):
                    if t is not None:
                        t.uniform_(low, high)
    return model


def pair(model: nn.Module, dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[Any, Any]:
    """``model``, fused, and a copy of it that is not."""
    filled(model.to(dtype))
    plain = copy.deepcopy(model)
    assert resops.fuse(model, **kwargs) is model
    return model, plain


def assert_near(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    """In float64 two honest orders of computation agree to this, after a few layers."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    own, other = a.state_dict(), b.state_dict()
    assert list(own) == list(other)
    for key, value in own.items():
        assert_near(value, other[key])


def assert_same_step(a: nn.Module, b: nn.Module, *inputs: Any) -> None:
    """One forward and backward pass: outputs, gradients, state."""
    outputs = []
    for model in (a, b):
        model.zero_grad()
        own = [x.detach().clone().requires_grad_() for x in inputs]
        y = model(*own)
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
        (y * weights).sum().backward()
        grads = [x.grad for x in own] + [p.grad for p in model.parameters()]
        outputs.append([y.detach(), *[g for g in grads if g is not None]])
    for ours, theirs in zip(*outputs, strict=True):
        assert_near(ours, theirs)
    assert_same_state(a, b)


def fused_norms(model: nn.Module) -> list[str]:
    """Names of the norms that are fused."""
    return [m for entry in resops.fuse_report(model).fused for m in entry.modules]


def reasons(model: nn.Module) -> dict[str, str]:
    """Why the norms that are not fused are not."""
    report = resops.fuse_report(model)
    return {m: entry.reason.name for entry in report.skipped for m in entry.modules}
