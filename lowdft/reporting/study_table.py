"""A study's results as a table: means, paired differences from SFT with their errors, and verdicts."""

from __future__ import annotations

import math
import statistics

from lowdft.reporting.figures import label
from lowdft.reporting.metrics import SHARES
from lowdft.reporting.metrics import STUDY as MEASURES

JUDGED_BY = ("accuracy", "wins", "logps/positive")  # the first one that was measured decides the best learning rate
TUNED, EQUAL_TIME = "sft, tuned", "sft, equal time"  # lines that `compare` adds to every grid


def best(measured: dict[object, dict]) -> object:
    """The key with the best value of the first measure in `JUDGED_BY` that all have."""
    by = next(name for name in JUDGED_BY if all(name in measures for measures in measured.values()))
    return max(measured, key=lambda key: measured[key][by])


def tabulate(results: list[dict], spread: str, paper: dict[str, dict]) -> list[dict]:
    """One line per combination without `spread`: [mean, standard deviation] of every measure; the base is first.

    For `SHARES`, `ahead` has the paired difference from tuned SFT (or from the first combination, without tuned SFT),
    and `ahead_at_equal_time` that from SFT at equal time: [mean, standard error over rows, standard error over seeds].
    """
    grouped: dict[str, list[dict]] = {"base": [{"after": results[0]["base"], "per_row": {}}]}
    for result in results:
        grouped.setdefault(label(result["settings"], spread), []).append(result)
    first = grouped.get(TUNED, list(grouped.values())[1])
    table = []
    for name, many in grouped.items():
        line: dict = {"name": name, "runs": len(many)}
        for key in MEASURES:
            values = [one["after"][key] for one in many if one["after"].get(key) is not None]
            if values:
                line[key] = [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]
        line["ahead"] = _ahead(many, first, spread)
        line["ahead_at_equal_time"] = _ahead(many, grouped.get(EQUAL_TIME, many), spread)
        table.append(line | {"paper": paper.get(name, {})})
    return table


def _ahead(many: list[dict], first: list[dict], spread: str) -> dict[str, list]:
    if many is first:
        return {}
    groups = [{one.get("settings", {}).get(spread): one["per_row"] for one in group} for group in (many, first)]
    shared = [value for value in groups[0] if value in groups[1]]
    keys = [key for key in SHARES if shared and all(key in group[value] for group in groups for value in shared)]
    return {key: paired(*([group[value][key] for value in shared] for group in groups)) for key in keys}


def paired(ours: list[list[float]], theirs: list[list[float]]) -> list[float | None]:
    """[mean, error over rows, error over runs] of the difference on the same rows, run by run.

    The error over rows is the standard error of the rows' differences, each averaged over runs. The error over runs is
    that of the runs' differences, each averaged over rows; None with a single run.
    """
    differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(ours, theirs, strict=True)]
    rows = [statistics.mean(row) for row in zip(*differences, strict=True)]
    return [statistics.mean(rows), _error(rows), _error([statistics.mean(run) for run in differences])]


def _error(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def combined(difference: list[float | None]) -> tuple[float, float]:
    """The mean, and one error from those over rows and over seeds: the root of their squares, slightly too large."""
    mean, *errors = difference
    return mean, math.hypot(*(error for error in errors if error is not None))


def verdicts(table: list[dict]) -> list[str]:
    """One sentence for every line that is compared with SFT: the difference, and whether it is significant."""
    out = []
    for line in table:
        key = next((key for key in SHARES if key in line["ahead"]), None)
        if key is None or line["name"] in ("base", EQUAL_TIME):
            continue
        compared = {"tuned SFT": line["ahead"][key], "SFT at equal time": line["ahead_at_equal_time"].get(key)}
        found = {what: combined(value) for what, value in compared.items() if value is not None}
        told = ", ".join(f"{_points(*value)} points from {what}" for what, value in found.items())
        low = min(mean - 2 * error for mean, error in found.values())
        high = max(mean + 2 * error for mean, error in found.values())
        verdict = "it pays" if low > 0 else "SFT is better" if high < 0 else "no difference beyond two standard errors"
        runs = f"{line['runs']} seed{'' if line['runs'] == 1 else 's'}"
        out.append(f"{line['name']}: differs by {told}, over {runs} ({MEASURES[key].removesuffix(', %')}): {verdict}.")
    return out


def _points(mean: float, error: float) -> str:
    return f"{100 * mean:+.1f} ± {100 * error:.1f}"


def markdown(table: list[dict], spread: str) -> str:
    """The table, with ± one standard deviation over `spread`, the paper's numbers last, and the verdicts."""
    keys = [key for key in MEASURES if any(key in line for line in table)]
    ahead = [key for key in keys if any(key in line["ahead"] for line in table)]
    theirs = list(dict.fromkeys(name for line in table for name in line["paper"]))
    header = [MEASURES[key] for key in keys] + [f"{MEASURES[key].removesuffix(', %')} ahead, points" for key in ahead]
    header += ["runs", *(f"paper: {name}" for name in theirs)]
    out = [f"| | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    for line in table:
        cells = [_cell(line.get(key), 100 if key in SHARES else 1) for key in keys]
        cells += [_ahead_cell(line["ahead"].get(key)) for key in ahead]
        cells += [str(line["runs"]), *(str(line["paper"].get(name, "–")) for name in theirs)]
        out.append(f"| {line['name']} | {' | '.join(cells)} |")
    notes = [f"Mean ± standard deviation over {spread}."]
    if ahead:
        names = [line["name"] for line in table]
        to = TUNED if TUNED in names else names[1]
        notes.append(
            f"Ahead: difference from {to} on the same rows and seeds ± its standard error over rows; in brackets the "
            "standard error over seeds."
        )
    said = [f"- {sentence}" for sentence in verdicts(table)] if any(line["name"] == TUNED for line in table) else []
    return "\n".join([*out, "", " ".join(notes), *([""] if said else []), *said, ""])


def _cell(value: list | None, scale: float) -> str:
    if value is None:
        return "–"
    mean, deviation = value
    return f"{scale * mean:.2f}" + ("" if deviation is None else f" ± {scale * deviation:.2f}")


def _ahead_cell(value: list | None) -> str:
    if value is None:
        return "–"
    text = _cell(value[:2], 100)
    return text if value[2] is None else f"{text} ({100 * value[2]:.2f})"
