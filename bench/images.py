"""Real images that come inside scikit-learn and scikit-image: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# package -> folder and files in it, all of them colour photographs
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "skimage": (
        "data",
        (
            "astronaut.png",
            "chelsea.png",
            "coffee.png",
            "hubble_deep_field.jpg",
            "ihc.png",
            "motorcycle_left.png",
            "retina.jpg",
            "rocket.jpg",
        ),
    ),
}
# Mean and standard deviation of ImageNet's channels, as every torchvision model expects them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class NoImages(RuntimeError):
    """Neither scikit-learn nor scikit-image brings an image; the message says what to install."""


def image_files() -> list[Path]:
    """Those of FILES that exist, in a fixed order.

    Raises:
        NoImages: there is none.
    """
    found = []
    for package, (folder, names) in FILES.items():
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            found += [p for name in names if (p := Path(root) / folder / name).is_file()]
    if not found:
        raise NoImages(
            "the benchmark's images come with scikit-learn and scikit-image, and neither is there: "
            "run `pip install scikit-learn scikit-image pillow`"
        )
    return found


def noise_images(count: int, size: int = 224, seed: int = 0) -> tuple[Tensor, Tensor]:
    """As :func:`real_images`, of normally distributed pixels and ten labels: needs no package."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(count) % 10


def real_images(count: int, size: int = 224, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random crops of the bundled photographs.

    Returns:
        images (count, 3, size, size), float32, normalised, channels-last; and labels (count,),
        int64: the number of the photograph that a crop is from.
    """
    from PIL import Image

    files = image_files()
    generator = random.Random(seed)
    pictures = [Image.open(path).convert("RGB") for path in files]
    crops, labels = [], []
    for index in range(count):
        label = index % len(pictures)
        picture = pictures[label]
        side = generator.randint(min(picture.size) // 2, min(picture.size))
        left, top = (generator.randint(0, extent - side) for extent in picture.size)
        crop = picture.crop((left, top, left + side, top + side))
        crops.append(np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR)))
        labels.append(label)
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    images = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
    return images, torch.tensor(labels)
