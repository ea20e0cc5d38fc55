"""The measurement of convolutions, without a GPU: what it times, checks, writes, and goes on with.

The fused kernels are the reference's phases here, on a CPU, at sizes of some kilobytes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import gpu_convolutions as gate
from bench.convolution_shapes import ConvolutionShape, densenet121, resnet50
from bench.gpu_convolutions import Case
from bench.models.stock_resnet import create_stock_model
from bench.timing import Deadline
from resops._dispatch import BackendError
from resops.ops import convolution, convolution_table
from resops.ops.convolution import FUSED, LIBRARY
from resops.reference import conv_bn_act as phases
from tests.ops.residual_block_cases import reference_phases_as_native
from tests.torchvision_ops import torchvision

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHAPES = [
    ConvolutionShape(8, 16, 1, 1, 6, prologue=True),
    ConvolutionShape(8, 8, 3, 2, 6, prologue=False),
]


def small_cases() -> list[Case]:
    return [Case(shape, phase, 4, "bf16") for shape in SHAPES for phase in gate.PHASES]


# ---- the shapes ---------------------------------------------------------------------------------


def traced(model: nn.Module) -> Counter[tuple[int, ...]]:
    """Every convolution that runs, without whether it has a prologue."""
    found: Counter[tuple[int, ...]] = Counter()

    def count(module: Any, args: tuple[Any, ...], output: Any) -> None:
        assert module.padding[0] == module.kernel_size[0] // 2 and module.groups == 1
        kernel, stride = module.kernel_size[0], module.stride[0]
        size = args[0].shape[2]
        found[(module.in_channels, module.out_channels, kernel, stride, size)] += 1

    for module in model.to("meta").modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model(torch.empty(2, 3, 224, 224, device="meta"))
    return found


def without_prologue(shapes: Counter[ConvolutionShape]) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for s, count in shapes.items():
        found[(s.channels_in, s.channels, s.kernel, s.stride, s.size)] += count
    return found


def test_shapes_are_those_of_the_networks() -> None:
    assert without_prologue(resnet50()) == traced(create_stock_model("resnet50", 10))
    assert without_prologue(densenet121()) == traced(torchvision().models.densenet121())


def test_shapes_of_the_papers_tables() -> None:
    assert sum(resnet50().values()) == 53 and sum(densenet121().values()) == 120
    # 2 * 4.09 and 2 * 2.83 GFLOP an image, without the classifier
    for network, gflops in ((resnet50(), 8.17), (densenet121(), 5.66)):
        total = sum(shape.flops(1) * count for shape, count in network.items())
        assert total * 1e-9 == pytest.approx(gflops, rel=0.01)
    # 36 of the 53 are 1x1; in a bottleneck the second and the third take a norm before them.
    ones = {s: n for s, n in resnet50().items() if s.kernel == 1}
    assert sum(ones.values()) == 36
    assert sum(n for s, n in resnet50().items() if s.prologue) == 32


# ---- the providers ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.label)
def test_library_and_fused_do_the_same(case: Case, native: None) -> None:
    at = gate.operands(case, CPU)
    with reference_phases_as_native():
        library, fused = (
            gate.block_phase(case, "native", wanted, at) for wanted in (LIBRARY, FUSED)
        )
        assert gate.wrong(case, at, fused) is None
    expected = gate.torch_phase(case, at)
    assert len(library) == len(fused) == len(expected)
    for number, (a, b, c) in enumerate(zip(library, fused, expected, strict=True)):
        if number == 0 and case.phase == "backward_data" and at.norm is not None:
            # The library leaves the activation's derivative to batch norm, in its second pass.
            a = torch.where(c == 0, 0, a)
        assert a.dtype == b.dtype
        for t in (a, b):  # two roundings to 8 bits, of sums that differ in order
            torch.testing.assert_close(t.float(), c.float(), rtol=0.02, atol=0.02)


def test_a_wrong_kernel_is_not_timed(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(SHAPES[0], "forward", 4, "bf16")

    def shifted(*args: Any) -> Any:
        y, mean, var = phases.conv_bn_act_forward(*args)
        return y, mean + 0.1, var

    with reference_phases_as_native():
        monkeypatch.setattr(convolution.NAMESPACES["native"], "conv_bn_act_forward", shifted)
        row = gate.measure(case, CPU, "native", 1.0, seconds=0.01)
    assert "output 1 is off" in row["error"] and not any(key.endswith("_ms") for key in row)


# ---- rows, and going on -------------------------------------------------------------------------


def run(cases: list[Case], output: Path, seconds: float = 60.0, commit: str = "abc") -> Any:
    deadline = Deadline(seconds)
    how: dict[str, Any] = {"compiled": False, "commit": commit, "dense_size": 64}
    with reference_phases_as_native():
        return gate.run(cases, CPU, "native", output, deadline, **how)


def test_rows_have_the_figures_and_are_not_measured_twice(native: None, tmp_path: Path) -> None:
    output, cases = tmp_path / "rows.jsonl", small_cases()[:3]
    assert run(cases, output) == ([], [])
    rows = gate.read_rows(output)
    assert [row["phase"] for row in rows] == list(gate.PHASES)
    for case, row in zip(cases, rows, strict=True):
        for provider in (LIBRARY, FUSED):
            flops = case.shape.flops(4)
            ms, rate = row[f"{provider}_ms"], row[f"{provider}_tflops"]
            assert rate == pytest.approx(flops / ms * 1e-9)
            assert row[f"{provider}_of_dense"] == pytest.approx(rate / row["dense_tflops"])
        assert "versions" in row["provenance"]
    before = output.read_text()
    assert run(cases, output) == ([], []) and output.read_text() == before
    run(cases[:1], output, commit="another")
    assert len(gate.read_rows(output)) == 4


def test_without_time_nothing_begins(tmp_path: Path) -> None:
    bad, missing = run(small_cases(), tmp_path / "rows.jsonl", seconds=0)
    assert bad == [] and missing == [case.label for case in small_cases()]


def test_a_backend_without_fused_convolutions_is_refused(
    native: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the library would be measured under two names."""
    monkeypatch.setattr("resops._dispatch.refusal", lambda *args: "there is none")
    with pytest.raises(BackendError, match="there is none"):
        gate.run(
            small_cases(),
            CPU,
            "native",
            tmp_path / "rows.jsonl",
            Deadline(60),
            compiled=False,
            commit=None,
            dense_size=64,
        )


