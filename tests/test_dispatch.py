"""Which backend a call gets where CUDA was built and where not, without a GPU; and for which
architectures a build is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resops import _dispatch, _native

ROOT = Path(__file__).resolve().parents[1]


def tensor_on(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """As much of a tensor as the choice looks at."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, is_cpu=device == "cpu")


def built(architectures: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"cuda architectures": architectures, "cuda": "switched off (RESOPS_CUDA=0)"}
    monkeypatch.setattr(_native, "module", SimpleNamespace(build_info=lambda: facts))
    monkeypatch.setattr(_native, "error", None)
    devices = {op: _dispatch._native_devices() for op in _dispatch._KERNELS["native"]}
    monkeypatch.setitem(_dispatch._KERNELS, "native", devices)


@pytest.mark.parametrize("op", ["batch_norm", "residual_add"])
def test_without_cuda_the_refusal_says_what_to_do(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built("none", monkeypatch)
    assert _dispatch.refusal("native", op, tensor_on("cpu", torch.float64)) is None
    assert _dispatch.choose(op, tensor_on("cuda")) == "reference"
    with (
        _dispatch.backend("native"),
        pytest.raises(_dispatch.BackendError, match="no kernel for cuda tensors") as raised,
    ):
        _dispatch.choose(op, tensor_on("cuda"))
    assert "switched off (RESOPS_CUDA=0)" in str(raised.value)
    assert "RESOPS_CUDA=1 pip install --no-build-isolation ." in str(raised.value)
    reason = _dispatch.refusal("native", op, tensor_on("meta"))
    assert reason is not None and "RESOPS_CUDA" not in reason


@pytest.mark.parametrize("op", ["batch_norm", "residual_add"])
def test_with_cuda_the_native_kernels_take_what_they_can(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built("80-real 90a-real 90-virtual", monkeypatch)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert _dispatch.refusal("native", op, tensor_on("cuda", dtype)) is None
        with _dispatch.backend("native"):
            assert _dispatch.choose(op, tensor_on("cuda", dtype)) == "native"
        # Not by themselves, as long as they have not been measured.
        assert _dispatch.choose(op, tensor_on("cuda", dtype)) == "reference"
    reason = _dispatch.refusal("native", op, tensor_on("cuda", torch.float64))
    assert reason == f"the native {op} does not take torch.float64 on cuda"


def in_setup(expression: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The value of an expression over setup.py's functions, as JSON in the last line of the output.

    Nothing is built, and programs are found nowhere unless PATH is among the variables.
    """
    program = (
        "import json, sys; sys.argv = ['setup.py', '--quiet', '--name']; import setup; "
        f"print(json.dumps({expression}))"
    )
    defaults = {"TORCH_CUDA_ARCH_LIST": "", "PATH": "/nonexistent", "RESOPS_NATIVE": "0"}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "RESOPS_CUDA": "", "FORCE_CUDA": "", **defaults, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ("", ["80-real", "90a-real", "90-virtual"]),
        ("9.0a", ["90a-real"]),
        ("8.0 9.0+PTX", ["80-real", "90-real", "90-virtual"]),
        ("8.6;12.0a", ["86-real", "120a-real"]),
    ],
)
def test_architectures_of_a_build(listed: str, found: list[str]) -> None:
    """On a machine without a GPU."""
    done = in_setup("setup.cuda_architectures()", TORCH_CUDA_ARCH_LIST=listed)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == found


def test_architectures_are_those_of_the_gpus(tmp_path: Path) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    driver.chmod(0o755)
    done = in_setup("setup.cuda_architectures()", PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["86-real", "90-real"]


@pytest.mark.parametrize(
    ("wanted", "note"), [("", "no nvcc found"), ("0", "switched off (RESOPS_CUDA=0)"), ("1", None)]
)
def test_a_build_without_nvcc_says_so(wanted: str, note: str | None) -> None:
    """And stops only where CUDA was asked for."""
    options = "setattr(setup, 'find_nvcc', lambda: None) or setup.cuda_options()"
    done = in_setup(options, RESOPS_CUDA=wanted)
    if note is None:
        assert done.returncode != 0 and "RESOPS_CUDA=1, but there is no nvcc" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        definitions, said = json.loads(done.stdout.splitlines()[-1])
        assert said == note and "-DRESOPS_NVCC=" in definitions
