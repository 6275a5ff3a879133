"""What `evaluation.json` says as a table: systems side by side as columns, metrics as rows."""

from __future__ import annotations

METRICS = {
    "accuracy": "accuracy of greedy answers",
    "wins": "accuracy of choice, summed log-prob",
    "wins_per_token": "accuracy of choice, log-prob per token",
    "margin": "margin, nats",
    "logps/positive": "log-prob of completions, nats",
    "logps/negative": "log-prob of negatives, nats",
    "logps/positive_per_token": "log-prob of completions a token, nats",
}
SHARES = ("accuracy", "wins", "wins_per_token")


def cells(evaluation: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text; a metric that a system lacks is "–", one that no system has is left out."""
    systems = evaluation["systems"]
    found = {key for metrics in systems.values() for key in metrics if not key.endswith("_stderr")}
    keys = [key for key in METRICS if key in found] + sorted(found - set(METRICS))
    rows = [[METRICS.get(key, key), *(_cell(key, metrics) for metrics in systems.values())] for key in keys]
    return ["", *systems], rows


def title(evaluation: dict) -> str:
    """What the table was measured on."""
    count = evaluation["negatives_per_row"]
    beside = f", {count:.3g} negative{'' if count == 1 else 's'} a row" if count else ""
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
