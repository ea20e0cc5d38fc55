"""For nnU-Net: a trainer whose networks are fused.

nnU-Net finds trainers by name, in its own folders and in those that the variable
``nnUNet_extTrainer`` lists. A file of one line in such a folder makes this one known:

>>> from resops.integrations.nnunet import nnUNetTrainerResops

and ``nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerResops`` takes it. nnU-Net 2.8.
"""

from __future__ import annotations

from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from ..fusion import fuse

__all__ = ["nnUNetTrainerResops"]


class nnUNetTrainerResops(nnUNetTrainer):
    """nnU-Net's trainer with :func:`resops.fuse` on the network that its plans describe.

    Training and inference build the network here, before they compile or wrap it. Checkpoints are
    those of nnUNetTrainer, in both directions.
    """

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """See nnUNetTrainer."""
        network: nn.Module = nnUNetTrainer.build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        return fuse(network)
