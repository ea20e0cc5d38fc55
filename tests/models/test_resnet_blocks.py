"""ResNets whose blocks are one op each: the same network, with less saved for the backward pass."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.models.resnet import saved_activations
from bench.models.stock_resnet import create_stock_model
from resops.models import ResNet, create_model
from resops.models.resnet import BasicBlock
from tests.dispatch import counted_calls

pytestmark = [pytest.mark.models, pytest.mark.usefixtures("native", "one_thread")]

OPTIONS = [{"block_op": True}, {"memory_efficient": True}]
NAMES = ["resnet18", "resnet50"]
BLOCK_NODES = ("BasicBlockFunctionBackward", "BottleneckFunctionBackward")


def pair(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A network of blocks and the one of layers, with the same state."""
    torch.manual_seed(4)
    ours = create_model(name, num_classes=10, **options)
    layers = create_model(name, num_classes=10)
    layers.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(layers.state_dict(), strict=True)
    return ours, layers


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_is_that_of_the_layers(name: str, options: dict[str, Any]) -> None:
    """In float64, in which an activation changes its side by chance once in 1e15."""
    ours, layers = (m.double() for m in pair(name, options))
    x, labels = torch.randn(2, 3, 33, 33, dtype=torch.float64), torch.tensor([1, 7])
    for model in (ours, layers):
        F.cross_entropy(model(x), labels).backward()
    for (key, a), b in zip(ours.state_dict().items(), layers.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=key)
    largest = max(float(p.grad.abs().max()) for p in layers.parameters())
    for (key, a), b in zip(ours.named_parameters(), layers.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9 * largest, msg=key)
    ours.eval(), layers.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), layers(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_one_op(name: str) -> None:
    ours, layers = pair(name, {"block_op": True})
    blocks = sum(len(getattr(ours, f"layer{i}")) for i in range(1, 5))
    x = torch.randn(2, 3, 32, 32)

    def nodes(model: Any) -> int:
        found, seen = [model(x).grad_fn], set()
        while found:
            node = found.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            found += [following for following, _ in node.next_functions]
        return sum(type(node).__name__ in BLOCK_NODES for node in seen)

    assert nodes(ours) == blocks and nodes(layers) == 0


@pytest.mark.parametrize(
    ("name", "block_limit", "memory_limit"), [("resnet18", 0.87, 0.70), ("resnet50", 0.86, 0.54)]
)
def test_saved_activations(name: str, block_limit: float, memory_limit: float) -> None:
    """Bytes that a training step keeps, against the stock network, which keeps the same per image
    at every size. The limits follow from the tables of docs/math, and from the stem: of a ResNet-18
    it is two fifths, and the blocks' ops do nothing about it."""
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    stock = saved_activations(create_stock_model(name, 10), images, labels, "fp32")

    def share(**options: Any) -> float:
        model = create_model(name, num_classes=10, **options)
        return saved_activations(model, images, labels, "fp32") / stock

    assert share(block_op=True) <= block_limit
    assert share(memory_efficient=True) <= memory_limit


def test_copies_keep_the_choice() -> None:
    ours, _ = pair("resnet18", {"memory_efficient": True})
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.layer1[0].block_op and other.layer1[0].recompute


def test_compiled_without_graph_breaks() -> None:
    """One block in each stage: one with an identity shortcut, three with a projection."""
    ours = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, memory_efficient=True).double()
    layers = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10).double()
    layers.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        y, expected = compiled(x), layers(x)
        torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-8)
        y.sum().backward()
        expected.sum().backward()
    for (key, a), b in zip(ours.state_dict().items(), layers.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=key)
    torch.testing.assert_close(ours.conv1.weight.grad, layers.conv1.weight.grad)


def test_without_gradients_nothing_is_different() -> None:
    ours, layers = pair("resnet18", {"memory_efficient": True})
    x = torch.randn(2, 3, 32, 32)
    ours.eval(), layers.eval()
    with torch.no_grad():
        ours(x)
        with counted_calls() as calls:
            y = ours(x)
        assert torch.equal(y, layers(x))
    assert calls["mkldnn::_convolution_pointwise"] == 20
