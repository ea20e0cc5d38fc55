"""That the benchmark checks what it times, counts what is saved, and says why where it cannot."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench import digits, environment, images, jobs, report, roofline
from bench.ops import batch_norm
from bench.session import EAGER, RESOPS, Progress, Session, saved_bytes
from bench.shapes import BatchNormShape
from bench.timing import Deadline
from bench.training import Curve
from tests.ops.batch_norm_oracle import BatchNormCase, Outputs, run_functional

SHAPE = BatchNormShape(16, 5, 5, True, True)
CPU = torch.device("cpu")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(
        report=report.Report(tmp_path / "x.json", "ops", {}, {}),
        device=CPU,
        threads=(1, 2),
        deadline=Deadline(1e3),
        progress=Progress(1, shown=False),
        seconds=0.0,
    )


def test_saved_bytes_counts_storages_once_and_leaves_out_what_is_there() -> None:
    x = torch.randn(1000, requires_grad=True)
    weight = torch.randn(1000, requires_grad=True)

    def forward() -> Tensor:
        y = (x * weight).relu()  # saves x, weight and the result of relu
        return y * y[:1]  # saves it again, and a view of it

    assert saved_bytes(forward, iter([weight])) == 2 * 4000


def test_the_fused_op_saves_its_input_and_one_bit_per_element(native: None) -> None:
    inputs = batch_norm.Inputs.random(SHAPE, 4, torch.float32, CPU)
    there = [inputs.weight, inputs.bias, inputs.running_mean, inputs.running_var]
    elements, channels = inputs.x.numel(), inputs.x.size(1)
    ours, eager = (
        saved_bytes(batch_norm.FORWARDS[name](inputs), iter(there)) for name in (RESOPS, EAGER)
    )
    assert eager >= 2 * 4 * elements
    # mean and invstd, and nothing else
    assert ours == 4 * elements + -(-elements // 8) + 2 * 4 * channels


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_op_is_checked_then_timed(session: Session, dtype: str) -> None:
    batch_norm.run(session, 4, [(SHAPE, dtype)])
    assert session.failed == []
    timed = [row for row in session.report.rows if row["metric"] == "time"]
    assert [(row["direction"], row["threads"]) for row in timed] == [
        (direction, threads) for direction in ("forward", "backward") for threads in (1, 2)
    ]
    assert all(row["checked"] and row["ratio"]["rounds"] >= 5 for row in timed)


@pytest.mark.parametrize("what", ["y", "grad_x", "one channel"])
def test_a_wrong_op_is_not_timed(
    session: Session, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:

    def wrong(case: BatchNormCase) -> Outputs:
        out = run_functional(case)
        y, grad_x = out["y"], out["grad_x"]
        assert y is not None and grad_x is not None
        if what == "y":
            y[-1].zero_()
        elif what == "grad_x":
            grad_x.mul_(1.001)
        else:
            y[:, 7].zero_()  # a channel for which no float64 value is computed
        return out

    monkeypatch.setattr(batch_norm, "run_functional", wrong)
    batch_norm.run(session, 4, [(SHAPE, "fp32")])
    assert session.failed == [f"{SHAPE.label} fp32"]
    assert [row["metric"] for row in session.report.rows] == ["error"]


def test_what_comes_after_the_deadline_is_named(session: Session) -> None:
    session.deadline = Deadline(0.0)
    batch_norm.run(session, 4, [(SHAPE, "fp32")])
    assert session.report.rows == [
        {"suite": "job", "case": f"{SHAPE.label} fp32", "metric": "skipped"}
    ]


def test_images_are_real_and_the_same_every_time() -> None:
    a, labels = images.real_images(3, size=32)
    b, _ = images.real_images(3, size=32)
    assert a.shape == (3, 3, 32, 32) and a.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(a, b) and labels.tolist() == [0, 1, 2]
    assert all(path.is_file() for path in images.image_files())
    assert 0.1 < float(a.std()) < 3 and not torch.equal(a[0], a[1])


def test_noise_has_the_shape_of_images() -> None:
    a, labels = images.noise_images(3, size=32)
    assert a.shape == (3, 3, 32, 32) and a.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(a, images.noise_images(3, size=32)[0]) and labels.tolist() == [0, 1, 2]


def test_no_images_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FILES", {"a_package_that_is_not_there": ("x", ("y",))})
    with pytest.raises(images.NoImages, match="pip install"):
        images.image_files()


@pytest.mark.parametrize("compiled", [True, False])
def test_bandwidth_is_found_with_and_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(roofline, "native_passes", lambda: None)
    for threads in (1, 2):
        roof = roofline.Roofline(CPU, threads, nbytes=2**20, budget_s=0.0)
        assert set(roof.measured) == set(roofline.KINDS)
        assert all(rate.gb_per_s > 0 for rate in roof.measured.values())
        x, z = (torch.randn(2, 48, 64, 128, dtype=torch.bfloat16) for _ in range(2))
        for passes in roofline.PASSES:
            roof.bare_passes(*passes, x, z)()
        roof.close()


def test_the_native_passes_move_every_byte() -> None:
    library = roofline.native_passes()
    if library is None:
        pytest.skip("no C compiler")
    b = roofline.Buffers.of(64 * roofline.BLOCK, CPU)
    b.x.copy_(torch.arange(b.x.numel()))
    for ahead in roofline.PREFETCH:
        b.y.zero_()
        library.pass_copy(b.y.data_ptr(), b.x.data_ptr(), b.nbytes, ahead)
        assert torch.equal(b.y, b.x)
        library.pass_triad(b.y.data_ptr(), b.x.data_ptr(), b.z.data_ptr(), b.nbytes, ahead)
        whole = b.x.view(torch.int32) + b.z.view(torch.int32)
        assert torch.equal(b.y.view(torch.int32), whole)


def test_the_memory_of_a_tensor() -> None:
    t = torch.arange(2 * 300 * 5, dtype=torch.int32).view(torch.float32).reshape(2, 300, 5)
    whole = roofline.memory_of(t.permute(0, 2, 1)).view(torch.int32)
    assert torch.equal(whole, torch.arange(3000 * 4 // roofline.BLOCK * roofline.BLOCK // 4))
    with pytest.raises(ValueError, match="behind a cache line"):
        roofline.memory_of(t[:, 1:])


def test_parts_cover_everything_once() -> None:
    for count in (1, 2, 3, 7):
        parts = list(roofline._parts(10 * roofline.BLOCK, count))
        assert parts[0][0] == 0 and parts[-1][1] == 10 * roofline.BLOCK
        assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))


def test_two_runs_of_the_same_curve_agree_and_a_worse_one_does_not() -> None:
    good = Curve([1.0] * 8, [1.0, 0.1], [1.0, 0.1], [0.9, 0.98])
    bad = Curve([1.0] * 8, [1.0, 0.3], [1.0, 0.3], [0.9, 0.9])
    assert all(found <= allowed for found, allowed in digits.agreement([good], [good]).values())
    broken = [
        k for k, (found, allowed) in digits.agreement([good], [bad]).items() if found > allowed
    ]
    assert broken == [
        "training loss, worst epoch",
        "test loss",
        "test accuracy",
        "test error, both have learnt",
    ]


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["--threads", "0"], ["--threads", "x"], ["--dtypes", "fp8"], ["ops", "f.json"]],
)
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.parse(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("device", ["cuda", "tpu", "meta"])
def test_a_device_that_is_not_there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(jobs.BadOptions, match=device):
        jobs.Plan.of(command.parse(["--device", device]))


def options(folder: Path) -> argparse.Namespace:
    return command.parse(["ops", "--quick", "--threads", "1", "--output", str(folder)])


def test_an_interrupted_job_says_so_and_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(session: Session) -> None:
        batch_norm.run(session, 2, [(SHAPE, "fp32")])
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "parts_of", lambda kind, plan: [(1, part)])
    assert jobs.run(options(tmp_path)) == 130
    assert "Interrupted" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    results = report.load(path)
    assert not results["complete"] and len(results["rows"]) == 4


def test_a_failed_check_makes_the_job_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(session: Session) -> None:
        session.check("a thing", False, None, "wrong by a mile", "things")

    monkeypatch.setattr(jobs, "parts_of", lambda kind, plan: [(1, part)])
    assert jobs.run(options(tmp_path)) == 1
    assert "CHECK FAILED: a thing: wrong by a mile" in capsys.readouterr().out


def test_an_unwritable_folder_is_one_sentence_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(environment, "restart_with_allocator_settings", lambda a: None)
    assert command.main(["ops", "--quick", "--output", str(tmp_path / "file" / "sub")]) == 1
    out = capsys.readouterr()
    assert out.out.count("\n") == 1 and "cannot write its results" in out.out
    assert "Traceback" not in out.out + out.err


def test_show_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["show", "--output", str(tmp_path)]) == 1
    assert "make bench" in capsys.readouterr().out
