"""The trainer of resops.integrations.nnunet against nnU-Net's own.

tests/integrations/nnunet.py says what stands in for what.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import resops
from tests.dispatch import counted_calls
from tests.integrations.nnunet import DATASET, plans, trainers

pytestmark = pytest.mark.models


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nnU-Net looks for data and writes its results."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    data = tmp_path / "nnUNet_preprocessed" / "Dataset001_Small" / "nnUNetPlans_small"
    data.mkdir(parents=True)
    (data / "case.npz").touch()  # from its name nnU-Net infers the format


def trainer(cls: Any, dims: int) -> Any:
    made = cls(plans(dims), "small", 0, DATASET, torch.device("cpu"))
    torch.manual_seed(0)
    made.initialize()
    return made


@pytest.mark.parametrize("dims", [2, 3])
def test_a_training_step(dims: int, folders: None, native: None) -> None:
    """A step of the trainer: the same loss, and near weights; checkpoints load both ways."""
    theirs, ours = (trainer(cls, dims) for cls in trainers())
    report = resops.fuse_report(ours.network)
    assert len(report.fused) > 0 and len(report.skipped) == 0
    assert {entry.pattern for entry in report.fused} == {"IN+LeakyReLU"}
    ours.network.load_state_dict(theirs.network.state_dict(), strict=True)
    theirs.network.load_state_dict(ours.network.state_dict(), strict=True)
    sizes = [[16] * dims, [8] * dims]
    batch = {
        "data": torch.randn(2, 1, *sizes[0]),
        "target": [torch.randint(0, 3, (2, 1, *size)).float() for size in sizes],
    }
    losses = []
    for made in (theirs, ours):
        made.network.train()
        with counted_calls() as calls:
            losses.append(float(made.train_step(copy.deepcopy(batch))["loss"]))
    norms = sum(len(entry.modules) for entry in report.fused)
    assert calls["batch_norm_forward"] == norms and calls["aten::leaky_relu_"] == 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32, some twenty layers
    for a, b in zip(ours.network.parameters(), theirs.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_variant_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = trainers()
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    module = tmp_path / "resops_trainer.py"
    module.write_text("from resops.integrations.nnunet import nnUNetTrainerResops\n")
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    found = recursive_find_python_class(str(tmp_path), ours.__name__, None)
    assert found is ours
