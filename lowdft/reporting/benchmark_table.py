"""`benchmark.json` as a table: benchmarks as rows, systems as columns, and differences from the base."""

from __future__ import annotations

import statistics

NAMES = {
    "mmlu": "MMLU",
    "truthfulqa_mc2": "TruthfulQA (mc2)",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "gsm8k": "GSM8K",
    "arc_challenge": "ARC (challenge)",
    "ifeval": "IFEval",
    "metamath_gsm8k": "GSM8K, MetaMath's prompt",
    "metamath_math": "MATH, MetaMath's prompt",
}


def cells(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text; shares are in percent, and their differences in points."""
    systems = list(result["mean"])
    others = systems[1:]
    header = ["", *systems, *(f"{name} ahead" for name in others), "rows"]
    rows = []
    for task, found in result["tasks"].items():
        shots = f"{found['shots']}-shot" if found["shots"] is not None else ""
        scores = found["systems"]
        rows.append(
            [
                f"{NAMES.get(task, task)}, {shots}, {found['metric'].removesuffix(',none')}",
                *(_cell(scores[name]["value"], scores[name]["stderr"]) for name in systems),
                *(_cell(scores[name]["ahead"]["value"], scores[name]["ahead"]["stderr"], "+") for name in others),
                f"{found['rows']:,}",
            ]
        )
    if len(rows) > 1:
        means = result["mean"]
        ahead = [_cell(means[name] - means[systems[0]], None, "+") for name in others]
        rows.append(["mean", *(_cell(value, None) for value in means.values()), *ahead, ""])
    return header, rows


def notes(result: dict) -> str:
    """A line that explains the numbers."""
    paired = all(
        score["ahead"]["paired"] for task in result["tasks"].values() for score in list(task["systems"].values())[1:]
    )
    errors = "standard errors; differences paired by row" if paired else "standard errors"
    limit = f" on the first {result['limit']} rows per task" if result["limit"] else ""
    return f"{result['harness']}{limit}; percent ± {errors}"


def print_table(result: dict) -> None:
    """Prints the table on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    header, rows = cells(result)
    out = Table(caption=notes(result), caption_justify="left")
    for name in header:
        out.add_column(escape(name), justify="right" if name else "left")
    for row in rows:
        out.add_row(*map(escape, row))
    Console().print(out)


def _cell(value: float, error: float | None, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def of_study(runs: list[tuple[str, dict]]) -> str:
    """The benchmarks of a study in Markdown: one line per name, with the difference from the base in brackets.

    Args:
        runs: (name of the line, contents of the run's benchmark.json); runs of one name are repetitions.
    """
    grouped: dict[str, list[dict]] = {}
    for name, result in runs:
        grouped.setdefault(name, []).append(result)
    first = runs[0][1]
    tasks = list(first["tasks"])
    header = ["", *(NAMES.get(task, task) for task in tasks), "mean"]
    base = [_cell(first["tasks"][task]["systems"]["base"]["value"], None) for task in tasks]
    lines = [header, ["---"] * len(header), ["base", *base, _cell(first["mean"]["base"], None)]]
    for name, many in grouped.items():
        cells = [_of_repetitions([one["tasks"][task]["systems"]["after"] for one in many]) for task in tasks]
        lines.append([name, *cells, _cell(statistics.mean(one["mean"]["after"] for one in many), None)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{notes(first)}; in brackets the difference from the base.\n"


def _of_repetitions(scores: list[dict]) -> str:
    values = [score["value"] for score in scores]
    spread = statistics.stdev(values) if len(values) > 1 else scores[0]["stderr"]
    errors = [score["ahead"]["stderr"] for score in scores]
    error = None if None in errors else statistics.mean(errors)  # the rows are the same in every run
    ahead = _cell(statistics.mean(score["ahead"]["value"] for score in scores), error, "+")
    return f"{_cell(statistics.mean(values), spread)} ({ahead})"
