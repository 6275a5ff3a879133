"""What `benchmark.json` says as a table: benchmarks as rows, systems as columns, and how far each is ahead."""

from __future__ import annotations

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
    """Header and rows as text, in percent and points where a metric is a share."""
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
    """What the numbers are."""
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
