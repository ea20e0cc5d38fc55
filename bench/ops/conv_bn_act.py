"""Convolutions of four networks on the CPU: forward, gradient of the input, gradient of the weight.

    python -m bench.ops.conv_bn_act [--networks resnet18,resnet50] [--threads 1] [--seconds 0.3]

Each phase is compared with torch's own convolution: float32, channels-last, the same tensors,
alternately. A row has the algorithm that the call takes, GFLOP/s as a direct convolution would
count them, the share of the peak that a large matrix product reaches in the same run (Winograd's
algorithm multiplies less, and passes 100 %), and both errors against float64, relative to the sum
of the absolute values of an output's terms. An error above 5e-5, the bound of the precision "high",
ends the program with status 1. In brackets behind a layer: how often the network has it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import environment, timing
from bench.table import align

BOUND = 5e-5
PHASES = ("forward", "backward_data", "backward_weight")


@dataclass(frozen=True)
class Layer:
    """A convolution over (batch, c_in, size, size); padded so that stride 1 keeps the size."""

    c_in: int
    c: int
    size: int
    kernel: int = 3
    stride: int = 1
    count: int = 1

    @property
    def label(self) -> str:
        step = f" /{self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel} {self.c_in}->{self.c} {self.size}{step} ({self.count})"


def _bottlenecks() -> list[Layer]:
    layers = [Layer(3, 64, 224, 7, 2), Layer(64, 64, 56, 1)]
    for width, size, blocks in ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)):
        before = 64 if width == 64 else 2 * width
        if width > 64:
            layers.append(Layer(before, width, 2 * size, 1))
            layers.append(Layer(width, width, 2 * size, 3, 2))
        stride = 1 if width == 64 else 2
        layers.append(Layer(before, 4 * width, size * stride, 1, stride))
        layers.append(Layer(4 * width, width, size, 1, 1, blocks - 1))
        layers.append(Layer(width, width, size, 3, 1, blocks - (width > 64)))
        layers.append(Layer(width, 4 * width, size, 1, 1, blocks))
    return layers


def _basic_blocks() -> list[Layer]:
    layers = [Layer(3, 64, 224, 7, 2), Layer(64, 64, 56, 3, 1, 4)]
    for width, size in ((128, 28), (256, 14), (512, 7)):
        layers.append(Layer(width // 2, width, 2 * size, 3, 2))
        layers.append(Layer(width // 2, width, 2 * size, 1, 2))
        layers.append(Layer(width, width, size, 3, 1, 3))
    return layers


# The 1x1 convolutions of DenseNet have as many input channels as layers came before: some of them.
NETWORKS: dict[str, tuple[int, list[Layer]]] = {  # batch size, layers
    "resnet18": (8, _basic_blocks()),
    "resnet50": (8, _bottlenecks()),
    "densenet121": (
        8,
        [
            *[Layer(128, 32, s, 3, 1, n) for s, n in ((56, 6), (28, 12), (14, 24), (7, 16))],
            *[
                Layer(c, 128, s, 1)
                for c, s in ((64, 56), (224, 56), (320, 28), (768, 14), (768, 7))
            ],
            *[Layer(c, c // 2, s, 1) for c, s in ((256, 56), (512, 28), (1024, 14))],
        ],
    ),
    "unet": (
        1,
        [
            Layer(3, 64, 256),
            Layer(64, 64, 256, count=2),
            Layer(128, 64, 256),
            *[
                layer
                for c, s in ((128, 128), (256, 64), (512, 32))
                for layer in (Layer(c // 2, c, s), Layer(c, c, s, count=2), Layer(2 * c, c, s))
            ],
            Layer(512, 1024, 16),
            Layer(1024, 1024, 16),
        ],
    ),
}


def _image(batch: int, channels: int, size: int) -> Tensor:
    return torch.randn(batch, size, size, channels).permute(0, 3, 1, 2)


class Phases:
    """The three phases of one layer, by torch and by resops, on the same tensors."""

    def __init__(self, layer: Layer, batch: int) -> None:
        padding = layer.kernel // 2
        self.geometry = ([layer.stride] * 2, [padding] * 2, [1, 1])
        self.x = _image(batch, layer.c_in, layer.size)
        weight = torch.randn(layer.c, layer.c_in, layer.kernel, layer.kernel)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        out = (layer.size + 2 * padding - layer.kernel) // layer.stride + 1
        self.grad_y = _image(batch, layer.c, out)
        self.flops = 2.0 * self.grad_y.numel() * layer.c_in * layer.kernel**2

    def eager(self, phase: str, wide: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        x, weight, grad_y = (wide(t) for t in (self.x, self.weight, self.grad_y))
        if phase == "forward":
            return torch.nn.functional.conv2d(x, weight, None, *self.geometry)
        of_weight = phase == "backward_weight"
        grads = torch.ops.aten.convolution_backward(
            grad_y,
            x,
            weight,
            None,
            *self.geometry,
            False,
            [0, 0],
            1,
            [not of_weight, of_weight, False],
        )
        return grads[1] if of_weight else grads[0]

    def resops(self, phase: str) -> Tensor:
        ops, plain = torch.ops.resops, (None, None, "identity", 0.0)
        if phase == "forward":
            outputs = ops.conv_bn_act_forward(
                [self.x],
                *plain,
                self.weight,
                None,
                None,
                "identity",
                0.0,
                *self.geometry,
                False,
            )
        elif phase == "backward_data":
            size = list(self.x.shape)
            outputs = ops.conv_bn_act_backward_data(
                self.grad_y, self.weight, size, None, *plain, None, None, None, *self.geometry
            )
        else:
            size = list(self.weight.shape)
            return ops.conv_bn_act_backward_weight(
                self.grad_y, [self.x], *plain, size, *self.geometry
            )
        return outputs[0]

    def path(self, phase: str) -> str:
        from resops import _native

        assert _native.module is not None
        sizes = [list(t.shape) for t in (self.x, self.grad_y, self.weight)]
        algorithm, _ = _native.module.conv_path(phase, "float32", *sizes, *self.geometry)
        return str(algorithm)

    def errors(self, phase: str) -> tuple[float, float]:
        """Of torch and of resops."""
        exact = self.eager(phase, torch.Tensor.double)
        terms = self.eager(phase, lambda t: t.double().abs()).norm()
        theirs, ours = (
            float((y.double() - exact).norm() / terms)
            for y in (self.eager(phase), self.resops(phase))
        )
        return theirs, ours


def peak(seconds: float) -> float:
    """GFLOP/s of a large matrix product."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    found = timing.alternate({"mm": lambda: torch.mm(a, b)}, budget_s=seconds)
    return 2e-9 * 1024**3 / min(found.seconds["mm"])


