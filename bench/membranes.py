"""Images of tissue whose membranes a network has to find.

A folder has one .npz file or several, each with arrays ``images`` and ``membrane`` of (K, H, W):
grey values, and what is not 0 where there is a membrane (for instance the sections of the ISBI 2012
challenge, of which the U-Net's paper reports). Without a folder the images are drawn: bright cells
with dark membranes, and noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.images import NoImages
from bench.training import Batch


@dataclass(frozen=True)
class Membranes:
    """Grey images of mean 0 and standard deviation 1, and 1 where there is a membrane.

    Both are (K, 1, H, W). Every fifth image is held back for the test. The metric is the
    intersection over union of the membrane there.

    Attributes:
        size: of the square crops that are trained on.
    """

    images: Tensor
    membrane: Tensor
    size: int = 128
    metric = "IoU"

    def part(self, test: bool) -> Batch:
        chosen = (torch.arange(len(self.images)) % 5 == 4) == test
        return self.images[chosen], self.membrane[chosen]

    def steps(self, batch: int) -> int:
        """An epoch has about as many pixels as the images for training."""
        return max(self.part(False)[0].numel() // (batch * self.size**2), 1)

    def epoch(self, batch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Batches of random crops, some of them turned over."""
        images, membrane = self.part(test=False)

        def draw(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        for _ in range(self.steps(batch)):
            pairs = []
            for _ in range(batch):
                number = draw(len(images))
                top, left = (draw(max(extent - self.size, 0) + 1) for extent in images.shape[2:])
                place = slice(None), slice(top, top + self.size), slice(left, left + self.size)
                pair = torch.stack((images[number][place], membrane[number][place]))
                pairs.append(pair.flip([dim for dim in (2, 3) if draw(2)]))
            x, target = torch.stack(pairs, 1)
            yield x.contiguous(memory_format=torch.channels_last), target

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of membrane against the rest."""
        return F.binary_cross_entropy_with_logits(output, target)

    def test(self, model: nn.Module) -> tuple[float, float]:
        """Loss and intersection over union."""
        images, membrane = self.part(test=True)
        logits = torch.cat([model(image) for image in images.split(1)])
        return self.loss(logits, membrane).item(), intersection_over_union(logits > 0, membrane > 0)


def load(folder: Path) -> Membranes:
    """The images of a folder.

    Raises:
        NoImages: there is no .npz file with ``images`` and ``membrane`` of one size.
    """
    parts: list[tuple[Any, Any]] = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            if {"images", "membrane"} <= set(arrays.files):
                parts.append((arrays["images"], arrays["membrane"]))
    if not parts:
        raise NoImages(f"{folder} has no .npz file with the arrays `images` and `membrane`.")
    if any(a.ndim != 3 or a.shape != b.shape for a, b in parts):
        raise NoImages("`images` and `membrane` have to be of one size, (K, H, W).")
    images, membrane = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts))  # noqa: B905
    images = images.float()
    images = (images - images.mean()) / images.std()
    return Membranes(images.unsqueeze(1), (membrane != 0).float().unsqueeze(1))


def draw(count: int = 15, size: int = 128, seed: int = 0) -> Membranes:
    """Drawn tissue: cells are the regions nearest to random points, membranes lie between them."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(size, dtype=torch.float32)
    pixels = torch.cartesian_prod(axis, axis)
    images, membranes = [], []
    for _ in range(count):
        points = torch.rand(max(size * size // 150, 4), 2, generator=generator) * size
        distances, nearest = torch.cdist(pixels, points).topk(2, largest=False)
        membrane = (distances[:, 1] - distances[:, 0] < 2).float()
        brightness = torch.rand(len(points), generator=generator)[nearest[:, 0]]
        grey = (0.5 + brightness) * (1 - membrane)
        images.append((grey + 0.4 * torch.randn(size * size, generator=generator)).view(size, size))
        membranes.append(membrane.view(size, size))
    stack = torch.stack(images).unsqueeze(1)
    return Membranes((stack - stack.mean()) / stack.std(), torch.stack(membranes).unsqueeze(1))


def intersection_over_union(predicted: Tensor, target: Tensor) -> float:
    """Of two masks of any one size; 1 where both are empty."""
    union = (predicted | target).sum().item()
    return (predicted & target).sum().item() / union if union else 1.0
