"""Compiles Triton's batch norm kernels for a GPU, in several processes, into Triton's own cache.

    python -m bench.compile_triton CAPABILITY [PROCESSES]      for example 90

Each process records the launches of all BatchNorms of ResNet-50 and DenseNet-121 (nothing runs) and
compiles its share of the distinct ones, as bench.gpu_gate wants it before the tests that need them.
"""

from __future__ import annotations

import importlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from bench.shapes import DENSENET121, RESNET50


def compile_share(capability: int, share: int, shares: int, batch: int = 256) -> int:
    """How many kernels this process has compiled."""
    from tests.interpreter.ahead_of_time import Launch, compile_launch, recorded_launches

    kernels: Any = importlib.import_module("resops.triton_kernels.batch_norm")
    with recorded_launches() as launches:
        for shape in {*RESNET50, *DENSENET121}:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                size = (batch, shape.channels, shape.height, shape.width)
                x = torch.empty(size, dtype=dtype, memory_format=torch.channels_last)
                residual = torch.empty_like(x) if shape.residual else None
                vectors = [torch.empty(shape.channels) for _ in range(4)]
                act = ("relu" if shape.relu else "identity", 0.0)
                y, mean, invstd, mask = kernels.batch_norm_forward(
                    x, residual, *vectors, True, 0.1, 1e-5, *act
                )
                wanted = [True, residual is not None, True, True]
                kernels.batch_norm_backward(
                    y, x, None, mask, *vectors[:2], mean, invstd, True, *act, wanted
                )
    distinct: list[Launch] = list(dict.fromkeys(launches))
    for launch in distinct[share::shares]:
        compile_launch(launch, capability)
    return len(distinct[share::shares])


def main(arguments: list[str]) -> int:
    capability = int(arguments[0])
    processes = int(arguments[1]) if len(arguments) > 1 else len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(processes) as pool:
        shares = [
            pool.submit(compile_share, capability, share, processes) for share in range(processes)
        ]
        print(f"{sum(share.result() for share in shares)} kernels compiled for sm_{capability}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
