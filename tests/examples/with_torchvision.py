"""``python -m tests.examples.with_torchvision SCRIPT ...``: runs a script, where torchvision was
built for another torch than the one here, too (tests/torchvision_ops.py)."""

from __future__ import annotations

import runpy
import sys

from tests.torchvision_ops import torchvision

if __name__ == "__main__":
    torchvision()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
