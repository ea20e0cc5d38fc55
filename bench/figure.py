"""The picture of a results file: ratios of models and ops, share of the limit, digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.report import Row, write_atomically
from bench.table import where

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7")


class NoFigure(RuntimeError):
    """matplotlib is missing, or there is nothing to draw; the message says so."""


def _main_threads(rows: Sequence[Row]) -> int | None:
    counts = [row["threads"] for row in rows if row["metric"] == "time"]
    return counts[0] if counts else None


def _timed(rows: Sequence[Row], suite: str) -> list[Row]:
    threads = _main_threads(rows)
    return [
        row
        for row in rows
        if row["suite"] == suite and row["metric"] == "time" and row["threads"] == threads
    ]


def _spread(values: Sequence[dict[str, float]]) -> list[list[float]]:
    """Error bars from the median to the 20th and 80th percentile."""
    low = [max(v["median"] - v["p20"], 0.0) for v in values]
    return [low, [max(v["p80"] - v["median"], 0.0) for v in values]]


def _bars(axes: Any, names: list[str], values: list[dict[str, float]], label: str) -> None:
    places = range(len(names))
    axes.barh(
        places,
        [v["median"] for v in values],
        xerr=_spread(values),
        color=[COLOURS[0]] * len(names),
        error_kw={"ecolor": "0.35", "capsize": 2, "linewidth": 1},
    )
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    for place, value in zip(places, values, strict=True):
        axes.text(0.02, place, f" {value['median']:.2f}", va="center", color="white", fontsize=8)


def _draw_models(axes: Any, rows: list[Row]) -> None:
    names = [f"{row['case']} {row['direction']}, {row['dtype']}" for row in rows]
    _bars(axes, names, [row["ratio"] for row in rows], "eager time / resops time")
    axes.set_title(f"Models, batch {rows[0]['batch']}", fontsize=10)


def _draw_ops(axes: Any, rows: list[Row]) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    series = list(dict.fromkeys((row["dtype"], row["direction"]) for row in rows))
    for index, (dtype, direction) in enumerate(series):
        mine = [row for row in rows if (row["dtype"], row["direction"]) == (dtype, direction)]
        axes.errorbar(
            [row["ratio"]["median"] for row in mine],
            [cases.index(row["case"]) + 0.16 * (index - (len(series) - 1) / 2) for row in mine],
            xerr=_spread([row["ratio"] for row in mine]),
            fmt="os^D"[index % 4],
            markersize=4,
            color=COLOURS[index % len(COLOURS)],
            elinewidth=1,
            label=f"{dtype} {direction}",
        )
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(range(len(cases)), cases, fontsize=7)
    axes.invert_yaxis()
    # Error bars may leave the picture: a single disturbed sample must not set the scale.
    axes.set_xlim(0, 1.15 * max(1.0, *(row["ratio"]["median"] for row in rows)))
    axes.set_xlabel("eager time / resops time")
    axes.legend(fontsize=7)
    batches = ", ".join(str(b) for b in sorted({row["batch"] for row in rows}))
    axes.set_title(f"Batch norm, forward and backward, batch {batches}", fontsize=10)


def _draw_limits(axes: Any, rows: list[Row]) -> None:
    names = [f"{row['case']} {row['direction']}, {row['dtype']}" for row in rows]
    _bars(axes, names, [row["limit_share"] for row in rows], "bare passes' time / resops time")
    axes.set_title("Share of the bandwidth limit, tensors beyond the caches", fontsize=10)


def _draw_digits(axes: Any, row: Row) -> None:
    for index, (provider, curves) in enumerate(row["curves"].items()):
        colour, style = COLOURS[2 * index], "-" if index == 0 else "--"
        epochs = range(1, len(curves["training"][0]) + 1)
        for losses in curves["training"]:
            axes.plot(epochs, losses, color=colour, linewidth=0.6, alpha=0.5, linestyle=style)
        mean = [fmean(values) for values in zip(*curves["training"], strict=True)]
        accuracy = fmean(seed[-1] for seed in curves["accuracy"])
        label = f"{provider}: test accuracy {100 * accuracy:.1f} %"
        axes.plot(epochs, mean, color=colour, linestyle=style, linewidth=2, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    axes.legend(fontsize=8)
    seeds = len(next(iter(row["curves"].values()))["training"])
    axes.set_title(f"Training on digits, mean of {seeds} seed{'s' * (seeds != 1)}", fontsize=10)


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the picture of ``results`` (report.Report.as_dict) to ``path``, a PNG.

    Raises:
        NoFigure: no matplotlib, or no rows to draw.
        ResultsError: the file could not be written.
    """
    rows = results["rows"]
    ops = _timed(rows, "batch_norm")
    parts = [
        (_draw_models, _timed(rows, "models")),
        (_draw_ops, [row for row in ops if "limit_share" not in row]),
        (_draw_limits, [row for row in ops if "limit_share" in row]),
        (_draw_digits, next((row for row in rows if row["suite"] == "digits"), None)),
    ]
    drawn: list[tuple[Any, Any]] = [(function, data) for function, data in parts if data]
    if not drawn:
        raise NoFigure("No picture: no row of these results has one.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise NoFigure("No picture: matplotlib is not installed.") from None
    columns = min(2, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(7 * columns, 0.6 + 4.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (function, data) in zip(grid, drawn, strict=False):
        function(axes, data)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(drawn) :]:
        axes.set_visible(False)
    threads = _main_threads(rows)
    title = where(results["environment"])
    if threads is not None:
        title += f"; {threads} thread{'s' * (threads != 1)}, above 1 resops is faster"
    figure.suptitle(title, fontsize=8)
    write_atomically(path, lambda target: figure.savefig(target, dpi=120, format="png"))
