"""The tables of tiles: what is looked up, what a user's file may hold, and what becomes of it."""

from __future__ import annotations

import json
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from resops import tune
from tests.interpreter.kernels import import_kernels

tiles = import_kernels("tiles")
CPU = torch.device("cpu")
SHAPE = tiles.ShapeClass.of("forward", True, False, 48)
TILE = tiles.Tile(64, 32, 16, 4, 2)
KEY = (0, 16, str(SHAPE))  # architecture 0: no GPU


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    place = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv("RESOPS_TILES", str(place))
    tiles._users_table.cache_clear()
    yield place
    tiles._users_table.cache_clear()


def chosen() -> Any:
    tiles._users_table.cache_clear()
    return tiles.choose(CPU, torch.bfloat16, "ieee", SHAPE)


def test_class_of_a_shape() -> None:
    assert str(SHAPE) == "forward 1x1 plain 64"
    for columns, width in ((1, 16), (16, 16), (17, 32), (128, 128), (2048, 128)):
        assert tiles.ShapeClass.of("forward", False, True, columns).columns == width
    assert str(SHAPE) in tiles.CLASSES and len(tiles.CLASSES) == 48


def test_built_in_table() -> None:
    """Its keys are those that are looked up, and its tiles those that a file may hold."""
    for (capability, bits, name), tile in tiles.TABLE.items():
        assert capability in (80, 90, 100) and bits in (16, 32) and name in tiles.CLASSES
        assert tile.is_allowed


def test_a_written_table_is_used(path: Path) -> None:
    assert chosen() == tiles.heuristic(torch.bfloat16, SHAPE)
    tiles.write_table(path, {KEY: TILE})
    assert chosen() == TILE and tiles.read_table(path) == {KEY: TILE}
    fp32 = torch.float32
    assert tiles.choose(CPU, fp32, "tf32", SHAPE) == tiles.heuristic(fp32, SHAPE)
    assert tiles.choose(CPU, fp32, "ieee", SHAPE) == tiles.without_tensor_cores(SHAPE)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    tiles.write_table(path, {})
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays
    with tiles.forced(TILE):
        assert chosen() == TILE


def test_a_failed_write_leaves_the_old_table(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles.write_table(path, {KEY: TILE})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tiles.json, "dump", fail)
    with pytest.raises(OSError, match="disk full"):
        tiles.write_table(path, {})
    assert chosen() == TILE and len(list(path.parent.iterdir())) == 1


def written(**changes: Any) -> str:
    entry = {"architecture": 0, "bits": 16, "class": str(SHAPE), "tile": [64, 32, 16, 4, 2]}
    entry |= changes.pop("entry", {})
    content = {"format": tiles._FORMAT, "triton": tiles.triton.__version__, "tiles": [entry]}
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is not JSON"),
        (written()[:-20], "it is not JSON"),
        ("\x80", "it is not JSON"),
        pytest.param("[" * 100_000, "it is not JSON", id="brackets without end"),
        ("[1, 2]", "it is not in the format"),
        (written(format="other 1"), "it is not in the format"),
        (written(triton="0.1"), "it was written with Triton 0.1"),
        (written(tiles={}), "it has no list of tiles"),
        (written(tiles=[None]), "it has an entry that is not allowed"),
        (written(entry={"bits": 8}), "it has an entry that is not allowed"),
        (written(entry={"class": "forward"}), "it has an entry that is not allowed"),
        (written(entry={"tile": [64, 32, 16, 4]}), "it has an entry that is not allowed"),
        (written(entry={"tile": [64, 32, 17, 4, 2]}), "it has an entry that is not allowed"),
        (written(entry={"tile": [256, 256, 16, 4, 2]}), "it has an entry that is not allowed"),
        (written(entry={"tile": [64, 32, 16, 4, 99]}), "it has an entry that is not allowed"),
        (written(entry={"tile": ["64", 32, 16, 4, 2]}), "it has an entry that is not allowed"),
    ],
)
def test_a_corrupt_or_foreign_table_is_ignored(path: Path, text: str, reason: str) -> None:
    """One clear message, once."""
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match=f"the table of tiles .* is ignored: {reason}") as caught:
        assert chosen() == tiles.heuristic(torch.bfloat16, SHAPE)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.choose(CPU, torch.bfloat16, "ieee", SHAPE) == tiles.heuristic(
            torch.bfloat16, SHAPE
        )


def test_the_well_formed_text_is_accepted(path: Path) -> None:
    """What the cases above change one thing of."""
    path.parent.mkdir()
    path.write_text(written())
    assert chosen() == TILE


def test_where_the_table_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESOPS_TILES", "off")
    assert tiles.table_path() is None
    monkeypatch.delenv("RESOPS_TILES")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tiles.table_path() == Path("/somewhere/resops/tiles.json")


def test_without_a_home_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RESOPS_TILES", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert tiles.table_path() is None and chosen() == tiles.heuristic(torch.bfloat16, SHAPE)


def test_a_table_that_cannot_be_read_is_ignored(path: Path) -> None:
    path.mkdir(parents=True)  # a folder in its place
    with pytest.warns(UserWarning, match="is ignored: "):
        assert chosen() == tiles.heuristic(torch.bfloat16, SHAPE)


def test_tuner_without_a_gpu(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main([]) == 1
    assert capsys.readouterr().out == "nothing to tune: torch finds no CUDA device\n"
    assert not path.exists()
    with pytest.raises(SystemExit):
        tune.main(["256,56"])
    assert "expected channels,size,filters[,kernel[,stride]], but got '256,56'" in (
        capsys.readouterr().err
    )


def test_tuner_covers_the_classes_that_matter() -> None:
    """Its own shapes have every class of 64 columns and more."""
    found = {
        tune.class_of(shape, phase, prologue)
        for shape in tune.SHAPES
        for phase in tiles.PASSES
        for prologue in (False, True)
    }
    assert {name for name in tiles.CLASSES if name.endswith((" 64", " 128"))} <= found
    for dtype in tune.DTYPES.values():
        assert len(list(tune.candidates(dtype))) > 8
        assert all(tile.is_allowed for tile in tune.candidates(dtype))
