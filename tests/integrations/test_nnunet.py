"""The trainer of resops.integrations.nnunet against nnU-Net's own.

tests/integrations/nnunet.py says what stands in for what. The last test has no stand-ins, and runs
where all that nnU-Net needs is installed (requirements/nnunet.txt).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
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


# ---- nnU-Net's own command line -----------------------------------------------------------------

ROOT = Path(__file__).parents[2]
# Two epochs of a few steps; and the report, which has to be printed from inside.
SHORT_TRAINER = """
import resops
from resops.integrations.nnunet import nnUNetTrainerResops

class ShortTrainer(nnUNetTrainerResops):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch = 2, 3
        self.num_val_iterations_per_epoch = 1

    def on_train_end(self):
        print(resops.fuse_report(self.network))
        super().on_train_end()
"""


def write_dataset(folder: Path) -> None:
    """Five volumes of noise in which two nested boxes are brighter."""
    import SimpleITK

    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    numbers = np.random.default_rng(0)
    labels = np.zeros((16, 32, 32), np.uint8)
    labels[4:12, 8:20, 8:20] = 1
    labels[6:9, 10:14, 10:14] = 2
    for case in range(5):
        image = (numbers.standard_normal(labels.shape) + 2 * labels).astype(np.float32)
        for array, name in (
            (image, f"imagesTr/case{case}_0000.nii.gz"),
            (labels, f"labelsTr/case{case}.nii.gz"),
        ):
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(folder / name))
    (folder / "dataset.json").write_text(json.dumps(DATASET | {"numTraining": 5}))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # seven processes that import torch
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("SimpleITK", "blosc2", "imagecodecs")),
    reason="needs requirements/nnunet.txt",
)
def test_training_from_the_command_line(tmp_path: Path) -> None:
    """Planning, training, the checkpoint's way into validation: all nnU-Net's own."""
    write_dataset(tmp_path / "raw" / "Dataset001_Small")
    trainers_folder = tmp_path / "trainers"
    trainers_folder.mkdir()
    (trainers_folder / "short_trainer.py").write_text(SHORT_TRAINER)
    environment = os.environ | {
        "nnUNet_raw": str(tmp_path / "raw"),
        "nnUNet_preprocessed": str(tmp_path / "preprocessed"),
        "nnUNet_results": str(tmp_path / "results"),
        "nnUNet_extTrainer": str(trainers_folder),
        "OMP_NUM_THREADS": "1",
    }

    def call(command: str, *args: str, **more: str) -> str:
        run = subprocess.run(
            [sys.executable, "-m", "tests.integrations.nnunet_command", command, *args],
            cwd=ROOT,
            env=environment | more,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    call("plan_and_preprocess", "-d", "1", "-c", "3d_fullres", "-npfp", "1", "-np", "1")
    train = ("1", "3d_fullres", "0", "-tr", "ShortTrainer", "-device", "cpu")
    # Augmentation in this process; Inductor would compile for minutes.
    printed = call("train", *train, nnUNet_n_proc_DA="0", nnUNet_compile="f")
    assert "norms fused" in printed and "IN+LeakyReLU" in printed
    assert "left as they are" not in printed
    (fold,) = (tmp_path / "results" / "Dataset001_Small").glob("ShortTrainer__*/fold_0")
    assert (fold / "checkpoint_final.pth").exists()
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1
