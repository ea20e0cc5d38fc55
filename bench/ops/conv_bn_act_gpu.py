"""The convolutions of ResNet-50 on a GPU: the native forward kernel against cuDNN and what follows.

    python -m bench.ops.conv_bn_act_gpu [--batch 256] [--dtypes bf16,fp16] [--seconds 0.2]

Three forms, each against PyTorch's own ops for the same work, on the same channels-last tensors,
alternately: bias and relu (evaluation), statistics (training), and relu(scale * x + shift) before
the convolution with statistics after it. A row has microseconds of both, their ratio, TFLOP/s of
the kernel, and its error against float64, relative to the terms of an output, as a part of what
rule R allows; above 1 the program ends with status 1. In brackets: how often the network has the
layer. Without a GPU nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import timing
from bench.ops.conv_bn_act import NETWORKS, Layer
from bench.session import DTYPES
from bench.table import align

FORMS = ("bias, relu", "statistics", "prologue, statistics")
CHECKED = 2  # images


class Convolution:
    """One layer in one dtype, with everything that the forms need."""

    def __init__(self, layer: Layer, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        def random(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=torch.float32)

        def image(n: int, channels: int, size: int) -> Tensor:
            return random(n, size, size, channels).to(dtype).movedim(-1, 1)

        self.geometry = ([layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1])
        self.x = image(batch, layer.c_in, layer.size)
        length = layer.c_in * layer.kernel**2
        self.weight = image(layer.c, layer.c_in, layer.kernel) / length**0.5
        self.bias, self.scale = random(layer.c), random(layer.c_in)
        self.shift = random(layer.c_in)
        out = (layer.size + 2 * (layer.kernel // 2) - layer.kernel) // layer.stride + 1
        self.flops = 2.0 * batch * out * out * layer.c * length

    def native(self, form: str, x: Tensor | None = None) -> tuple[Tensor, ...]:
        before: tuple[Any, ...] = (None, None, "identity", 0.0)
        if form == "prologue, statistics":
            before = (self.scale, self.shift, "relu", 0.0)
        evaluation = form == "bias, relu"
        outputs: tuple[Tensor, ...] = torch.ops.resops.conv_bn_act_forward(
            [self.x if x is None else x],
            *before,
            self.weight,
            self.bias if evaluation else None,
            None,
            "relu" if evaluation else "identity",
            0.0,
            *self.geometry,
            not evaluation,
        )
        return outputs

    def _before(self, form: str, x: Tensor) -> Tensor:
        if form != "prologue, statistics":
            return x
        scale, shift = (t.to(x.dtype)[:, None, None] for t in (self.scale, self.shift))
        return torch.addcmul(shift, x, scale).relu_()

    def eager(self, form: str) -> tuple[Tensor, ...]:
        c = F.conv2d(self._before(form, self.x), self.weight, None, *self.geometry)
        if form == "bias, relu":
            return (c.add_(self.bias.to(c.dtype)[:, None, None]).relu_(),)
        return c, *torch.batch_norm_stats(c, 1e-5)

    def share(self, form: str) -> float:
        """Of the error that is allowed: 2 u + 8 * 2^-24, for the values of a few images."""
        x = self.x[:CHECKED]
        y = self.native(form, x)[0]
        if form == "prologue, statistics":
            scale, shift = (t[:, None, None] for t in (self.scale, self.shift))
            x = (x.float() * scale + shift).relu().to(x.dtype)
        wide, terms = (
            F.conv2d(part(x), part(self.weight), None, *self.geometry)
            for part in (torch.Tensor.double, lambda t: t.double().abs())
        )
        if form == "bias, relu":
            bias = self.bias.double()[:, None, None]
            wide, terms = (wide + bias).relu(), terms + bias.abs()
        allowed = torch.finfo(y.dtype).eps + 8 * 2.0**-24
        return float((y.double() - wide).norm() / terms.norm() / allowed)


def measure(
    case: Convolution, form: str, seconds: float, device: torch.device
) -> tuple[list[str], float]:
    """A row of the table, and the share of the allowed error."""
    share = case.share(form)
    calls: dict[str, Callable[[], object]] = {
        "eager": lambda: case.eager(form),
        "resops": lambda: case.native(form),
    }
    found = timing.alternate(calls, budget_s=seconds, device=device)
    times = [1e3 * found.milliseconds(name).median for name in ("eager", "resops")]
    ratio = found.ratio("eager", "resops").median
    row = [form, *(f"{t:.1f}" for t in times), f"{ratio:.2f}"]
    return [*row, f"{case.flops / times[1] * 1e-6:.1f}", f"{share:.2f}"], share


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops.conv_bn_act_gpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtypes", default="bf16,fp16")
    parser.add_argument("--seconds", type=float, default=0.2, help="per comparison")
    options = parser.parse_args(arguments)
    import resops  # noqa: F401  (registers the ops)

    if not torch.cuda.is_available():
        print("no GPU: nothing was timed")
        return 0
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(device))
    worst = 0.0
    for dtype in options.dtypes.split(","):
        rows: list[list[str]] = [
            ["layer", "form", "eager us", "resops us", "ratio", "TFLOP/s", "of allowed error"]
        ]
        for layer in NETWORKS["resnet50"][1]:
            torch.manual_seed(0)
            case = Convolution(layer, options.batch, DTYPES[dtype], device)
            for form in FORMS:
                row, share = measure(case, form, options.seconds, device)
                rows.append([layer.label, *row])
                worst = max(worst, share)
        print(f"\n{dtype}, batch {options.batch}\n{align(rows)}", flush=True)
    print(f"\nlargest part of the allowed error: {worst:.2f}")
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
