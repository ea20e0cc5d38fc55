"""Batch norm over several processes equals one process on the concatenated batch (gloo, CPU)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resops
from resops.nn import BatchNormAct2d, SyncBatchNormAct
from tests.distributed.ranks import CHECKS, run_checks
from tests.fusion.blocks import fused_norms, small_net
from tests.torchvision_ops import timm

# With four processes the checks of groups and empty ones see more than with two.
CHECKS_OF_FOUR = ["rule_R", "process_groups", "nothing_anywhere", "one_value", "ddp"]


@pytest.fixture(scope="module")
def outcomes_of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in every check; the processes are started once for all of them."""
    return run_checks(2, list(CHECKS), tmp_path_factory.mktemp("gloo"))


@pytest.fixture(scope="module")
def outcomes_of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(4, CHECKS_OF_FOUR, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(check: str, outcomes_of_two: dict[str, str]) -> None:
    assert outcomes_of_two[check] == ""


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS_OF_FOUR)
def test_four_processes(check: str, outcomes_of_four: dict[str, str]) -> None:
    assert outcomes_of_four[check] == ""


# ---- in one process -----------------------------------------------------------------------------


def test_convert_keeps_activation_residual_and_objects() -> None:
    model = nn.Sequential(
        BatchNormAct2d(4, act_layer=nn.LeakyReLU), nn.BatchNorm2d(4), nn.SyncBatchNorm(4)
    )
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    group = object()
    assert resops.convert_sync_batchnorm(model, group) is model
    assert all(type(m) is SyncBatchNormAct and m.process_group is group for m in model)
    assert isinstance(model[0].act, nn.LeakyReLU) and isinstance(model[1].act, nn.Identity)
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(after) == list(before) and all(after[k] is v for k, v in before.items())


def test_convert_a_fused_model() -> None:
    model = resops.fuse(small_net())
    norms, keys = fused_norms(model), list(model.state_dict())
    resops.convert_sync_batchnorm(model)
    assert fused_norms(model) == norms and list(model.state_dict()) == keys
    assert {type(dict(model.named_modules())[name]) for name in norms} == {SyncBatchNormAct}
    patterns = {entry.pattern for entry in resops.fuse_report(model).fused}
    assert "Conv+SyncBN+add+ReLU" in patterns


def test_convert_what_is_left_plain_stays_plain() -> None:
    model = nn.Sequential(small_net())
    resops.fuse(model, module_filter_fn=lambda module, name: not name.startswith("0.3"))
    resops.convert_sync_batchnorm(model)
    assert not [name for name in fused_norms(model) if name.startswith("0.3")]
    assert sum(isinstance(m, SyncBatchNormAct) for m in model.modules()) == 5


def test_convert_says_what_it_does_not_know() -> None:
    class Other(nn.BatchNorm2d):
        pass

    with pytest.warns(UserWarning, match="not converted.*: 0"):
        model = resops.convert_sync_batchnorm(nn.Sequential(Other(4)))
    assert type(model[0]) is Other
    with pytest.raises(TypeError, match=r"expects an nn\.Module"):
        resops.convert_sync_batchnorm(3)  # type: ignore[type-var]


@pytest.mark.models
def test_convert_timms_layer() -> None:
    layer = timm().layers.BatchNormAct2d(4, act_layer=nn.SiLU)
    resops.convert_sync_batchnorm(layer)
    x = torch.randn(2, 4, 3, 3)
    y = layer(x)
    expected = nn.functional.silu(nn.functional.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(y, expected)


def test_without_processes_it_is_the_plain_layer() -> None:
    """Not initialised: as torch's layer in one process, folded in evaluation too."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    ours = SyncBatchNormAct(3, dtype=torch.float64)
    plain = BatchNormAct2d(3, dtype=torch.float64)
    for training in (True, False):
        ours.train(training), plain.train(training)
        assert torch.equal(ours(x, x), plain(x, x))
    with pytest.raises(ValueError, match="expected at least 2D input"):
        ours(torch.ones(3))
