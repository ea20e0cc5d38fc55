"""Networks learn the same with either backend: short forms of ``python -m bench.learning``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import digits, environment, learning, membranes, report
from bench.images import NoImages
from bench.learning import NETWORKS, agreement, compare, load_images, unlearnt
from bench.membranes import Membranes
from bench.training import Classification, Curve, Schedule
from resops.models import list_models


@pytest.mark.usefixtures("native", "one_thread")
def test_a_unet_learns_the_same_with_both_backends() -> None:
    task = replace(membranes.draw(count=15, size=40), size=32)
    schedule = Schedule(6, 4, 0.2, 1, 0.0)
    curves = compare("unet", task, schedule, widths=(16, 32))
    found = agreement(curves, unlearnt(task))
    assert all(found <= allowed for found, allowed in found.values()), found
    native = curves["native"]
    assert all(c.steps[-1] < 0.8 * c.steps[0] for c in native)
    # Two backends: rounding differs somewhere, or the comparison would be of one with itself.
    assert any(a.steps != b.steps for a, b in zip(native, curves["reference"], strict=True))


@pytest.mark.usefixtures("native", "one_thread")
def test_a_resnet_learns_the_same_with_both_backends() -> None:
    pytest.importorskip("sklearn")
    everything = digits.task()
    task = Classification(
        everything.images[:320],
        everything.labels[:320],
        everything.test_images[:128],
        everything.test_labels[:128],
    )
    curves = compare("resnet20", task, Schedule(3, 32, 0.05, 2), seeds=2)
    found = agreement(curves, unlearnt(task))
    assert all(found <= allowed for found, allowed in found.values()), found


def test_what_differs_is_seen() -> None:
    def runs(*metrics: float) -> list[Curve]:
        return [Curve([0.7, 0.5, 0.4], [0.2], [1 - metric], [metric]) for metric in metrics]

    good = runs(0.90, 0.92, 0.91)
    off = runs(0.90, 0.92, 0.91)
    off[1].steps[1] *= 1.01
    for native, broken in (
        (good, set()),
        (runs(0.92, 0.90, 0.92), set()),
        (off, {"loss of the first steps"}),
        (runs(0.86, 0.88, 0.87), {"test loss", "test metric"}),
    ):
        found = agreement({"reference": good, "native": native}, unlearnt=0.5)
        assert {name for name, (value, allowed) in found.items() if value > allowed} == broken
    bad = agreement({"reference": runs(0.3, 0.3), "native": runs(0.3, 0.3)}, unlearnt=0.25)
    value, allowed = bad["metric that is missing to have learnt"]
    assert value > allowed


def test_every_network_of_the_comparison_is_one() -> None:
    assert set(NETWORKS) <= set(list_models())


def test_membranes_of_a_folder(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 255, (5, 8, 9), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=grey, membrane=(grey > 100).astype(np.uint8))
    np.savez(tmp_path / "other.npz", points=grey)
    data = membranes.load(tmp_path)
    assert data.images.shape == (5, 1, 8, 9) and abs(float(data.images.mean())) < 1e-6
    assert torch.equal(data.membrane[:, 0] > 0, torch.from_numpy(grey > 100))
    assert [len(images) for images, _ in (data.part(False), data.part(True))] == [4, 1]
    with pytest.raises(NoImages, match=r"has no \.npz file"):
        membranes.load(tmp_path / "nowhere")


def labelled_images(folder: Path, count: int = 40) -> None:
    """An .npz file as a part of CIFAR-10 is, of noise with a bright or a dark half."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 2
    pixels = generator.integers(0, 60, (count, 16, 16, 3), dtype=np.uint8)
    pixels[labels == 1, :8] += 190
    arrays = {"train_images": pixels, "train_labels": labels}
    np.savez(folder / "images.npz", **arrays, test_images=pixels, test_labels=labels)


def test_labelled_images_of_a_folder(tmp_path: Path) -> None:
    labelled_images(tmp_path)
    task = load_images(tmp_path, 30)
    assert task.images.shape == (30, 3, 16, 16) and task.labels.tolist()[:3] == [0, 1, 0]
    torch.testing.assert_close(task.images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert len(task.test_images) == 30 and unlearnt(task) == 0.5
    with pytest.raises(NoImages, match="train_images"):
        load_images(tmp_path / "nowhere")


@pytest.mark.usefixtures("one_thread")
def test_results_are_written_after_every_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled_images(tmp_path)
    monkeypatch.setattr(environment, "restart_with_allocator_settings", lambda *_: None)
    monkeypatch.setitem(NETWORKS, "plain20", learning.Recipe(Schedule(2, 8, 0.05, 1), 16))
    saved: list[int] = []
    save = report.Report.save

    def save_and_count(results: report.Report) -> None:
        save(results)
        saved.append(len(json.loads(results.path.read_text())["rows"]))

    monkeypatch.setattr(report.Report, "save", save_and_count)
    arguments = ["--data", str(tmp_path), "--network", "plain20", "--seeds", "1"]
    learning.main([*arguments, "--output", str(tmp_path / "results")])
    assert saved[:5] == [0, 1, 2, 3, 4]  # two backends of two epochs
    assert "plain20, native" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        learning.parse(["--network", "resnet21"])


def test_intersection_over_union() -> None:
    a, b = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    assert membranes.intersection_over_union(a, b) == pytest.approx(1 / 3)
    assert membranes.intersection_over_union(a & b & ~b, a & ~a) == 1.0


def test_crops_move_image_and_membrane_alike() -> None:
    x = torch.arange(4 * 20 * 20.0).view(4, 1, 20, 20)
    task = Membranes(x, x + 0.5, size=8)
    batches = list(task.epoch(2, torch.Generator().manual_seed(1)))
    assert len(batches) == task.steps(2) == 4 * 20 * 20 // (2 * 8 * 8)
    for image, target in batches:
        assert image.shape == (2, 1, 8, 8) and torch.equal(image + 0.5, target)
    again = list(task.epoch(2, torch.Generator().manual_seed(1)))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))


def test_images_are_turned_over_and_moved() -> None:
    pixels = torch.arange(1.0, 1 + 8 * 36).view(8, 1, 6, 6)
    labels = torch.arange(8)
    plain = Classification(pixels, labels, pixels, labels)
    moved = Classification(pixels, labels, pixels, labels, flip=True, border=2)
    seen = set()
    for task in (plain, moved):
        for x, chosen in task.epoch(4, torch.Generator().manual_seed(0)):
            assert x.shape == (4, 1, 6, 6) and x.is_contiguous(memory_format=torch.channels_last)
            for image, label in zip(x, chosen.tolist(), strict=True):
                inside = image[image > 0]
                assert ((inside - 1).long() // 36 == label).all()
                if task is plain:
                    assert torch.equal(image, pixels[label])
                else:
                    rows = image[0].diff(dim=1)
                    seen.add("turned" if (rows == -1).any() else "as it was")
                    seen.add("moved" if len(inside) < 36 else "in place")
    assert {"turned", "as it was", "moved"} <= seen
