"""The benchmark of convolutions: it prints a row per layer and phase, and fails for an error."""

from __future__ import annotations

import pytest

from bench.ops import conv_bn_act as bench

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [bench.Layer(16, 24, 6), bench.Layer(4, 6, 7, 1, 2), bench.Layer(3, 8, 9, 7, 2, 5)]
    monkeypatch.setattr(bench, "NETWORKS", {"small": (2, layers)})
    monkeypatch.setattr(bench, "peak", lambda seconds: 100.0)


def test_rows(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--seconds", "0", "--networks", "small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "->" in line]
    assert len(rows) == 3 * len(bench.PHASES)
    assert sum("winograd" in row for row in rows) == 3
    assert sum("matrix_product" in row for row in rows) == 3
    assert rows[-1].startswith("7x7 3->8 9 /2 (5)")


def test_an_error_above_the_bound_is_a_failure(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "BOUND", 1e-9)
    assert bench.main(["--seconds", "0"]) == 1


def test_networks_have_their_layers() -> None:
    """Convolutions counted in the papers' tables; of DenseNet-121 there are some only."""

    def count(name: str) -> int:
        return sum(layer.count for layer in bench.NETWORKS[name][1])

    assert count("resnet18") == 20 and count("resnet50") == 53
    assert sum(n.count for n in bench.NETWORKS["densenet121"][1] if n.kernel == 3) == 58
