"""The benchmark of 1x1 convolutions: every algorithm is measured, and the setting is put back."""

from __future__ import annotations

import pytest

from bench.ops import pointwise
from bench.ops.conv_bn_act import Layer

pytestmark = pytest.mark.usefixtures("native")


def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from resops import _C

    monkeypatch.setattr(pointwise, "shapes", lambda: [Layer(4, 6, 7, 1)])
    assert pointwise.main(["--seconds", "0", "--batch", "1"]) == 0
    assert _C.conv_algorithm() == "auto"
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "->" in line]
    # name, size, count, phase; the times of onednn and matrix_product, or, of the gradient of the
    # weight, of the two products, and of resops' kernel; the choice and what it loses
    assert [row[4] for row in rows] == ["forward", "backward_data", "backward_weight"]
    for row in rows:
        times, chosen, lost = [float(t) for t in row[5:8]], row[8], float(row[9])
        assert len(row) == 11 and min(times) >= 0 and lost >= 0 and chosen == "matrix_product"


def test_all_shapes_are_pointwise() -> None:
    assert len(pointwise.shapes()) == 13
