"""Figures as PNG files: the log-probabilities of a run; curves, swept hyper-parameter and costs of a study."""

from __future__ import annotations

import statistics
from pathlib import Path

from lowdft.reporting.charts import smooth
from lowdft.reporting.metrics import LOGPS, STUDY

TITLES = {"logps/positive": "log-probability of completions, nats", "logps/negative": "of negatives, nats"}
COSTS = ("seconds", "peak_memory_gb")


def logps(steps: list[dict]):
    """The paper's Figure 3: mean log-probabilities of completions and negatives over the steps of one run.

    The curves are smoothed, with the raw curves faint behind them.
    """
    figure, (axis,) = _figure(1, size=(7.2, 4.2))
    for (key, label), style in zip(LOGPS.items(), ("-", "--"), strict=True):
        points = [(step["step"], step[key]) for step in steps if key in step]
        if points:
            x, y = zip(*points, strict=True)
            (line,) = axis.plot(x, y, alpha=0.3, linewidth=0.8)
            marker = "o" if len(x) == 1 else None
            axis.plot(x, smooth(list(y)), style, color=line.get_color(), linewidth=1.8, label=label, marker=marker)
    axis.set_title("Mean log-probability of a sequence", loc="left")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("log-probability (nats)")
    axis.grid(alpha=0.2)
    axis.legend(frameon=False)
    return figure


def label(settings: dict, *without: str) -> str:
    """The name of a combination in tables and legends: its values, except for the keys in `without`."""
    return ", ".join(str(value) for key, value in settings.items() if key not in without)


def draw(folder: Path, results: list[dict], table: list[dict], spread: str) -> list[str]:
    """Draws every figure that is possible with these results, and returns the file names."""
    made = [curves(folder / "curves.png", results, spread), cost(folder / "cost.png", table)]
    key = swept_key(results, spread)
    if key is not None:
        made.append(swept(folder / "swept.png", results, key, spread))
    return [path.name for path in made]


def curves(path: Path, results: list[dict], spread: str) -> Path:
    """Log-probabilities of completions and negatives over training, one colour per method (the paper's Figure 3)."""
    figure, axes = _figure(2, sharex=True)
    colours: dict[str, str] = {}
    for result in results:
        name = label(result["settings"], spread)
        shown = None if name in colours else name
        colour = colours.setdefault(name, f"C{len(colours) % 10}")
        for axis, (key, title) in zip(axes, TITLES.items(), strict=True):
            points = [(i, value) for i, value in enumerate(result["curves"][key], 1) if value is not None]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=shown, linewidth=1)
            axis.set_title(title)
            axis.set_xlabel("log line")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def swept_key(results: list[dict], spread: str) -> str | None:
    """The only key of the grid besides `spread` with several numbers as values; None unless there is exactly one."""
    values: dict[str, set] = {}
    for result in results:
        for key, value in result["settings"].items():
            values.setdefault(key, set()).add(value)
    numeric = [
        key
        for key, found in values.items()
        if key != spread and len(found) > 1 and all(type(value) in (int, float) for value in found)
    ]
    return numeric[0] if len(numeric) == 1 else None


def swept(path: Path, results: list[dict], key: str, spread: str) -> Path:
    """Accuracy (or the margin, if answers are not checked) against the swept number, one line per other combination.

    Error bars are one standard deviation over `spread` (the paper's Figure 2b, with gamma swept).
    """
    measure, scale = ("accuracy", 100) if all("accuracy" in r["after"] for r in results) else ("margin", 1)
    lines: dict[str, dict[float, list[float]]] = {}
    for result in results:
        line = lines.setdefault(label(result["settings"], spread, key), {})
        if measure in result["after"]:
            line.setdefault(result["settings"][key], []).append(scale * result["after"][measure])
    figure, (axis,) = _figure(1)
    for name, points in lines.items():
        x = sorted(points)
        deviations = [statistics.stdev(points[v]) if len(points[v]) > 1 else 0.0 for v in x]
        axis.errorbar(x, [statistics.mean(points[v]) for v in x], deviations, label=name or None, marker="o", capsize=3)
    values = [value for points in lines.values() for value in points]
    if values and min(values) > 0 and max(values) >= 20 * min(values):
        axis.set_xscale("log")
    axis.set_xlabel(key.rsplit(".", 1)[-1])
    axis.set_ylabel("accuracy, %" if measure == "accuracy" else "margin, nats")
    if all(lines):
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def cost(path: Path, table: list[dict]) -> Path:
    """Time and peak memory of each method's training, as bars (the paper's Figure 4)."""
    lines = [line for line in table if "seconds" in line]
    figure, axes = _figure(2)
    for axis, key in zip(axes, COSTS, strict=True):
        shown = [line for line in lines if key in line]
        axis.barh([line["name"] for line in shown], [line[key][0] for line in shown])
        axis.invert_yaxis()
        axis.set_title(STUDY[key])
    figure.savefig(path, dpi=120)
    return path


def _figure(panels: int, size: tuple[float, float] | None = None, **options):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size or (4.5 * panels, 4), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False, **options)[0]
