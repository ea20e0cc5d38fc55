"""Where fused blocks were measured to be slower than PyTorch's own layers.

Small images, whose calls take as long as their checks. How large images are ``fuse`` cannot know,
so the block decides in each call. With fewer pixels than these a dense block, a layer of one or a
transition was slower fused (``python -m bench.models.dense_blocks``: fp32, one and two threads of
an Intel Xeon with AVX-512).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _dispatch
from .report import Reason


class LeastPixels(NamedTuple):
    """N * H * W from which on a fused block is faster."""

    with_gradients: int
    without: int
    by_threads: int = 1  # times this with more than one thread: the op has more parts to hand out


DENSE_BLOCK = LeastPixels(500, 1500, by_threads=3)
DENSE_LAYER = LeastPixels(1500, 9000)
TRANSITION = LeastPixels(4000, 9000)


def slower(least: LeastPixels, x: Tensor) -> str:
    """Why a call on ``x``, (N, C, H, W), goes to PyTorch's own layers; empty if it does not.

    That is on a CPU, with the backend "auto": a backend that was asked for by name is taken. Under
    torch.compile sizes are not looked at.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or _dispatch.get_backend() != "auto":
        return ""
    if x.dim() < 2:  # PyTorch's error
        return ""
    wanted = least.with_gradients if torch.is_grad_enabled() else least.without
    if torch.get_num_threads() > 1:
        wanted *= least.by_threads
    pixels = x.numel() // max(x.size(1), 1)
    if pixels >= wanted:
        return ""
    return f"{Reason.MEASURED_SLOWER.value}: {pixels} pixels, fewer than {wanted}"
