"""`evaluation.json` as a table: systems as columns, metrics as rows."""

from __future__ import annotations

import math
import statistics

from lowdft.reporting.metrics import EVALUATION, SHARES


def cells(evaluation: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, with the difference of "after" from "base" if both were measured.

    A metric that a system does not have is "–"; one that no system has is left out.
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
    """The mean difference on the same rows and its standard error (None for a single row)."""
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


def _points(difference: float, error: float | None) -> str:
    return f"{100 * difference:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def title(evaluation: dict) -> str:
    """A title that says what the table was measured on."""
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
