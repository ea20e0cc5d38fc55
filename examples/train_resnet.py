"""Training a ResNet on an image folder, as the field does it.

    python examples/train_resnet.py FOLDER --model resnet18 --epochs 90
    torchrun --nproc-per-node 2 examples/train_resnet.py FOLDER --mixup 0.2 --cutmix 1.0

FOLDER has ``train/`` and ``val/``, each with a folder of images for every class. Augmentations are
torchvision's (``torchvision.transforms.v2``): random crop and flip, RandAugment, MixUp and CutMix.
Regularisers: label smoothing, weight decay, dropout before the classifier, early stopping. After
every epoch a checkpoint is written, with which ``--resume`` goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, default_collate
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
from resops.models import create_model, list_models

try:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2
except (ImportError, RuntimeError) as error:
    raise SystemExit(
        "This example takes its augmentations and its data set from torchvision, which cannot be "
        f"imported here ({error}): pip install torchvision"
    ) from None

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def transforms(size: int, rand_augment: int | None) -> tuple[Any, Any]:
    """What is done to an image in training, and in the test.

    Args:
        rand_augment: magnitude of RandAugment; None for none.
    """
    numbers = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    extra = [] if rand_augment is None else [v2.RandAugment(magnitude=rand_augment)]
    crop = v2.RandomResizedCrop(size, antialias=True)
    training = v2.Compose([crop, v2.RandomHorizontalFlip(), *extra, *numbers])
    resize = v2.Resize(size * 8 // 7, antialias=True)
    return training, v2.Compose([resize, v2.CenterCrop(size), *numbers])


def mixing(mixup: float, cutmix: float, num_classes: int) -> Any:
    """The function that makes a batch of samples: MixUp or CutMix, one of both by chance, or
    neither."""
    kinds = []
    if mixup > 0:
        kinds.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix > 0:
        kinds.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    if not kinds:
        return default_collate
    choice = v2.RandomChoice(kinds)
    return lambda samples: choice(*default_collate(samples))


def loaders(options: argparse.Namespace, here: Processes) -> tuple[DataLoader, DataLoader, int]:
    """Batches for training and test, of which each process gets its share; number of classes."""
    training, test = transforms(options.size, options.rand_augment)
    sets = []
    for name, transform in (("train", training), ("val", test)):
        folder = options.data / name
        if not folder.is_dir():
            raise SystemExit(f"{options.data} has to have the folders train/ and val/.")
        sets.append(ImageFolder(str(folder), transform))
    if sets[0].classes != sets[1].classes:
        raise SystemExit(f"train/ and val/ of {options.data} have different classes.")
    num_classes = len(sets[0].classes)
    collates = (mixing(options.mixup, options.cutmix, num_classes), default_collate)
    made = []
    for is_test, (images, collate) in enumerate(zip(sets, collates, strict=True)):
        sampler = DistributedSampler(
            images, here.count, here.rank, shuffle=not is_test, seed=options.seed
        )
        made.append(
            DataLoader(
                images,
                options.batch_size,
                sampler=sampler,
                num_workers=options.workers,
                collate_fn=collate,
                # Batch norm cannot train on the one image that may be left over.
                drop_last=not is_test and len(sampler) >= options.batch_size,
                pin_memory=here.device.type == "cuda",
            )
        )
    return made[0], made[1], num_classes


def on_device(batch: Sequence[Tensor], here: Processes) -> tuple[Tensor, Tensor]:
    images, labels = (t.to(here.device, non_blocking=True) for t in batch)
    return images.contiguous(memory_format=torch.channels_last), labels


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    options: argparse.Namespace,
    here: Processes,
    epoch: int,
) -> float:
    """One pass over the images; the mean loss of this process."""
    loader.sampler.set_epoch(epoch)
    # Each epoch and process has its own augmentations, the same ones after a resumption.
    torch.manual_seed(options.seed + 1000 * epoch + here.rank)
    model.train()
    total = 0.0
    for batch in bar(loader, len(loader), f"epoch {epoch}", here.is_first):
        images, labels = on_device(batch, here)
        with torch.autocast(here.device.type, torch.bfloat16, enabled=options.amp):
            logits = model(images)
        # Labels are numbers, or probabilities after MixUp and CutMix.
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=options.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / max(len(loader), 1)


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Any, here: Processes) -> float:
    """Of the test images of this process."""
    model.eval()
    right = count = 0
    for batch in loader:
        images, labels = on_device(batch, here)
        right += int((model(images).argmax(1) == labels).sum())
        count += len(labels)
    return right / max(count, 1)


def make_model(options: argparse.Namespace, num_classes: int, device: torch.device) -> Any:
    """The network, its weights in channels-last, with dropout before its classifier."""
    model: Any = create_model(options.model, num_classes=num_classes, zero_init_residual=True)
    if options.dropout > 0:
        model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(options.dropout))
    if options.sync_bn:
        model = resops.convert_sync_batchnorm(model)
    return model.to(device, memory_format=torch.channels_last)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--model", default="resnet50", choices=list_models("resnet*"))
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=64, help="images in each process")
    parser.add_argument("--size", type=int, default=224, help="rows and columns of an image")
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--lr", type=float, default=0.1, help="for 256 images a step")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--warmup", type=int, default=5, help="epochs")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--mixup", type=float, default=0.0, help="alpha; 0: none")
    parser.add_argument("--cutmix", type=float, default=0.0, help="alpha; 0: none")
    parser.add_argument("--rand-augment", type=int, help="magnitude, such as 9; default: none")
    parser.add_argument("--patience", type=int, default=0, help="epochs; 0: no early stopping")
    parser.add_argument("--sync-bn", action="store_true", help="statistics over all processes")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=Path("train_resnet.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> float:
    """Train; the best accuracy on the test images."""
    options = parse(arguments)
    with processes() as here:
        torch.manual_seed(options.seed)
        train_loader, test_loader, num_classes = loaders(options, here)
        network = make_model(options, num_classes, here.device)
        rate = options.lr * options.batch_size * here.count / 256
        optimizer = torch.optim.SGD(
            weight_decay_groups(network, options.weight_decay), rate, momentum=options.momentum
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
            set_learning_rate(optimizer, epoch, options.epochs, rate, options.warmup)
            loss = train_epoch(model, optimizer, train_loader, options, here, epoch)
            loss, metric = here.mean(loss, accuracy(network, test_loader, here))
            best = stopping.improved(metric)
            if here.is_first:
                print(f"epoch {epoch}: loss {loss:.4f}, test accuracy {metric:.4f}{' *' * best}")
                state = {name: part.state_dict() for name, part in parts.items()}
                save(options.checkpoint, {**state, "epoch": epoch})
            if stopping.stops:
                break
        return stopping.best


if __name__ == "__main__":
    main()
