"""One network of each family: training step, inference and saved bytes, against stock modules.

The stock network is torchvision's or timm's where they have it, else the same network of
torch.nn's own modules (bench/models/stock_twin.py). A training step is forward, a mean square of
all outputs and backward, with autocast for 16-bit dtypes, and without an optimizer, which would
take much of the time of a small batch; inference is that of bench/models/resnet.py. Images are
small, and some networks narrow, so that a step of a batch of 16 takes less than a second of one
core: the case has the size. Of VGG and AlexNet it is the features, since their classifiers have
nothing of ours.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import resops
from bench import timing
from bench.models.compare import K, autocast, inference_copy
from bench.models.stock_twin import outputs, stock_twin
from bench.session import DTYPES, EAGER, RESOPS, Session, saved_bytes
from tests.torchvision_ops import timm, torchvision

# What outputs may be off by beside K times the error of eager. fp32: Winograd's convolutions, whose
# error of one layer is up to 5e-5 of the sum of the terms (docs/math/conv_bn_act.md). 16 bits: the
# weights into which norms are folded are rounded, not the norms' outputs.
FLOORS = {"fp32": 5e-5, "bf16": 3e-2, "fp16": 4e-3}
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Network(NamedTuple):
    """One of a family.

    Attributes:
        size: of an image, (channels, *spatial).
        options: of ``resops.models.create_model``.
        stock: makes the stock network with the same keys; None for the stock twin.
    """

    size: tuple[int, ...]
    options: Mapping[str, Any] = {}
    stock: Callable[[], Any] | None = None


def _torchvision(name: str) -> Callable[[], Any]:
    return lambda: getattr(torchvision().models, name)()


class _Features(nn.Module):
    """The features of a classifier of torchvision."""

    def __init__(self, name: str) -> None:
        super().__init__()
        with torch.device("meta"):  # the classifier would take half a gigabyte
            model = getattr(torchvision().models, name)()
        self.features = model.features.to_empty(device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.features(x)
        return y


_LAST_MAP = {"features_only": True, "out_indices": (-1,)}
_VOLUME = {"num_classes": 2, "in_chans": 1}
NETWORKS = {
    "resnet18": Network((3, 96, 96), stock=_torchvision("resnet18")),
    "resnext50_32x4d": Network((3, 64, 64), stock=_torchvision("resnext50_32x4d")),
    "wide_resnet50_2": Network((3, 64, 64), stock=_torchvision("wide_resnet50_2")),
    "resnetv2_50": Network((3, 64, 64), stock=lambda: timm().create_model("resnetv2_50")),
    "resnet20": Network((3, 32, 32)),
    "plain20": Network((3, 32, 32)),
    "preact_resnet110": Network((3, 32, 32)),
    "wrn_16_4": Network((3, 32, 32)),
    "densenet121": Network((3, 64, 64), stock=_torchvision("densenet121")),
    "densenet_bc_40": Network((3, 32, 32)),
    "highway_conv": Network((1, 32, 32)),
    "unet": Network((3, 96, 96), {"widths": (16, 32, 64, 128, 256)}),
    "residual_unet": Network((3, 96, 96), {"widths": (16, 32, 64, 128, 256)}),
    "unetplusplus": Network((3, 64, 64), {"widths": (16, 32, 64, 128)}),
    "unet3d": Network((1, 32, 32, 16), {**_VOLUME, "widths": (8, 16, 32)}),
    "vnet": Network((1, 32, 32, 16), {**_VOLUME, "widths": (8, 16, 32), "depths": (1, 2, 2)}),
    "hourglass": Network((3, 128, 128), {"num_stacks": 2, "width": 64}),
    "fpn": Network((3, 64, 64), {"backbone": "resnet18", "out_channels": 64}),
    "convnext_tiny": Network((3, 64, 64), stock=_torchvision("convnext_tiny")),
    "vgg11_bn": Network((3, 64, 64), _LAST_MAP, lambda: _Features("vgg11_bn")),
    "alexnet": Network((3, 95, 95), _LAST_MAP, lambda: _Features("alexnet")),
}


def create_pair(name: str, device: torch.device) -> dict[str, nn.Module]:
    """The stock and the resops network with the same state, running statistics of one batch."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    ours = resops.models.create_model(name, **network.options)
    norms = [m for m in ours.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        ours(torch.randn(4, *network.size))
    for norm in norms:
        norm.momentum = 0.1
    if network.stock is None:
        stock = stock_twin(ours)
    else:
        stock = network.stock()
        stock.load_state_dict(ours.state_dict(), strict=True)
    layout = LAYOUTS[len(network.size) + 1]
    pair = {EAGER: stock, RESOPS: ours}
    return {k: m.to(device, memory_format=layout) for k, m in pair.items()}  # type: ignore[call-overload]


def images_of(name: str, batch: int, device: torch.device) -> Tensor:
    """Normally distributed pixels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *NETWORKS[name].size, generator=generator).to(device)
    return x.contiguous(memory_format=LAYOUTS[x.dim()])


def provider(name: str) -> contextlib.AbstractContextManager[object]:
    """What is around every call: what is left of resops in a stock twin is plain PyTorch."""
    return resops.backend("reference") if name == EAGER else contextlib.nullcontext()


def _loss(model: nn.Module, images: Tensor, dtype: str) -> Tensor:
    with autocast(images.device, dtype):
        y = model(images)
    return torch.stack([t.float().square().mean() for t in outputs(y)]).sum()


def _compiled(model: nn.Module, mode: str | None) -> Any:
    return torch.compile(model, mode=mode) if mode else model


def training_step(
    model: nn.Module, images: Tensor, dtype: str, compiled: str | None = None
) -> Callable[[], object]:
    """Forward and backward pass as a call; it changes a copy of the model."""
    model = copy.deepcopy(model).train()
    run = _compiled(model, compiled)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        _loss(run, images, dtype).backward()

    return step


def inference(
    model: nn.Module, images: Tensor, dtype: str, compiled: str | None = None
) -> Callable[[], object]:
    """The forward pass of a copy of the model as a call."""
    run, images = _compiled(inference_copy(model, dtype), compiled), images.to(DTYPES[dtype])

    def forward() -> object:
        with torch.inference_mode():
            return run(images)

    return forward


def check(session: Session, name: str, dtype: str, models: dict[str, nn.Module]) -> bool:
    """Outputs in evaluation and in training are as near to float64 as those of the stock one."""
    x = images_of(name, 4, session.device)
    good = True
    for training in (False, True):
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for key, model in {**models, "exact": models[EAGER]}.items():
                model = copy.deepcopy(model).train(training)
                with provider(EAGER if key == "exact" else key):
                    if key == "exact":
                        y = model.double()(x.double())
                    elif training:
                        with autocast(x.device, dtype):
                            y = model(x)
                    else:
                        y = inference_copy(model, dtype)(x.to(DTYPES[dtype]))
                found[key] = outputs(y)[-1].double()
        exact = found["exact"]
        error, eager = (float((found[k] - exact).norm() / exact.norm()) for k in (RESOPS, EAGER))
        limit = K * eager + FLOORS[dtype]
        what = f"{name} {dtype} outputs, {'training' if training else 'evaluation'}"
        detail = f"distance from float64: resops {error:.3g}, eager {eager:.3g}, limit {limit:.3g}"
        good &= session.check(what, error <= limit, error / limit, detail, f"{name} {dtype}")
    return good


def saved_activations(model: nn.Module, images: Tensor, dtype: str) -> int:
    """Bytes that the forward pass of a training step keeps."""
    model = copy.deepcopy(model).train()
    there = chain(model.parameters(), model.buffers(), (images,))
    return saved_bytes(lambda: _loss(model, images, dtype), there)


def _within(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with provider(name):
            return call()

    return run


def run(
    session: Session, names: Sequence[str], batches: Sequence[int], compiled: str | None = None
) -> None:
    """Check each network, then time it; one step of the progress bar each.

    Args:
        compiled: time ``torch.compile`` of the stock network in this mode, too.
    """
    for name in names:
        with session.step(name) as in_time, timing.threads(session.threads[0]):
            if not in_time:
                continue
            models = create_pair(name, session.device)
            for dtype in session.dtypes:
                if check(session, name, dtype, models):
                    for batch in batches:
                        _time(session, name, dtype, models, batch, compiled)


def _time(
    session: Session,
    name: str,
    dtype: str,
    models: dict[str, nn.Module],
    batch: int,
    compiled: str | None,
) -> None:
    images = images_of(name, batch, session.device)
    case = f"{name} {'x'.join(map(str, images.shape[1:]))}"
    kept = {}
    for key, model in models.items():
        with provider(key):
            kept[key] = saved_activations(model, images, dtype)
    session.add_saved("families", case, **kept, dtype=dtype, batch=batch)
    for direction, make in (("training", training_step), ("inference", inference)):
        calls = {k: _within(k, make(m, images, dtype)) for k, m in models.items()}
        if compiled:
            calls["compiled"] = _within(EAGER, make(models[EAGER], images, dtype, compiled))
        found = timing.alternate(
            calls, budget_s=session.model_seconds, device=session.device, min_rounds=3, warmup=1
        )
        session.add_timing(
            "families",
            case,
            found,
            session.threads[0],
            direction=direction,
            dtype=dtype,
            batch=batch,
        )
