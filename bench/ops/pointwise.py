"""1x1 convolutions on the CPU by each of the algorithms that there are: which one is chosen, and
which one was fastest.

    python -m bench.ops.pointwise [--batch 4] [--seconds 0.2]

float32, channels-last, the shapes of ResNet-50, all three phases, alternately. The rules of
csrc/cpu/conv_path.cpp are made from this table. The last column is what the choice loses against
the fastest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from bench import environment, timing
from bench.ops.conv_bn_act import NETWORKS, PHASES, Layer, Phases
from bench.table import align

ALGORITHMS = ("onednn", "matrix_product", "transposed_product", "pointwise")


def shapes() -> list[Layer]:
    """The 1x1 convolutions of ResNet-50, without the strided ones."""
    return [layer for layer in NETWORKS["resnet50"][1] if (layer.kernel, layer.stride) == (1, 1)]


def compare(phases: Phases, phase: str, seconds: float) -> tuple[str, dict[str, float]]:
    """The algorithm that is chosen, and milliseconds of all that the phase has."""
    from resops import _C

    def by(algorithm: str) -> Callable[[], object]:
        def call() -> object:
            _C.set_conv_algorithm(algorithm)
            return phases.resops(phase)

        return call

    calls = {}
    try:
        for algorithm in ALGORITHMS:
            _C.set_conv_algorithm(algorithm)
            if phases.path(phase) == algorithm:
                calls[algorithm] = by(algorithm)
        found = timing.alternate(calls, budget_s=seconds)
    finally:
        _C.set_conv_algorithm("auto")
    return phases.path(phase), {k: found.milliseconds(k).median for k in calls}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops.pointwise")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.2, help="per comparison")
    options = parser.parse_args(arguments)
    head = ["layer", "phase", *(f"{name} ms" for name in ALGORITHMS), "chosen", "lost"]
    rows = [head]
    with timing.threads(options.threads), torch.no_grad():
        for layer in shapes():
            torch.manual_seed(0)
            phases = Phases(layer, options.batch)
            for phase in PHASES:
                chosen, times = compare(phases, phase, options.seconds)
                cells = [f"{times[k]:.2f}" if k in times else "" for k in ALGORITHMS]
                lost = times[chosen] / min(times.values()) - 1
                rows.append([layer.label, phase, *cells, chosen, f"{100 * lost:.0f} %"])
    print(f"batch {options.batch}, {options.threads} threads\n{align(rows)}")
    return 0


if __name__ == "__main__":
    environment.restart_with_allocator_settings(sys.argv[1:], "bench.ops.pointwise")
    sys.exit(main())
