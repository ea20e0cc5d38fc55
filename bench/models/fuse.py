"""``resops.fuse`` on models of torchvision, timm and MONAI: each as it is, and fused.

Small images, so that the time of a call counts too. A training step and inference are those of
bench/models/resnet.py; what they compute is first held to float64 (bench/models/compare.py).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import resops
from bench import timing
from bench.models.compare import CLASSES, Twins, check_twins, outcome
from bench.models.resnet import inference, saved_activations, training_step
from bench.session import EAGER, RESOPS, Session
from tests.torchvision_ops import timm, torchvision

SIZE = 96


class Network(NamedTuple):
    """A model that people have.

    Attributes:
        create: it, with CLASSES outputs.
        channels_last: the layout in which its users run it.
        pixelwise: it has an output for every pixel.
    """

    create: Callable[[], nn.Module]
    channels_last: bool = True
    pixelwise: bool = False


def _monai_unet() -> nn.Module:
    from monai.networks.nets import UNet

    network: nn.Module = UNet(2, 3, CLASSES, (16, 32, 64, 128), (2, 2, 2), num_res_units=2)
    return network


def _timm(name: str) -> Callable[[], Any]:
    return lambda: timm().create_model(name, num_classes=CLASSES)


NETWORKS = {
    "torchvision resnet50": Network(lambda: torchvision().models.resnet50(num_classes=CLASSES)),
    "timm resnetv2_50": Network(_timm("resnetv2_50")),
    "timm densenet121": Network(_timm("densenet121")),
    "MONAI UNet": Network(_monai_unet, channels_last=False, pixelwise=True),
}


def _data(
    network: Network, batch: int, device: torch.device, load_images: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    images, labels = load_images(batch, SIZE)
    labels = labels % CLASSES
    if network.pixelwise:
        labels = (labels.view(-1, 1, 1) + torch.arange(SIZE * SIZE).view(SIZE, SIZE)) % CLASSES
    if not network.channels_last:
        images = images.contiguous()
    return images.to(device), labels.to(device)


def run(session: Session, batch: int, load_images: Callable[..., Any]) -> None:
    """Check each network, then time it; one step of the progress bar each."""
    for name, network in NETWORKS.items():
        with session.step(name) as in_time:
            if not in_time:
                continue
            images, labels = _data(network, batch, session.device, load_images)
            torch.manual_seed(0)
            stock = network.create().to(session.device)
            twins = Twins.of(stock, images, resops.fuse, network.channels_last)
            with timing.threads(session.threads[0]):
                exact = outcome(twins.exact, images, labels, None)
            for dtype in session.dtypes:
                if check_twins(session, name, dtype, twins, images, labels, exact):
                    _time(session, name, dtype, twins, images, labels)


def _time(
    session: Session, name: str, dtype: str, twins: Twins, images: Tensor, labels: Tensor
) -> None:
    models = {EAGER: twins.stock, RESOPS: twins.ours}
    kept = {k: saved_activations(m, images, labels, dtype) for k, m in models.items()}
    session.add_saved("fuse", name, **kept, dtype=dtype, batch=len(images))
    directions = {
        "training": {k: training_step(m, images, labels, dtype) for k, m in models.items()},
        "inference": {k: inference(m, images, dtype) for k, m in models.items()},
    }
    for (direction, calls), count in product(directions.items(), session.threads):
        with timing.threads(count):
            found = timing.alternate(
                calls,
                budget_s=session.model_seconds,
                device=session.device,
                min_rounds=3,
                warmup=1,
            )
        session.add_timing(
            "fuse", name, found, count, direction=direction, dtype=dtype, batch=len(images)
        )
