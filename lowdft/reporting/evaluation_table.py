"""`evaluation.json` and `benchmarks.json` as tables: systems side by side as columns, metrics as rows."""

from __future__ import annotations

import math
import statistics

from lowdft.reporting.metrics import EVALUATION, SHARES


def cells(evaluation: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, with the difference of "after" to "base" where both were measured.

    A metric that a system lacks is "–", one that no system has is left out.
    """
    systems = evaluation["systems"]
    found = {key for metrics in systems.values() for key in metrics if not key.endswith("_stderr")}
    keys = [key for key in EVALUATION if key in found] + sorted(found - set(EVALUATION))
    rows = [[EVALUATION.get(key, key), *(_cell(key, metrics) for metrics in systems.values())] for key in keys]
    if not {"base", "after"} <= systems.keys():
        return ["", *systems], rows
    return ["", *systems, "difference"], [
        [*row, _difference(key, evaluation)] for key, row in zip(keys, rows, strict=True)
    ]


def paired(base: list[float], after: list[float]) -> tuple[float, float | None]:
    """Mean of the differences on the same rows and its standard error (None for a single row)."""
    differences = [a - b for a, b in zip(after, base, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return statistics.mean(differences), error


def _difference(key: str, evaluation: dict) -> str:
    base, after = (evaluation["systems"][name].get(key) for name in ("base", "after"))
    if base is None or after is None:
        return "–"
    if key not in SHARES:
        return f"{after - base:+.2f}"
    per_row = [evaluation.get("per_row", {}).get(name, {}).get(key) for name in ("base", "after")]
    if None in per_row:
        return f"{100 * (after - base):+.1f} points"
    mean, error = paired(*per_row)
    return f"{_points(mean, error)} points"


def benchmark_cells(benchmarks: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of benchmarks.json: a task per row, its metric, base, after and their difference.

    `benchmarks`: {task: {"base": {metric: value}, "after": …, "difference": value, "stderr": value}}. Of a task with
    several metrics the first that both systems have is shown; a difference that the file lacks is computed.
    """
    rows = []
    for task, found in benchmarks.items():
        metric, base, after = first_metric(found.get("base"), found.get("after"))
        difference, error = found.get("difference"), found.get("stderr")
        if difference is None and None not in (base, after):
            difference = after - base
        told = "–" if difference is None else _points(difference, error)
        rows.append([task, metric, *(_percent(value) for value in (base, after)), told])
    return ["benchmark", "metric", "base, %", "after, %", "difference, points"], rows


def first_metric(base: object, after: object) -> tuple[str, float | None, float | None]:
    """The name and both values of the first metric that base and after share; bare numbers are values themselves."""
    if not isinstance(base, dict) or not isinstance(after, dict):
        return "", *(value if isinstance(value, int | float) else None for value in (base, after))
    numbers = [key for key, value in base.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    shared = [key for key in numbers if "stderr" not in key and key in after]
    if not shared:
        return "", None, None
    return shared[0].partition(",")[0], base[shared[0]], after[shared[0]]


def _points(difference: float, error: float | None) -> str:
    return f"{100 * difference:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def title(evaluation: dict) -> str:
    """What the table was measured on."""
    count = evaluation["negatives_per_row"]
    beside = f", {count:.3g} negative{'' if count == 1 else 's'} per row" if count else ""
    rows = evaluation["rows"]
    return f"{rows} held-out row{'' if rows == 1 else 's'}{beside}"


def table(evaluation: dict):
    """The table for a terminal, a `rich.table.Table`."""
    from rich.markup import escape
    from rich.table import Table

    header, rows = cells(evaluation)
    out = Table(title=title(evaluation), title_justify="left")
    for name in header:
        out.add_column(escape(name), justify="right" if name else "left")
    for row in rows:
        out.add_row(*map(escape, row))
    return out


def print_table(evaluation: dict) -> None:
    """Prints the table on standard output."""
    from rich.console import Console

    Console().print(table(evaluation))


def _cell(key: str, metrics: dict) -> str:
    value = metrics.get(key)
    if value is None:
        return "–"
    if key not in SHARES:
        return f"{value:.2f}"
    error = metrics.get(f"{key}_stderr")
    return f"{100 * value:.1f}%" if error is None else f"{100 * value:.1f} ± {100 * error:.1f}%"
