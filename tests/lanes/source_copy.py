"""A copy of the source tree in build/, in which a lane builds and tests something else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "resops", "triton_kernels", "tests", "bench")
FILES = ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")
# What a build and a run leave in the copy, and what the original must not hand over.
MADE_THERE = (".so", ".pyc")


def renew(tree: Path, changed: Mapping[str, str]) -> None:
    """Make ``tree`` the source tree, with other text in the files of ``changed``.

    A file that is the same already keeps its date, so that the next build is a short one.
    """
    wanted: set[Path] = {Path(name) for name in changed}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in MADE_THERE:
                wanted.add(path.relative_to(ROOT))
    wanted |= {Path(name) for name in FILES if (ROOT / name).is_file()}
    for relative in wanted:
        text = changed.get(relative.as_posix())
        content = (ROOT / relative).read_bytes() if text is None else text.encode()
        copy = tree / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.is_file() or copy.read_bytes() != content:
            copy.write_bytes(content)
    # Its place as installed. Without it an editable install of the original would lend its own.
    place = tree / "resops" / "triton_kernels"
    if not place.is_symlink():
        place.symlink_to(Path("..") / "triton_kernels")
    for folder in FOLDERS:
        for path in (tree / folder).rglob("*"):
            gone = path.is_file() and path.relative_to(tree) not in wanted
            if gone and path.suffix not in MADE_THERE:
                path.unlink()


def build(tree: Path, **environment: str) -> None:
    """Compile the extension inside ``tree``.

    Raises:
        SystemExit: it does not compile; the compiler has said why.
    """
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    settings = {"RESOPS_CUDA": "0", "RESOPS_NATIVE": "1", **environment}
    done = subprocess.run(command, cwd=tree, env={**os.environ, **settings})
    if done.returncode != 0:
        raise SystemExit(f"the copy in {tree} does not build")