def measure(phases: Phases, phase: str, seconds: float, limit: float) -> tuple[list[str], float]:
    """A row of the table, and the error of resops."""
    theirs, ours = phases.errors(phase)
    calls = {"eager": lambda: phases.eager(phase), "resops": lambda: phases.resops(phase)}
    found = timing.alternate(calls, budget_s=seconds)
    times = [found.milliseconds(name).median for name in ("eager", "resops")]
    rate = phases.flops / times[1] * 1e-6
    row = [
        phase,
        phases.path(phase),
        *(f"{t:.2f}" for t in times),
        f"{found.ratio('eager', 'resops').median:.2f}",
        f"{rate:.0f}",
        f"{100 * rate / limit:.0f}",
        f"{theirs:.1e}",
        f"{ours:.1e}",
    ]
    return row, ours


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops.conv_bn_act")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="per comparison")
    options = parser.parse_args(arguments)
    import resops  # noqa: F401  (registers the ops)

    worst = 0.0
    head = ["layer", "phase", "algorithm", "eager ms", "resops ms", "ratio", "GFLOP/s", "% of peak"]
    with timing.threads(options.threads), torch.no_grad():
        limit = peak(1.0)
        print(f"{options.threads} threads, matrix product {limit:.0f} GFLOP/s")
        for name in options.networks.split(","):
            batch, layers = NETWORKS[name]
            rows: list[Any] = [[*head, "error eager", "error resops"]]
            for layer in layers:
                torch.manual_seed(0)
                phases = Phases(layer, batch)
                for phase in PHASES:
                    row, error = measure(phases, phase, options.seconds, limit)
                    rows.append([layer.label, *row])
                    worst = max(worst, error)
            print(f"\n{name}, batch {batch}\n{align(rows)}", flush=True)
    print(f"\nlargest error: {worst:.1e}, allowed: {BOUND:.0e}")
    return 0 if worst <= BOUND else 1


if __name__ == "__main__":
    environment.restart_with_allocator_settings(sys.argv[1:], "bench.ops.conv_bn_act")
    sys.exit(main())
