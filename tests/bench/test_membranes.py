"""A U-Net learns the same with either backend: the short form of ``python -m bench.membranes``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench import membranes
from bench.membranes import Curve, Images


@pytest.mark.usefixtures("native", "one_thread")
def test_a_unet_learns_the_same_with_both_backends() -> None:
    data = membranes.draw(count=15, size=40)
    curves = membranes.compare(data, seeds=3, steps=24, batch=4, size=32, widths=(16, 32))
    found = membranes.agreement(curves, data)
    assert all(found <= allowed for found, allowed in found.values()), found
    native = curves["native"]
    assert all(c.losses[-1] < 0.8 * c.losses[0] for c in native)
    # Two backends: rounding differs somewhere, or the comparison would be of one with itself.
    assert any(a.losses != b.losses for a, b in zip(native, curves["reference"], strict=True))


def test_what_differs_is_seen() -> None:
    data = membranes.draw(count=5, size=16)
    good = [
        Curve([0.7, 0.5, 0.4, 0.3, 0.2, 0.1], 0.90),
        Curve([0.7, 0.5, 0.4, 0.3, 0.2, 0.1], 0.92),
    ]
    bad = [Curve([0.7, 0.5, 0.4, 0.3, 0.3, 0.3], 0.30), Curve([0.7, 0.5, 0.4, 0.3, 0.2, 0.1], 0.92)]
    for native, broken in ((good, set()), (bad, {"loss of the last quarter", "IoU"})):
        found = membranes.agreement({"reference": good, "native": native}, data)
        differing = {name for name, (value, allowed) in found.items() if value > allowed}
        assert differing - {"IoU that is missing to have learnt"} >= broken
        assert bool(differing) == bool(broken)


def test_images_of_a_folder(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 255, (5, 8, 9), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=grey, membrane=(grey > 100).astype(np.uint8))
    np.savez(tmp_path / "other.npz", points=grey)
    data = membranes.load(tmp_path)
    assert data.images.shape == (5, 1, 8, 9) and abs(float(data.images.mean())) < 1e-6
    assert torch.equal(data.membrane[:, 0] > 0, torch.from_numpy(grey > 100))
    assert [len(images) for images, _ in (data.part(False), data.part(True))] == [4, 1]
    with pytest.raises(membranes.NoData, match=r"has no \.npz file"):
        membranes.load(tmp_path / "nowhere")


def test_intersection_over_union() -> None:
    a, b = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    assert membranes.intersection_over_union(a, b) == pytest.approx(1 / 3)
    assert membranes.intersection_over_union(a & b & ~b, a & ~a) == 1.0


def test_crops_move_image_and_membrane_alike() -> None:
    x = torch.arange(4 * 20 * 20.0).view(4, 1, 20, 20)
    data = Images(x, x + 0.5)
    batches = list(membranes.crops(data.part(False), 3, 2, 8, seed=1))
    for image, target in batches:
        assert image.shape == (2, 1, 8, 8) and torch.equal(image + 0.5, target)
    again = list(membranes.crops(data.part(False), 3, 2, 8, seed=1))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))
