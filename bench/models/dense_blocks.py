"""Dense blocks as they are, as one op, and layer by layer fused: from how many pixels on it pays.

``python -m bench.models.dense_blocks`` prints the tables from which resops/fusion/measured.py has
its numbers: timm's DenseBlock of 8 layers from 128 channels, and its DenseTransition of as many,
channels-last, fp32, four images of growing size; the median of alternating rounds, with its 20th
and 80th percentile.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import resops
from bench import timing
from bench.environment import restart_with_allocator_settings
from bench.session import EAGER, channels_last
from resops.fusion import measured
from tests.torchvision_ops import timm

LAYERS, CHANNELS, GROWTH, IMAGES = 8, 128, 32, 4
SIZES = (6, 12, 16, 20, 24, 34, 48)
BLOCK, BY_LAYER = "block", "layer by layer"


def create() -> dict[str, nn.Module]:
    """The three, with the same weights."""
    timm()
    from timm.models.densenet import DenseBlock

    torch.manual_seed(0)
    stock = channels_last(DenseBlock(LAYERS, CHANNELS, 4, GROWTH), torch.device("cpu"))
    one_norm = "denselayer1.norm1"  # without it the block is no single op
    return {
        EAGER: stock,
        BLOCK: resops.fuse(copy.deepcopy(stock)),
        BY_LAYER: resops.fuse(
            copy.deepcopy(stock), module_filter_fn=lambda m, name: name != one_norm
        ),
    }


def create_transition() -> dict[str, nn.Module]:
    """As it is and as one op, with the same weights."""
    timm()
    from timm.models.densenet import DenseTransition

    torch.manual_seed(0)
    stock = channels_last(DenseTransition(CHANNELS, CHANNELS // 2), torch.device("cpu"))
    return {EAGER: stock, BLOCK: resops.fuse(copy.deepcopy(stock))}


def calls(models: dict[str, nn.Module], x: Tensor, training: bool) -> dict[str, Callable[[], Any]]:
    """A training step, or inference, of each."""

    def step(model: nn.Module) -> None:
        y = model(x)
        torch.autograd.backward(y, torch.ones_like(y))

    @torch.inference_mode()
    def inference(model: nn.Module) -> None:
        model(x)

    call = step if training else inference
    return {name: lambda m=model: call(m) for name, model in models.items()}  # type: ignore[misc]


def check(outputs: dict[str, Tensor]) -> None:
    """Raise where the fused ones differ from the stock one by more than rounding."""
    for name, y in outputs.items():
        error = float((y - outputs[EAGER]).norm() / outputs[EAGER].norm())
        if not error < 1e-5:
            raise AssertionError(f"{name} is {error:.2g} from the stock block")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a cell")
    options = parser.parse_args()
    measured.DENSE_BLOCK = measured.DENSE_LAYER = measured.LeastPixels(0, 0)
    measured.TRANSITION = measured.LeastPixels(0, 0)
    print_table(f"block of {LAYERS} layers", create(), options)
    print_table("transition", create_transition(), options)


def print_table(title: str, models: dict[str, nn.Module], options: argparse.Namespace) -> None:
    """A row of every size and direction."""
    others = [name for name in models if name != EAGER]
    heads = "  ".join(f"eager / {name}".ljust(25) for name in others)
    print(title)
    print(f"{'pixels':>6}  {'':9}  {'eager':>9}  {heads}".rstrip())
    for size in SIZES:
        x = torch.randn(IMAGES, CHANNELS, size, size).contiguous(memory_format=torch.channels_last)
        for training in (True, False):
            for model in models.values():
                model.train(training)
            with timing.threads(options.threads):
                with torch.no_grad():
                    check({name: model(x) for name, model in models.items()})
                given = x.clone().requires_grad_(training)
                found = timing.alternate(
                    calls(models, given, training),
                    budget_s=options.seconds,
                    device=x.device,
                    min_rounds=3,
                    warmup=1,
                )
            cells = []
            for name in others:
                ratio = found.ratio(EAGER, name)
                cells.append(f"{ratio.median:.2f} [{ratio.p20:.2f}, {ratio.p80:.2f}]".ljust(25))
            eager = found.milliseconds(EAGER).median
            what = "training" if training else "inference"
            row = (f"{IMAGES * size * size:6d}", f"{what:9}", f"{eager:6.2f} ms", *cells)
            print("  ".join(row).rstrip(), flush=True)


if __name__ == "__main__":
    restart_with_allocator_settings(sys.argv[1:], "bench.models.dense_blocks")
    main()
