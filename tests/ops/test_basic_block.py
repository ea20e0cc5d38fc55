"""basic_block: what is its own. Values, gradients and errors are tested with bottleneck's, on the
same cases (test_bottleneck.py); here are loss curves, of networks made of each block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resops.ops.basic_block import BasicBlockFunction
from tests.ops.residual_block_cases import CONVOLUTIONS, DEFINITIONS, OPS, block, tensors_of

pytestmark = pytest.mark.usefixtures("native", "one_thread")


def losses(op: str, seed: int, fused: bool, how: str = "library") -> list[float]:
    """Of 12 steps of a two-block network that learns to tell four random patterns apart."""
    torch.manual_seed(seed)
    f = OPS[op] if fused else DEFINITIONS[op]
    rest = () if fused else ("relu", 0.01)
    blocks = [block(op, torch.float32, projection=p)[1:] for p in (True, False)]
    head = (torch.randn(4, 16) / 4).requires_grad_()
    parameters = [head, *(t for b in blocks for t in tensors_of([head, *b]).values())]
    optimizer = torch.optim.SGD(dict.fromkeys(parameters), lr=0.05, momentum=0.9)
    patterns = torch.randn(4, 16, 8, 8)
    found = []
    with CONVOLUTIONS[how]():
        for _ in range(12):
            labels = torch.randint(4, (16,))
            y: Tensor = patterns[labels] + torch.randn(16, 16, 8, 8)
            for layers in blocks:
                y = f(y, *layers, *rest)
            loss = F.cross_entropy(y.mean((2, 3)) @ head.T, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("how", CONVOLUTIONS)
def test_loss_curves_of_three_seeds(op: str, how: str) -> None:
    """Learning goes as with torch's layers: the same curve but for rounding, which a dozen steps do
    not amplify past a thousandth, where two seeds are tenths apart."""
    curves = []
    for seed in range(3):
        ours, theirs = losses(op, seed, True, how), losses(op, seed, False)
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-3
        assert ours[-1] < 0.5 * ours[0]
        curves.append(ours)
    assert max(abs(a - b) for a, b in zip(*curves[:2], strict=True)) > 0.05


def test_its_node_has_its_name() -> None:
    y = OPS["basic_block"](*block("basic_block", torch.float32, projection=False))
    assert type(y.grad_fn).__name__ == f"{BasicBlockFunction.__name__}Backward"
