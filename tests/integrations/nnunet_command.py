"""nnU-Net's commands, beside a torchvision that was built for another torch.

python -m tests.integrations.nnunet_command {plan_and_preprocess,train} ARGUMENTS
"""

from __future__ import annotations

import sys

from tests.torchvision_ops import timm


def main() -> None:
    timm()  # which nnU-Net's networks import
    from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints
    from nnunetv2.run import run_training

    commands = {
        "plan_and_preprocess": plan_and_preprocess_entrypoints.plan_and_preprocess_entry,
        "train": run_training.run_training_entry,
    }
    commands[sys.argv.pop(1)]()


if __name__ == "__main__":  # nnU-Net's worker processes import this module
    main()
