"""The report in a headless chromium: no console error, marks in every chart, and switches that switch."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from lowdft.reporting import charts, samples
from lowdft.reporting.metrics import GLOSSARY, HINTS
from lowdft.reporting.page import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
PROBE = """
const shown = () => [...document.querySelectorAll("#samples article")].filter((a) => a.offsetHeight > 0).length;
const lines = () => [...document.querySelectorAll("#chart-loss > svg path.line")].filter((p) => p.closest("[data-run]")
  && p.getClientRects().length > 0).length;
const found = {all: shown(), both: lines(), filters: {}};
for (const choice of document.querySelectorAll("#filter input")) {
  choice.click(); found.filters[choice.value] = shown(); }
document.querySelectorAll("#runs input")[1].click();
found.one = lines();
found.marks = [...document.querySelectorAll("figure.chart")].map((figure) =>
  figure.querySelectorAll(":scope > svg .mark").length);
found.inside = [...document.querySelectorAll("figure.chart > svg .mark")].every((mark) => {
  const m = mark.getBoundingClientRect(), s = mark.ownerSVGElement.getBoundingClientRect();
  return !m.width || (m.left >= s.left && m.right <= s.right && m.top >= s.top && m.bottom <= s.bottom); });
found.cut = [...document.querySelectorAll("figure.chart > svg .tick")].filter((tick) => {
  const t = tick.getBoundingClientRect(), svg = tick.ownerSVGElement, s = svg.getBoundingClientRect();
  const [left, right] = getComputedStyle(svg).overflow === "visible" ? [0, innerWidth] : [s.left, s.right];
  return t.width && (t.left < left || t.right > right); }).map((tick) => tick.textContent);
found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.documentElement.dataset.found = JSON.stringify(found);
"""


def make_page() -> str:
    """Two runs of forty steps, and five samples: two fixed, one broken, one right and one wrong both times."""
    rng = random.Random(0)
    runs = [(name, [{"step": 50 * i, "loss": 9.0 - i / 10 + rng.random(), "logps/positive": -20 + i / 9,
                     "logps/negative": -20.0 - i / 5, "weights/mean": 0.9 ** i, "learning_rate": 2.5e-5 * (40 - i),
                     "peak_memory_gb": 1.5} for i in range(1, 41)]) for name in ("dft", "sft")]  # fmt: skip
    drawn = [*charts.of_training(runs), charts.histogram("log_u", "log_u", "examples", "log_u, nats", [
        (0, "dft", [rng.gauss(-2, 1) for _ in range(200)]), (1, "sft", [0.0, 1.0])])]  # fmt: skip
    outcomes = [(False, True), (False, True), (True, False), (True, True), (False, False)]
    rows = [{"prompt": f"<script>alert({i})</script> & {'word ' * 90 * i}", "completion": "4", "base": "a" * 400,
             "after": "", "right": {"base": base, "after": after},
             "negatives": [{"text": "5", "base": -1.0, "after": -9.0, "weight": 0.5}]}
            for i, (base, after) in enumerate(outcomes)]  # fmt: skip
    shown = samples.of({"rows": 5, "systems": {"base": {}, "after": {}}, "samples": rows})
    table = {"header": ["", "base", "after", "difference"], "caption": "5 rows",
             "rows": [["accuracy of greedy answers", "25.5 ± 2.0%", "83.0 ± 3.8%", "+57.5 ± 4.0 points"]]}  # fmt: skip
    facts = {"base": "someone/tiny", "steps": 40}
    return render(title="a run", subtitle="dft", live=None, refresh=1, finished=True, progress="step 40",
                  warnings=["Mind."], evaluation=table, benchmarks=table, training=facts, runs=["dft", "sft"],
                  charts=drawn, hints=HINTS, negatives=facts, answers=[{"prompt": "2+2?", "steps": [(3, "5")]}],
                  recipe="a: 1", glossary=GLOSSARY, version="0", **shown)  # fmt: skip


@pytest.mark.parametrize("width", [1200, 500])
def test_charts_are_drawn_and_switches_switch(tmp_path, width):
    page = tmp_path / "report.html"
    page.write_text(make_page().replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    dump = browse(page, tmp_path, width)
    assert "CONSOLE" not in dump.stderr, dump.stderr
    found = found_by(dump)
    assert found["all"] == 5
    assert found["filters"] == {"": 5, "right": 3, "wrong": 2, "changed": 3, "fixed": 2, "broken": 1}
    assert (found["both"], found["one"]) == (2, 1)
    assert len(found["marks"]) == 6 and min(found["marks"]) > 0 and found["inside"]
    assert found["overflow"] <= 0 and found["cut"] == []


RELOADED = """
if (performance.getEntriesByType("navigation")[0].type === "reload") {
  const open = [...document.querySelectorAll("details[open] > summary")].map((one) => one.textContent);
  const off = [...document.querySelectorAll("#runs input:not(:checked)")].map((box) => box.value);
  document.documentElement.dataset.found = JSON.stringify({open, off, hidden: document.body.className});
} else {
  document.querySelectorAll("details")[0].open = true;
  document.querySelectorAll("#runs input")[1].click();
  setTimeout(() => location.reload(), 100);
}
"""


def test_what_is_open_stays_open_when_the_page_is_reloaded(tmp_path):
    """As the page of a running training reloads itself every few seconds."""
    page = tmp_path / "report.html"
    page.write_text(make_page().replace("</body>", f"<script>{RELOADED}</script></body>"), encoding="utf-8")
    dump = browse(page, tmp_path, 1200, "--virtual-time-budget=1500")
    assert "CONSOLE" not in dump.stderr, dump.stderr
    assert found_by(dump) == {"open": ["2+2?"], "off": ["1"], "hidden": "off1"}


def found_by(dump: subprocess.CompletedProcess) -> dict:
    """What the script in the page found."""
    return json.loads(re.search(r"data-found=\"(.*?)\"", dump.stdout).group(1).replace("&quot;", '"'))


def browse(page: Path, folder: Path, width: int, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--dump-dom",
         f"--window-size={width},900", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_mark_stands_where_its_value_is():
    """A line from (1, 0) to (3, 10): its last point lies at the right end, its first at the left."""
    line = charts.Line("a", 0, 0, [(1, 0.0), (2, 5.0), (3, 10.0)])
    [drawn] = charts.draw("k", "t", "nats", [line]).lines
    assert [round(x) for x, _, _ in drawn["marks"]] == [charts.LEFT, (charts.LEFT + charts.RIGHT) / 2, charts.RIGHT]
    (_, low, _), (_, middle, _), (_, high, told) = drawn["marks"]
    assert charts.TOP < high < middle < low < charts.BOTTOM and abs(low + high - 2 * middle) < 0.2
    assert told == "step 3: 10 nats"
    assert charts.draw("k", "t", "nats", [replace(line, points=[])]) is None
