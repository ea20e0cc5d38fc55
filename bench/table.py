"""Results as plain text, for the terminal and for the README."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, geometric_mean
from typing import Any

from bench.report import Row

Table = list[list[str]]

_CHECKPOINTS = "eager, memory_efficient"  # of DenseNets


def align(table: Table) -> str:
    """Columns of equal width: the first to the left, the others to the right; row 0 is the head."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def markdown(table: Table) -> str:
    head, *body = table
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def milliseconds(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(summary: dict[str, float] | None) -> str:
    if summary is None:
        return ""
    return f"{summary['median']:.2f}x [{summary['p20']:.2f}, {summary['p80']:.2f}]"


def _times(row: Row) -> list[str]:
    providers = row["providers"]
    cells = [milliseconds(providers[name]["median"]) for name in ("eager", "resops")]
    return [*cells, ratio(row["ratio"])]


def _timing_rows(rows: Sequence[Row], suite: str) -> list[Row]:
    return [row for row in rows if row["suite"] == suite and row["metric"] == "time"]


def models_table(rows: Sequence[Row], suite: str = "models") -> Table:
    heads = {"fuse": "resops.fuse(model)", "families": "one of each family"}
    head = heads.get(suite, "model")
    table = [[head, "threads", "eager ms", "resops ms", "eager / resops"]]
    for row in _timing_rows(rows, suite):
        name = f"{row['case']} {row['direction']} {row['dtype']}, batch {row['batch']}"
        table.append([name, str(row["threads"]), *_times(row)])
    return table


def overhead_table(rows: Sequence[Row]) -> Table:
    """Host time of a call, which a host that is late adds to every layer."""
    table = [["host time of a call", "eager us", "resops us", "resops / eager"]]
    for row in _timing_rows(rows, "overhead"):
        both = [f"{1e3 * row['providers'][name]['median']:.1f}" for name in ("eager", "resops")]
        ratio = row["ratio"]
        share = " ".join(f"{1 / ratio[q]:.2f}" for q in ("median", "p80", "p20"))
        median, low, high = share.split()
        table.append([f"{row['case']}, {row['direction']}", *both, f"{median} [{low}, {high}]"])
    return table


def ops_table(rows: Sequence[Row], suite: str = "batch_norm") -> Table:
    """One line per shape and number of threads; milliseconds of eager and resops, and the ratio."""
    cells: dict[tuple[str, int], dict[str, str]] = {}
    columns: list[str] = []
    for row in _timing_rows(rows, suite):
        if "limit_share" in row:
            continue
        column = f"{row['dtype']} {row['direction']}"
        columns += [column] * (column not in columns)
        line = cells.setdefault((f"{row['case']}, batch {row['batch']}", row["threads"]), {})
        line[column] = f"{row['ratio']['median']:.2f}x ({' / '.join(_times(row)[:2])})"
    table = [["op: eager / resops (ms)", "threads", *columns]]
    for (case, threads), line in cells.items():
        table.append([case, str(threads), *(line.get(column, "") for column in columns)])
    return table


def limits_table(rows: Sequence[Row]) -> Table:
    """The ops that were timed on tensors beyond the caches."""
    head = ["op, beyond the caches", "threads", "eager ms", "resops ms", "eager / resops"]
    table = [[*head, "GB/s", "of the limit"]]
    for row in rows:
        if row.get("limit_share"):
            name = f"{row['case']} {row['direction']} {row['dtype']}, batch {row['batch']}"
            share = f"{100 * row['limit_share']['median']:.0f} %"
            rate = f"{row['gb_per_s']:.1f}"
            table.append([name, str(row["threads"]), *_times(row), rate, share])
    return table


def bandwidth_table(rows: Sequence[Row]) -> Table:
    table = [["memory bandwidth", "threads", "GB/s", "way"]]
    for row in rows:
        if row["suite"] == "bandwidth":
            rate = row["providers"]["best"]["median"]
            table.append([row["case"], str(row["threads"]), f"{rate:.1f}", row["way"]])
    return table


def memory_table(rows: Sequence[Row]) -> Table:
    """Models, and the ops with a residual; for an op also what is kept apart from its input."""
    head = ["saved for backward", "eager MB", "resops MB", "resops / eager"]
    table = [[*head, "bits per element beyond x: eager", "resops"]]
    for row in rows:
        if row["metric"] != "saved" or (row["suite"] == "batch_norm" and "add" not in row["case"]):
            continue
        name = f"{row['case']} {row['dtype']}, batch {row['batch']}"
        kept = [row["providers"][provider] for provider in ("eager", "resops")]
        bits = ["", ""]
        if "elements" in row:
            beyond = [n - row["elements"] * row["element_bytes"] for n in kept]
            bits = [f"{8 * extra / row['elements']:.2f}" for extra in beyond]
        megabytes = [f"{n / 1e6:.1f}" for n in kept]
        table.append([name, *megabytes, f"{kept[1] / kept[0]:.2f}", *bits])
    return table


def traffic_table(rows: Sequence[Row]) -> Table:
    table = [["moved in a training step, MB an image", "eager", "memory_efficient", "resops"]]
    for row in rows:
        if row["metric"] == "traffic":
            moved = [row["providers"].get(name) for name in ("eager", _CHECKPOINTS, "resops")]
            cells = ["" if n is None else f"{n / 1e6:.0f}" for n in moved]
            table.append([f"{row['case']} {row['dtype']}, batch {row['batch']}", *cells])
    return table


def others_table(rows: Sequence[Row]) -> Table:
    """Providers beside eager and resops."""
    table = [["model, another provider", "threads", "ms", "this / resops"]]
    for row in _timing_rows(rows, "densenet"):
        for name, found in row["ratios"].items():
            if name == "eager":
                continue
            case = f"{row['case']} {row['direction']} {row['dtype']}, batch {row['batch']}: {name}"
            time = milliseconds(row["providers"][name]["median"])
            table.append([case, str(row["threads"]), time, ratio(found)])
    return table


def digits_table(rows: Sequence[Row]) -> Table:
    table = [["digits", "eager", "resops"]]
    for row in rows:
        if row["suite"] == "digits":
            for metric in ("accuracy", "loss"):
                cells = [
                    " ".join(f"{seed[-1]:.4f}" for seed in row["curves"][provider][metric])
                    for provider in ("eager", "resops")
                ]
                table.append([f"final test {metric}, one per seed", *cells])
    return table


def learning_table(rows: Sequence[Row]) -> Table:
    """Of every network and backend the last epoch: the mean over the seeds, least and greatest."""
    table = [["learning", "training loss", "test loss", "test metric", ""]]
    for row in rows:
        if row["suite"] == "learning" and row["metric"] == "curves":
            for backend, last in row["providers"].items():
                cells = [
                    f"{fmean(last[key]):.3f} [{min(last[key]):.3f}, {max(last[key]):.3f}]"
                    for key in ("training", "loss", "metric")
                ]
                verdict = "agree" if row["agrees"] else "DIFFER"
                table.append([f"{row['case']}, {backend}", *cells, f"{row['name']}; {verdict}"])
    return table


def checks_table(rows: Sequence[Row]) -> Table:
    """One line per group; every failed check has its own."""
    table = [["checked against float64", "passed", "largest error / allowed"]]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["suite"] == "check":
            groups.setdefault(row["group"], []).append(row)
    for group, members in groups.items():
        passed = sum(row["passed"] for row in members)
        share = max((row.get("share", 0.0) for row in members), default=0.0)
        table.append([group, f"{passed} of {len(members)}", f"{share:.2f}"])
        table += [[f"  {row['case']}", "FAILED", ""] for row in members if not row["passed"]]
    return table


def where(environment: dict[str, Any]) -> str:
    """Where the numbers come from, in two lines."""
    versions, commit = environment["versions"], environment["commit"]
    caches = ", ".join(f"{level} {size}" for level, size in environment["caches"].items())
    hash_ = (commit["hash"] or "unknown")[:12] + (" with changes" if commit["changed"] else "")
    return (
        f"{environment['device']}, {environment['cores']} cores, {caches}; "
        f"load {environment['load_average']:.1f} at the start\n"
        f"torch {versions['torch']} ({environment['torch_capability']}), resops "
        f"{versions['resops']} ({environment['resops_capability']}), commit {hash_}, "
        f"{environment['date'][:16]}"
    )


def sections(results: dict[str, Any]) -> list[Table]:
    """All tables that have a row, in the order of the job."""
    rows = results["rows"]
    tables = [
        checks_table(rows),
        models_table(rows),
        models_table(rows, "fuse"),
        models_table(rows, "densenet"),
        others_table(rows),
        models_table(rows, "families"),
        overhead_table(rows),
        ops_table(rows),
        ops_table(rows, "residual_add"),
        limits_table(rows),
        memory_table(rows),
        traffic_table(rows),
        bandwidth_table(rows),
        digits_table(rows),
        learning_table(rows),
    ]
    return [table for table in tables if len(table) > 1]


def summary(rows: Sequence[Row], suite: str) -> list[str]:
    """One sentence per number of threads: the geometric mean, the least and the greatest ratio."""
    lines = []
    timed = [row for row in _timing_rows(rows, suite) if "limit_share" not in row]
    for count in sorted({row["threads"] for row in timed}):
        ratios = [row["ratio"]["median"] for row in timed if row["threads"] == count]
        fast, slow = sum(r >= 1.3 for r in ratios), sum(r < 1 for r in ratios)
        lines.append(
            f"{suite}, {count} thread{'s' * (count != 1)}: {len(ratios)} cases, eager / resops "
            f"{geometric_mean(ratios):.2f} (geometric mean), {min(ratios):.2f} to "
            f"{max(ratios):.2f}; {fast} at 1.3 or more, {slow} below 1"
        )
    return lines


def render(results: dict[str, Any]) -> str:
    """The whole report as text."""
    parts = [where(results["environment"])]
    parts += [align(table) for table in sections(results)]
    lines = [
        s
        for suite in ("models", "fuse", "families", "batch_norm")
        for s in summary(results["rows"], suite)
    ]
    missing = [row["case"] for row in results["rows"] if row["metric"] == "skipped"]
    if missing:
        lines.append("not run: " + "; ".join(missing))
    if not results["complete"]:
        lines.append("This run was cut short: rows are missing.")
    return "\n\n".join([*parts, "\n".join(lines)] if lines else parts)
