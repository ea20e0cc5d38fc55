"""The layer ResidualAdd."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resops
from resops.nn import ResidualAdd
from tests.dispatch import counted_calls, native_calls


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    shape = shape or (4, 3, 5, 5)
    return torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)


def test_plain_join() -> None:
    x, residual = inputs()
    assert torch.equal(ResidualAdd(activation="relu")(x, residual), F.relu(x + residual))
    assert torch.equal(ResidualAdd()(x, residual), x + residual)


@pytest.mark.usefixtures("native")
def test_one_op_there_and_back() -> None:
    x, residual = inputs()
    layer = ResidualAdd(0.5, learn_alpha=True, activation="relu")
    with counted_calls() as calls:
        layer(x, residual).sum().backward()
    assert native_calls(calls) == {"residual_add_backward": 1, "residual_add_forward": 1}


def test_constants_complement_and_slope() -> None:
    x, residual = inputs()
    torch.testing.assert_close(
        ResidualAdd(0.25, "complement")(x, residual), 0.25 * x + 0.75 * residual
    )
    torch.testing.assert_close(
        ResidualAdd(2.0, -1.0, "leaky_relu", negative_slope=0.3)(x, residual),
        F.leaky_relu(2 * x - residual, 0.3),
    )
    assert not list(ResidualAdd(0.25, "complement").parameters())


def test_learned_weights() -> None:
    """SkipInit: the branch starts at 0 and gets no gradient, its weight does."""
    x, residual = inputs()
    layer = ResidualAdd(0.0, learn_alpha=True)
    assert list(layer.state_dict()) == ["alpha"]
    y = layer(x, residual)
    assert torch.equal(y, residual)
    y.backward(torch.ones_like(y))
    assert isinstance(layer.alpha, nn.Parameter) and layer.alpha.grad is not None
    torch.testing.assert_close(layer.alpha.grad, x.detach().sum().view(1))
    assert x.grad is not None and torch.equal(x.grad, torch.zeros_like(x))
    both = ResidualAdd(0.5, 2.0, learn_alpha=True, learn_beta=True)
    assert {n: p.item() for n, p in both.named_parameters()} == {"alpha": 0.5, "beta": 2.0}
    with torch.no_grad():
        both.beta.fill_(7.0)  # type: ignore[union-attr]
    both.reset_parameters()
    assert both.beta.item() == 2.0  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """A layer in fp32 beside 16-bit data, and one that was moved to the data's dtype."""
    x, residual = (t.detach().to(dtype) for t in inputs())
    for layer in (
        ResidualAdd(0.5, learn_alpha=True, drop_prob=0.3),
        ResidualAdd(0.5, learn_alpha=True, drop_prob=0.3).to(dtype),
        ResidualAdd(0.5, learn_alpha=True, drop_prob=0.3, dtype=dtype),
    ):
        y = layer(x, residual)
        assert y.dtype == dtype
        y.sum().backward()
        assert isinstance(layer.alpha, nn.Parameter) and layer.alpha.grad is not None
        assert layer.alpha.grad.dtype == layer.alpha.dtype


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth(mode: str) -> None:
    """Samples are dropped or scaled in training, and all kept in evaluation."""
    x, residual = torch.ones(4000, 2), torch.zeros(4000, 2)
    layer = ResidualAdd(drop_prob=0.2, drop_mode=mode)
    y = layer(x, residual)
    assert set(y.flatten().tolist()) <= {0.0, 1.25}
    assert torch.equal(y[:, 0], y[:, 1])
    if mode == "row":
        assert abs(y.mean().item() - 1) < 0.03
    else:
        assert y.unique().numel() == 1
        draws = [layer(x, residual)[0, 0].item() for _ in range(300)]
        assert abs(sum(draws) / 300 - 1) < 0.15
    assert torch.equal(layer.eval()(x, residual), x)
    always = ResidualAdd(drop_prob=1.0, drop_mode=mode)
    assert torch.equal(always(x, residual), residual)


def test_stochastic_depth_with_a_learned_weight() -> None:
    x, residual = inputs(6, 5)
    layer = ResidualAdd(0.5, learn_alpha=True, drop_prob=0.5)
    torch.manual_seed(3)
    y = layer(x, residual)
    torch.manual_seed(3)
    kept = torch.empty(6).bernoulli_(0.5).div_(0.5)
    torch.testing.assert_close(y, 0.5 * kept.view(6, 1) * x + residual)
    y.sum().backward()
    assert isinstance(layer.alpha, nn.Parameter)
    torch.testing.assert_close(layer.alpha.grad, (kept.view(6, 1) * x).sum().detach().view(1))


def test_state() -> None:
    """state_dict, deepcopy, pickle and torch.save give a layer with the same output."""
    x, residual = inputs()
    layer = ResidualAdd(0.3, learn_alpha=True, activation="gelu")
    with torch.no_grad():
        layer.alpha.fill_(0.7)  # type: ignore[union-attr]
    expected = layer(x, residual)
    other = ResidualAdd(0.0, learn_alpha=True, activation="gelu")
    other.load_state_dict(layer.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved):
        assert torch.equal(twin(x, residual), expected)


def test_meta_device_and_compile() -> None:
    layer = ResidualAdd(0.5, learn_alpha=True, device="meta", activation="relu")
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    x, residual = inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, residual), layer(x, residual))
    with resops.backend("reference"):
        torch.testing.assert_close(layer(x, residual), F.relu(0.5 * x + residual))


def test_repr() -> None:
    assert repr(ResidualAdd()) == "ResidualAdd(alpha=1.0, beta=1.0)"
    layer = ResidualAdd(0.5, "complement", "leaky_relu", learn_alpha=True, negative_slope=0.2)
    assert repr(layer) == (
        "ResidualAdd(alpha=0.5, beta='complement', learn_alpha=True, activation='leaky_relu', "
        "negative_slope=0.2)"
    )
    assert "drop_prob=0.1, drop_mode='batch'" in repr(ResidualAdd(drop_prob=0.1, drop_mode="batch"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"activation": "prelu"}, "activation must be None or one of"),
        ({"beta": "complemnt"}, "beta must be a number or 'complement'"),
        ({"beta": "complement", "learn_beta": True}, "neither learn_beta nor drop_prob"),
        ({"beta": "complement", "drop_prob": 0.1}, "neither learn_beta nor drop_prob"),
        ({"drop_prob": 1.5}, "drop_prob must be between 0 and 1"),
        ({"drop_prob": float("nan")}, "drop_prob must be between 0 and 1"),
        ({"drop_mode": "pixel"}, "drop_mode must be 'row' or 'batch'"),
    ],
)
def test_wrong_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualAdd(**kwargs)
