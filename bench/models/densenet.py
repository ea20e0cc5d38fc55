"""DenseNets: bytes saved, training step and inference against the stock model.

``python -m bench.models.densenet --models densenet121 --dtypes fp32,bf16``

What a step and inference are, and the dtypes, is said in bench/models/resnet.py. The stock model is
timed without and with its checkpoints (``memory_efficient``). Before a time is reported the logits
in evaluation are compared with those of the stock model in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import resops
from bench import timing, traffic
from bench.models.compare import CLASSES, K, inference_copy
from bench.models.resnet import inference, saved_activations, training_step
from bench.models.stock_densenet import CONFIGURATIONS, DenseNet
from bench.session import DTYPES, EAGER, RESOPS, channels_last

CHECKPOINTS = "eager, memory_efficient"
# Logits that a rounding of every layer may move by: the networks are some 120 layers deep.
FLOORS = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 2e-3}


def create(name: str, device: torch.device) -> dict[str, nn.Module]:
    """The stock model without and with checkpoints, and ours; one state, running statistics of one
    batch."""
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {
        EAGER: DenseNet(name, CLASSES),
        CHECKPOINTS: DenseNet(name, CLASSES, memory_efficient=True),
        RESOPS: resops.models.create_model(name, num_classes=CLASSES),
    }
    with torch.no_grad():
        for module in models[EAGER].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        models[EAGER](torch.randn(4, 3, 64, 64))
    for module in models[EAGER].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    for model in models.values():
        model.load_state_dict(models[EAGER].state_dict(), strict=True)
    return {name: channels_last(model, device) for name, model in models.items()}


@torch.inference_mode()
def check(models: dict[str, nn.Module], images: Tensor, dtype: str) -> None:
    """Raise where the logits of ours are further from the truth than allowed."""
    truth = copy.deepcopy(models[EAGER]).double().eval()(images.double())

    def error(name: str) -> float:
        y = inference_copy(models[name], dtype)(images.to(DTYPES[dtype])).double()
        return float((y - truth).norm() / truth.norm())

    ours, stock = error(RESOPS), error(EAGER)
    if not ours <= K * stock + FLOORS[dtype]:
        raise AssertionError(f"{dtype}: logits are {ours:.2g} from the truth, stock's {stock:.2g}")


def _megabytes(counted: Mapping[str, int], images: Tensor) -> float:
    return round(sum(counted.values()) / images.size(0) / 1e6, 1)


def measure(
    name: str, dtype: str, images: Tensor, seconds: float, parts: tuple[str, ...], threads: int
) -> dict[str, object]:
    """Saved bytes, milliseconds and ratios of one network at one dtype."""
    labels = torch.arange(images.size(0), device=images.device) % CLASSES
    models = create(name, images.device)
    check(models, images[:2], dtype)
    row: dict[str, object] = {"model": name, "dtype": dtype, "batch": images.size(0)}
    row |= {"threads": threads, "device": images.device.type, "torch": torch.__version__}
    if "saved" in parts:
        row["saved bytes"] = {
            k: saved_activations(m, images, labels, dtype) for k, m in models.items()
        }
    calls: dict[str, dict[str, Callable[[], object]]] = {}
    if "traffic" in parts:
        steps = {k: training_step(m, images, labels, dtype) for k, m in models.items()}
        counted = {k: traffic.count(step) for k, step in steps.items()}
        row["MB per image"] = {k: _megabytes(c, images) for k, c in counted.items()}
        row["MB per image, without convolutions"] = {
            k: _megabytes({op: n for op, n in c.items() if "conv" not in op}, images)
            for k, c in counted.items()
        }
    if "training" in parts:
        calls["training"] = {k: training_step(m, images, labels, dtype) for k, m in models.items()}
    if "inference" in parts:
        timed = {k: m for k, m in models.items() if k != CHECKPOINTS}
        calls["inference"] = {k: inference(m, images, dtype) for k, m in timed.items()}
    for direction, providers in calls.items():
        with timing.threads(threads):
            found = timing.alternate(
                providers, budget_s=seconds, device=images.device, min_rounds=3, warmup=1
            )
        row[f"{direction} ms"] = {k: round(found.milliseconds(k).median, 1) for k in providers}
        row[f"{direction} ratio"] = {
            k: round(found.ratio(k, RESOPS).median, 3) for k in providers if k != RESOPS
        }
        row[f"{direction} rounds"] = found.milliseconds(RESOPS).rounds
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="densenet121", help=", ".join(CONFIGURATIONS))
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--parts", default="saved,traffic,training,inference")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each comparison")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    resops.set_backend(args.backend)
    for name in args.models.split(","):
        for dtype in args.dtypes.split(","):
            parts = tuple(args.parts.split(","))
            print(json.dumps(measure(name, dtype, images, args.seconds, parts, args.threads)))


if __name__ == "__main__":
    main()
