"""Segmentation with a U-Net.

    python examples/segment_unet.py --data FOLDER --epochs 30
    torchrun --nproc-per-node 2 examples/segment_unet.py --data FOLDER

FOLDER has ``images/`` and ``masks/`` with files of the same names, which Pillow can read: grey or
colour images, and masks that are not 0 where the object is. Every fifth image is held back for the
test. Without a folder the picture of coins in scikit-image is segmented, of which the right fifth
is held back.

Training is on random crops; the test image is segmented whole, tile by tile. After every epoch a
checkpoint is written, with which ``--resume`` goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import (
    EarlyStopping,
    Processes,
    bar,
    load,
    processes,
    save,
    set_learning_rate,
    weight_decay_groups,
)

import resops
from resops.models import create_model, overlap_tile

Pair = tuple[Tensor, Tensor]  # (C, H, W) from 0 to 1, and (1, H, W) of 0 and 1


def read_folder(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """Training and test pairs of ``images/`` and ``masks/``.

    Raises:
        SystemExit: there are none; the message says what was expected.
    """
    from PIL import Image

    pairs = []
    for path in sorted((folder / "images").glob("*")):
        masks = sorted((folder / "masks").glob(f"{path.stem}.*"))
        if masks:
            image = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
            mask = np.asarray(Image.open(masks[0]).convert("L")) != 0
            pairs.append(
                (torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)[None] + 0.0)
            )
    if len(pairs) < 5:
        raise SystemExit(
            f"{folder} has {len(pairs)} images with masks; images/ and masks/ have to have five "
            "files of the same names at least."
        )
    train = [pair for i, pair in enumerate(pairs) if i % 5 != 4]
    return train, pairs[4::5]


def coins() -> tuple[list[Pair], list[Pair]]:
    """The picture of coins: a mask by Otsu's threshold, and the right fifth as the test."""
    from skimage import data, filters, morphology

    grey = data.coins()
    mask = morphology.closing(grey > filters.threshold_otsu(grey), morphology.disk(3))
    image = torch.from_numpy(grey.astype(np.float32) / 255).expand(3, -1, -1)
    target = torch.from_numpy(mask.astype(np.float32))[None]
    cut = image.size(2) * 4 // 5
    return [(image[..., :cut], target[..., :cut])], [(image[..., cut:], target[..., cut:])]


def random_crops(pairs: Sequence[Pair], count: int, size: int, generator: torch.Generator) -> Pair:
    """A batch of crops, some of them turned over: (count, C, size, size) and (count, 1, ...)."""

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    images, masks = [], []
    for _ in range(count):
        image, mask = pairs[draw(len(pairs))]
        height, width = (min(size, extent) for extent in image.shape[1:])
        top, left = draw(image.size(1) - height + 1), draw(image.size(2) - width + 1)
        turned = [dim for dim in (1, 2) if draw(2)]
        for source, crops in ((image, images), (mask, masks)):
            crops.append(source[:, top : top + height, left : left + width].flip(turned))
    batch = torch.stack(images).contiguous(memory_format=torch.channels_last)
    return batch, torch.stack(masks)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[Pair],
    options: argparse.Namespace,
    here: Processes,
    epoch: int,
) -> float:
    """One epoch of ``options.steps`` steps; the mean loss of this process."""
    # Each epoch and process draws its own crops and dropout, the same ones after a resumption.
    generator = torch.manual_seed(options.seed + 1000 * epoch + here.rank)
    model.train()
    total = 0.0
    for _ in bar(range(options.steps), options.steps, f"epoch {epoch}", here.is_first):
        images, masks = random_crops(pairs, options.batch_size, options.crop, generator)
        images, masks = images.to(here.device), masks.to(here.device)
        with torch.autocast(here.device.type, torch.bfloat16, enabled=options.amp):
            logits = model(images)
        loss = F.binary_cross_entropy_with_logits(logits.float(), masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / options.steps


def test_iou(model: nn.Module, pairs: Sequence[Pair], tile: int) -> float:
    """Intersection over union of the object in all test images."""
    model.eval()
    intersection = union = 0
    for image, mask in pairs:
        predicted = overlap_tile(model, image[None], tile)[0] > 0
        intersection += int((predicted & (mask > 0)).sum())
        union += int((predicted | (mask > 0)).sum())
    return intersection / max(union, 1)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with images/ and masks/")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=25, help="of an epoch, in each process")
    parser.add_argument("--batch-size", type=int, default=4, help="crops in each process")
    parser.add_argument("--crop", type=int, default=128, help="rows and columns")
    parser.add_argument("--width", type=int, default=16, help="channels at the finest resolution")
    parser.add_argument("--norm", default="batch", help="batch, instance or group")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--patience", type=int, default=0, help="epochs; 0: no early stopping")
    parser.add_argument("--sync-bn", action="store_true", help="statistics over all processes")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=Path("segment_unet.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> float:
    """Train; the best IoU on the test images."""
    options = parse(arguments)
    train_pairs, test_pairs = coins() if options.data is None else read_folder(options.data)
    with processes() as here:
        torch.manual_seed(options.seed)
        widths = [options.width * factor for factor in (1, 2, 4, 8)]
        network: Any = create_model(
            "unet", num_classes=1, widths=widths, norm_layer=options.norm, drop_rate=options.dropout
        )
        network = network.to(here.device, memory_format=torch.channels_last)
        if options.sync_bn:
            network = resops.convert_sync_batchnorm(network)
        optimizer = torch.optim.AdamW(
            weight_decay_groups(network, options.weight_decay), lr=options.lr
        )
        stopping = EarlyStopping(options.patience)
        parts = {"model": network, "optimizer": optimizer, "stop": stopping}
        first = 0
        if options.resume:
            state = load(options.checkpoint, here.device)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            first = state["epoch"] + 1
        model = here.wrap(network)
        for epoch in range(first, options.epochs):
            set_learning_rate(optimizer, epoch, options.epochs, options.lr)
            loss = train_epoch(model, optimizer, train_pairs, options, here, epoch)
            # Running statistics differ between processes: each tests its own, and all agree.
            loss, iou = here.mean(loss, test_iou(network, test_pairs, options.crop))
            best = stopping.improved(iou)
            if here.is_first:
                print(f"epoch {epoch}: loss {loss:.4f}, test IoU {iou:.4f}{' *' * best}")
                state = {name: part.state_dict() for name, part in parts.items()}
                save(options.checkpoint, {**state, "epoch": epoch})
            if stopping.stops:
                break
        return stopping.best


if __name__ == "__main__":
    main()
