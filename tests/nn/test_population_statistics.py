"""Precise and Monte Carlo batch norm: statistics of the data, and models that are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resops
from resops.nn import (
    BatchNormAct2d,
    Conv2dNormActivation,
    monte_carlo_predictions,
    precise_statistics,
)


def network() -> Any:
    torch.manual_seed(2)
    first = Conv2dNormActivation(2, 3, bias=True)
    return nn.Sequential(first, nn.Dropout(0.5), Conv2dNormActivation(3, 4)).double()


def images(samples: int) -> Tensor:
    return torch.randn(samples, 2, 5, 6, dtype=torch.float64) * 3 + 1


def test_statistics_are_those_of_all_values() -> None:
    """Of batches of different sizes, the last of one image."""
    model = network().train()
    batches = [images(5), images(3), images(1)]
    weights = [p.clone() for p in model.parameters()]
    precise_statistics(model, [(batch, "a label") for batch in batches])
    first = model[0][1]
    values = model[0][0](torch.cat(batches))
    torch.testing.assert_close(first.running_mean, values.mean((0, 2, 3)).detach())
    torch.testing.assert_close(first.running_var, values.var((0, 2, 3)).detach())
    # The second norm sees what the first makes of each batch by that batch's statistics.
    model[0].train()
    model[1].eval()
    values = torch.cat([model[2][0](model[0](batch)) for batch in batches])
    torch.testing.assert_close(model[2][1].running_mean, values.mean((0, 2, 3)).detach())
    torch.testing.assert_close(model[2][1].running_var, values.var((0, 2, 3)).detach())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_the_model_is_left_as_it_was() -> None:
    model = network()
    model[2].eval()
    modes = [m.training for m in model.modules()]
    precise_statistics(model, [images(4)])
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model[0][1].num_batches_tracked == 0
    with pytest.raises(RuntimeError):
        precise_statistics(model, [torch.zeros(2, 9, 3, 3)])
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_monte_carlo_normalises_by_one_batch_after_another() -> None:
    model = network().eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x, batches = images(2), [images(4), images(6)]
    before = model(x).detach()  # what is folded here may not be used below
    y = monte_carlo_predictions(model, batches, x)
    assert y.shape == (2, *before.shape) and not torch.equal(y[0], y[1])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(x), before)
    # A batch that is predicted with its own statistics is as in training.
    own = monte_carlo_predictions(model, [x], x)[0]
    model[0].train(), model[2].train()
    torch.testing.assert_close(own, model(x).detach())


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="statistics need at least one batch"):
        precise_statistics(network(), [])
    with pytest.raises(ValueError, match="needs at least one batch"):
        monte_carlo_predictions(network(), [], images(1))
    for model in (nn.Conv2d(2, 2, 1), BatchNormAct2d(2, track_running_stats=False)):
        with pytest.raises(ValueError, match="no batch norm with running statistics"):
            precise_statistics(model, [images(2)])


def test_an_error_leaves_the_statistics_as_they_were() -> None:
    norm = resops.nn.BatchNormAct2d(3)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    batches = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)]
    with pytest.raises((RuntimeError, ValueError)):
        precise_statistics(norm, batches)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_dropout_within_a_norm_stays_in_evaluation_and_keywords_count() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = resops.nn.BatchNormAct2d(3, drop_layer=lambda: nn.Dropout(0.5))

        def forward(self, x: Tensor) -> Tensor:
            assert self.norm.training and not self.norm.drop.training
            y: Tensor = self.norm(x=x)
            return y

    x = torch.randn(4, 3, 5, 5)
    model = Model()
    precise_statistics(model, [x])
    torch.testing.assert_close(model.norm.running_mean, x.mean((0, 2, 3)))
