"""That the gate compiles the Triton kernels which its stages launch, under the keys by which Triton
will look for them; for a GPU that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench import compile_triton, gpu_convolutions, gpu_gate
from bench.convolution_shapes import ConvolutionShape
from bench.gpu_convolutions import PHASES, Case
from resops import _dispatch
from resops.ops import convolution
from tests.interpreter.ahead_of_time import on_a_gpu, recorded_launches, source_of
from tests.interpreter.kernels import import_kernels

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET, PROCESSORS = GPUTarget("cuda", 90, 32), 132
Key = tuple[str, str, str]


@pytest.fixture(autouse=True)
def _built_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESOPS_TILES", "off")
    import_kernels("tiles")._users_table.cache_clear()


class NoGpu:
    """What Triton asks the driver before it compiles a kernel."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def keys_of_real_launches(monkeypatch: pytest.MonkeyPatch) -> set[Key]:
    """Of the same calls through Triton's own launcher, up to where it would compile."""
    keys: set[Key] = set()
    run = JITFunction.run

    def note(
        self: Any, key: str, signature: Any, device: int, constants: Any, options: Any, *rest: Any
    ) -> None:
        source = self.ASTSource(self, signature, constants, rest[0])
        keys.add((source.name, source.hash(), options.hash()))

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", note)
    monkeypatch.setattr(JITFunction, "run", warm_up)
    monkeypatch.setattr(driver, "_active", NoGpu())
    with on_a_gpu(90, PROCESSORS):
        for call in compile_triton.calls():
            call()
    return keys


def test_the_keys_are_those_of_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every kernel of the ops that the gate runs with Triton is among them, but for that of a
    norm with constant statistics, of which it takes no gradient."""
    backend = make_backend(TARGET)
    launches = compile_triton.launches(90, PROCESSORS)
    keys = {
        (launch.name, source_of(launch).hash(), backend.parse_options(dict(launch.options)).hash())
        for launch in launches
    }
    assert len(launches) == len(keys)
    kernels = {
        name
        for op in ("batch_norm", "conv_bn_act", "dense_block")
        for name in vars(import_kernels(op))
        if name.endswith("_kernel")
    }
    assert {launch.name for launch in launches} == kernels - {"batch_norm_frozen_kernel"}
    assert keys == keys_of_real_launches(monkeypatch)


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_timed_convolution_launches_nothing_else(
    phase: str, prologue: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bench.gpu_convolutions calls, with library and fused convolutions."""
    launchers = [import_kernels(op) for op in ("batch_norm", "conv_bn_act")]
    ops = {name: getattr(op, name) for op in launchers for name in dir(op) if "kernel" not in name}
    monkeypatch.setitem(convolution.NAMESPACES, "triton", type("Ops", (), ops))
    monkeypatch.setattr(_dispatch, "refusal", lambda *_: None)
    case = Case(ConvolutionShape(16, 32, 3, 1, 8, prologue), phase, 2, "bf16")
    at = gpu_convolutions.operands(case, torch.device("cpu"))
    with on_a_gpu(90), recorded_launches() as compiled:
        compile_triton.convolution(case)
    with on_a_gpu(90), recorded_launches() as launched:
        for wanted in (convolution.LIBRARY, convolution.FUSED):
            gpu_convolutions.block_phase(case, "triton", wanted, at)
    assert launched and set(launched) == set(compiled)


def test_a_share_is_compiled_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    count = len(compile_triton.launches(90, PROCESSORS))
    assert compile_triton.compile_share(90, PROCESSORS, count - 1, count) == 1
    assert len(list(tmp_path.glob("*/*.cubin"))) == 1


def test_the_gate_compiles_before_it_measures() -> None:
    """In the first stage of a job that launches Triton's kernels, or the first after the build."""
    gpu = gpu_gate.Gpu("Some GPU", "9.0", "1.2")
    for job in ("prove", "models", "convolutions", "convolutions-compiled"):
        stages = [s for s in gpu_gate.JOBS[job] if s.name != "build"]
        assert stages[0].commands(gpu)[0][1:] == ["-m", "bench.compile_triton", "90"]
