"""Computes charts for the page's template, which draws them as SVG: ticks, paths and marks in picture units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lowdft.reporting.metrics import LOGARITHMIC, LOGPS, NEGLIGIBLE, TRAINING

WIDTH, HEIGHT = 520, 290
LEFT, RIGHT, TOP, BOTTOM = 62, 508, 12, 246  # the plotting area
POINTS, MARKS, BINS = 400, 7, 24
FLOOR = 1e-12  # zero on a logarithmic axis


@dataclass
class Line:
    """One curve: its run, which of the chart's quantities it shows, and its points (step, value)."""

    label: str
    run: int
    kind: int
    points: list[tuple[float, float]]


@dataclass
class Chart:
    """A chart for the template. Positions are in a picture of `WIDTH` by `HEIGHT`; paths are SVG path data."""

    key: str
    title: str
    unit: str
    across: str = "optimizer step"
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    lines: list[dict] = field(default_factory=list)
    bars: list[dict] = field(default_factory=list)
    threshold: tuple[float, str] | None = None


def of_training(runs: Sequence[tuple[str, list[dict]]]) -> list[Chart]:
    """The charts of training, each with a line per run. `runs`: (name, log lines)."""
    both = [
        Line(f"{name}: {label}" if len(runs) > 1 else label, i, kind, _points(steps, key))
        for i, (name, steps) in enumerate(runs)
        for kind, (key, label) in enumerate(LOGPS.items())
    ]
    charts = [draw("logps", "Log-probability of a sequence", "nats", both)]
    for key, (title, unit) in TRAINING.items():
        lines = [Line(name, i, 0, _points(steps, key)) for i, (name, steps) in enumerate(runs)]
        limit = (NEGLIGIBLE, f"below {NEGLIGIBLE:g} they contribute almost nothing") if key == "weights/mean" else None
        charts.append(draw(key, title, unit, lines, key in LOGARITHMIC, limit))
    return [chart for chart in charts if chart]


def draw(
    key: str, title: str, unit: str, lines: Sequence[Line], log: bool = False, limit: tuple[float, str] | None = None
) -> Chart | None:
    """A chart of smoothed curves with the raw curves behind; None if no line has a point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    shown = {id(line): _clean(line.points, log) for line in lines}
    values = [y for points in shown.values() for _, y in points] + ([limit[0]] if limit else [])
    x_ticks, x_at = _axis([x for points in shown.values() for x, _ in points], LEFT, RIGHT, integer=True)
    y_ticks, y_at = _axis(values, BOTTOM, TOP, log=log)
    chart = Chart(key, title, unit, x_ticks=x_ticks, y_ticks=y_ticks)
    chart.threshold = (y_at(limit[0]), limit[1]) if limit else None
    for line in lines:
        raw = shown[id(line)]
        smoothed = list(zip((x for x, _ in raw), smooth([y for _, y in raw]), strict=True))
        chart.lines.append(
            {
                "label": line.label,
                "run": line.run,
                "kind": line.kind,
                "raw": _path(raw, x_at, y_at),
                "path": _path(smoothed, x_at, y_at),
                "marks": [(x_at(x), y_at(y), f"step {x:g}: {_number(y)} {unit}") for x, y in _some(smoothed, MARKS)],
            }
        )
    return chart


def histogram(
    key: str, title: str, unit: str, across: str, runs: Sequence[tuple[int, str, list[float]]]
) -> Chart | None:
    """A histogram, with the bars of several runs side by side. `runs`: (run, name, values)."""
    runs = [(i, name, [v for v in values if math.isfinite(v)]) for i, name, values in runs]
    runs = [(i, name, values) for i, name, values in runs if values]
    if not runs:
        return None
    low, high = min(min(v) for _, _, v in runs), max(max(v) for _, _, v in runs)
    size = (high - low) / BINS or 1.0
    counts = {i: [0] * BINS for i, _, _ in runs}
    for i, _, values in runs:
        for value in values:
            counts[i][min(BINS - 1, int((value - low) / size))] += 1
    x_ticks, x_at = _axis([low, low + size * BINS], LEFT, RIGHT)
    y_ticks, y_at = _axis([0, max(max(c) for c in counts.values())], BOTTOM, TOP)
    chart = Chart(key, title, unit, across, x_ticks, y_ticks)
    width = (x_at(low + size) - x_at(low)) / len(runs)
    for place, (i, name, _) in enumerate(runs):
        bars = [
            {"x": x_at(low + b * size) + place * width, "y": y_at(n), "height": y_at(0) - y_at(n),
             "title": f"{name}: {n} from {_number(low + b * size)} to {_number(low + (b + 1) * size)}"}
            for b, n in enumerate(counts[i]) if n
        ]  # fmt: skip
        chart.bars.append({"label": name, "run": i, "width": max(1.0, width - 1), "bars": bars})
    return chart


def smooth(values: list[float]) -> list[float]:
    """A centred moving mean over about a twentieth of the curve; shorter at both ends."""
    half = len(values) // 40
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _points(steps: list[dict], key: str) -> list[tuple[float, float]]:
    return [(s["step"], s[key]) for s in steps if isinstance(s.get(key), int | float) and math.isfinite(s[key])]


def _clean(points: list[tuple[float, float]], log: bool) -> list[tuple[float, float]]:
    return [(x, max(y, FLOOR) if log else y) for x, y in _some(points, POINTS)]


def _some(points: list, count: int) -> list:
    """At most `count` items, evenly spaced, including the last."""
    if len(points) <= count:
        return points
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


def _path(points, x_at: Callable, y_at: Callable) -> str:
    return "M" + "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in points)


def _axis(values: Sequence[float], start: float, end: float, log: bool = False, integer: bool = False):
    """Ticks (position, text) of an axis from `start` to `end`, and the function from a value to its position."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = min(values), max(values)
    if log:
        low, high = low / 1.3, high * 1.3
        ticks = LogLocator(numticks=6).tick_values(low, high)
    else:
        pad = 0 if integer else 0.04 * (high - low)
        if high == low:
            pad = 0.5 if integer else abs(high) / 2 or 0.5
        low, high = low - pad, high + pad
        ticks = MaxNLocator(nbins=5, integer=integer).tick_values(low, high)

    def at(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return round(start + (end - start) * share, 1)

    return [(at(float(tick)), _number(float(tick))) for tick in ticks if low <= tick <= high], at


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
