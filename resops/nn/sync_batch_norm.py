"""Batch norm with an activation and an optional residual, over the batches of several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batch_norm import BatchNormAct


def synchronised(process_group: Any) -> Any:
    """The group over which statistics are taken; None where there is one process only.

    Args:
        process_group: None for all processes.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = distributed.group.WORLD if process_group is None else process_group
    return None if distributed.get_world_size(group) == 1 else group


class SyncBatchNormAct(BatchNormAct):
    """:class:`BatchNormAct2d` whose statistics in training are those of all processes together.

    As ``torch.nn.SyncBatchNorm``, with residual and activation, for CPU tensors (gloo) and CUDA
    tensors (NCCL), and for batches of different sizes, among them empty ones. With p processes the
    results are those of one process on the concatenated batch. In evaluation, and without
    ``torch.distributed.init_process_group``, it is BatchNormAct. One collective in each pass: all
    processes of the group have to make the same calls.

    Args:
        process_group: the processes; None for all of them.
        others: see :class:`BatchNormAct2d`.

    Shape: input, residual and output (N, C, *spatial).
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: Callable[..., nn.Module] | str | None = nn.ReLU,
        act_kwargs: Mapping[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            apply_act,
            act_layer,
            act_kwargs,
            inplace,
            drop_layer,
            device,
            dtype,
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _group(self) -> Any:
        return synchronised(self.process_group)