def test_without_a_gpu_it_says_what_was_not_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["measure", "--network", "resnet50", "--batch", "256", "--phase", "backward_data"]
    output = tmp_path / "rows.jsonl"
    assert gate.main([*command, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "no GPU" in said and "backward_data 256x56x56 1x1 64, batch 256, bf16" in said
    assert "3x224x224" not in said  # an image has no gradient
    assert not output.exists()


# ---- the table ----------------------------------------------------------------------------------


def measured(case: Case, library: float, fused: float, device: str = "Some GPU") -> dict[str, Any]:
    times = {"library_ms": library, "fused_ms": fused}
    return {**case.row(device, "triton"), **times, "commit": "abc", "compiled": False}


def test_the_table_is_what_the_package_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster, slower = small_cases()[:2]
    rows = [measured(faster, 1.0, 5.0), measured(slower, 1.0, 2.0), measured(faster, 2.0, 1.0)]
    rows.append(measured(small_cases()[2], 2.0, 1.0, device="cpu"))
    source, output = tmp_path / "rows.jsonl", tmp_path / "convolutions.json"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gate.main(["table", str(source), "--output", str(output)]) == 0
    assert len(json.loads(output.read_text())["rows"]) == 2  # the last of each, of GPUs only
    monkeypatch.setattr(convolution_table, "_table", convolution_table.read(output))
    monkeypatch.setattr(convolution_table, "device_name", lambda kind, index: "Some GPU")
    for case, expected in ((faster, True), (slower, False)):
        at = gate.operands(case, CPU)
        found = convolution_table.fused_is_faster(
            case.phase, "triton", at.x, at.weight, case.geometry[:3], case.shape.prologue
        )
        assert found is expected


def test_no_table_of_what_was_not_measured_or_is_wrong() -> None:
    case = small_cases()[0]
    with pytest.raises(ValueError, match="none of the rows was measured on a GPU"):
        gate.table([measured(case, 2.0, 1.0, device="cpu")])
    with pytest.raises(ValueError, match="mend it first"):
        gate.table([{**measured(case, 2.0, 1.0), "error": "off by 1"}])


def test_what_the_package_ships_can_be_read() -> None:
    """An empty table where nothing was measured."""
    assert isinstance(convolution_table.read(convolution_table.PATH), dict)
