"""The stock twin is the same network without an op of resops, and a family is checked and timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import resops
from bench import jobs, report
from bench.__main__ import parse
from bench.models import families
from bench.models.stock_twin import outputs, stock_twin
from bench.session import EAGER, Progress, Session
from bench.timing import Deadline
from resops.models import create_model
from tests.dispatch import counted_calls, native_calls

pytestmark = pytest.mark.usefixtures("native", "one_thread")

SMALL: dict[str, dict[str, Any]] = {
    "resnet20": {"shortcut": "B"},
    "preact_resnet110": {},
    "densenet_bc_40": {},
    "highway_conv": {},
    "unet": {"widths": (4, 8)},
    "vnet": {"widths": (4, 8), "depths": (1, 1)},
    "hourglass": {"num_stacks": 1, "width": 8, "depth": 1},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_stock_twin_computes_the_same_without_resops(name: str) -> None:
    """In float64, in training and in evaluation: to the rounding of other orders of sums."""
    torch.manual_seed(0)
    model = create_model(name, **SMALL[name]).double()
    twin = stock_twin(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert not any(isinstance(m, resops.nn.BatchNormAct2d) for m in twin.modules())
    size = (2, 1, 8, 8, 8) if name == "vnet" else (2, *families.NETWORKS[name].size[:1], 16, 16)
    x = torch.randn(size, dtype=torch.float64)
    for training in (True, False):
        y = outputs(model.train(training)(x))
        with families.provider(EAGER), counted_calls() as calls:
            expected = outputs(twin.train(training)(x))
        assert not native_calls(calls), calls
        for a, b in zip(y, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_layers_without_a_stock_layer_are_named() -> None:
    with pytest.raises(TypeError, match="GroupNormAct has no stock layer"):
        stock_twin(create_model("unet", widths=(4, 8), norm_layer="group"))
    with pytest.raises(TypeError, match="is no plain sum"):
        stock_twin(create_model("preact_resnet110", residual="rescale"))


def test_a_family_is_checked_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(
        report=report.Report(tmp_path / "x.json", "families", {}, {}),
        device=torch.device("cpu"),
        threads=(1,),
        deadline=Deadline(1e3),
        progress=Progress(1, shown=False),
        model_seconds=0.0,
        dtypes=("fp32",),
    )
    network = families.Network((3, 16, 16), {"widths": (4, 8)})
    monkeypatch.setitem(families.NETWORKS, "unet", network)
    families.run(session, ["unet"], [2])
    rows = list(session.report.rows)
    assert [row["metric"] for row in rows] == ["error", "error", "saved", "time", "time"]
    assert {row.get("direction") for row in rows[3:]} == {"training", "inference"}
    assert rows[3]["case"] == "unet 3x16x16" and rows[3]["checked"]
    # A network that computes something else is not timed.
    with torch.no_grad():
        create = families.create_pair("unet", session.device)
        next(create["resops"].parameters()).mul_(1.001)
    monkeypatch.setattr(families, "create_pair", lambda *_: create)
    families.run(session, ["unet"], [2])
    assert session.failed and len(session.report.rows) == 7


def test_networks_are_chosen_by_name() -> None:
    options = parse(["families", "--models", "unet,vnet"])
    assert len(jobs.parts_of("families", jobs.Plan.of(options))) == 2
    everything = jobs.parts_of("families", jobs.Plan.of(parse(["families"])))
    assert len(everything) == len(families.NETWORKS)
    with pytest.raises(jobs.BadOptions, match="but got alexnot"):
        jobs.parts_of("families", jobs.Plan.of(parse(["families", "--models", "alexnot"])))
