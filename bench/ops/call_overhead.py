"""Host time of one call, on a tensor so small that nothing else is left to see.

What stands beside PyTorch's ``F.batch_norm``, which does less (no activation): the op, the op
through the autograd Function in Python, which torch.compile, the other backends and tensor
subclasses take, and layers. The op itself has an autograd node in C++ (csrc/autograd); the
difference of the two is what that saves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from bench import timing
from bench.session import EAGER, RESOPS, Session
from resops._autograd import apply_function
from resops.functional import batch_norm_act
from resops.ops.batch_norm import BatchNormFunction

SIZE = (2, 8, 2, 2)
Call = Callable[[Tensor], Tensor]


class _Block(nn.Module):
    """A block of which resops.fuse makes one step."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(SIZE[1]), act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.norm(x))
        return y


def cases(device: torch.device) -> dict[str, tuple[Call, Call]]:
    """What is compared: PyTorch's call and ours, both in training."""
    C = SIZE[1]
    running = [torch.zeros(C, device=device), torch.ones(C, device=device)]
    weight = torch.ones(C, device=device, requires_grad=True)
    bias = torch.zeros(C, device=device, requires_grad=True)
    p: Any = (*running, weight, bias, True)

    def function(x: Tensor) -> Tensor:
        args: Any = (x, None, weight, bias, *running, True, 0.1, 1e-5, "identity", 0.0)
        y: Tensor = apply_function(BatchNormFunction, *args)[0]
        return y

    block = _Block(nn.ReLU(inplace=True)).to(device)
    fused = resops.fuse(copy.deepcopy(block))
    layer = resops.nn.BatchNormAct2d(C).to(device)
    alone = resops.nn.BatchNormAct2d(C, apply_act=False).to(device)
    return {
        "F.batch_norm: op": (
            lambda x: F.batch_norm(x, *p),
            lambda x: batch_norm_act(x, *p, activation=None),
        ),
        "F.batch_norm: op with ReLU": (
            lambda x: F.batch_norm(x, *p),
            lambda x: batch_norm_act(x, *p),
        ),
        "F.batch_norm: Function in Python": (lambda x: F.batch_norm(x, *p), function),
        "nn.BatchNorm2d: layer": (block.norm, alone),
        "nn.BatchNorm2d: layer with ReLU": (block.norm, layer),
        "block BN+ReLU: fused": (block, fused),
    }


def _step(call: Call, x: Tensor, grad: Tensor, backward: bool) -> Callable[[], Tensor]:
    def step() -> Tensor:
        y = call(x)
        if backward:
            torch.autograd.backward(y, grad, inputs=[x])
            x.grad = None
        return y

    return step


def run(session: Session) -> None:
    """Check and time every case, forward and with the backward pass; on one thread."""
    x = torch.randn(SIZE, device=session.device).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    grad = torch.ones_like(x)
    for (case, (theirs, ours)), backward in product(cases(session.device).items(), (False, True)):
        with session.step(f"host time, {case}") as in_time, timing.threads(1):
            if not in_time:
                continue
            calls = {
                EAGER: _step(theirs, x, grad, backward),
                RESOPS: _step(ours, x, grad, backward),
            }
            y, expected = calls[RESOPS](), calls[EAGER]()
            if y.min() >= 0:  # ours ends in a ReLU
                expected = F.relu(expected)
            error = float((y - expected).norm() / expected.norm())
            if not session.check(
                f"host time, {case}", error < 1e-6, error / 1e-6, "against eager", "host time"
            ):
                continue
            found = timing.alternate(calls, budget_s=session.seconds, device=session.device)
            session.add_timing(
                "overhead",
                case,
                found,
                1,
                direction="forward and backward" if backward else "forward",
                dtype="fp32",
                batch=SIZE[0],
            )
