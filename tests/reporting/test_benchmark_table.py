"""Benchmarks as tables: percent with errors, leads over the base, and a study's lines."""

from __future__ import annotations

import pytest

from lowdft.reporting.benchmark_table import cells, notes, of_study


def result(after: float, paired: bool = True, stderr: float | None = 0.01, tasks=("gsm8k", "boolq")) -> dict:
    ahead = {"value": after - 0.5, "stderr": stderr, "paired": paired}
    systems = {"base": {"value": 0.5, "stderr": 0.02}, "after": {"value": after, "stderr": 0.02, "ahead": ahead}}
    one = {"metric": "exact_match,strict-match", "shots": 5, "chat_template": False, "rows": 1319, "systems": systems}
    return {
        "harness": "lm-eval 0.4.13", "limit": None, "tasks": dict.fromkeys(tasks, one),
        "mean": {"base": 0.5, "after": after},
    }  # fmt: skip


def test_cells_are_percent_with_errors():
    header, rows = cells(result(0.625))
    assert header == ["", "base", "after", "after ahead", "rows"]
    assert rows[0] == [
        "GSM8K, 5-shot, exact_match,strict-match", "50.00 ± 2.00", "62.50 ± 2.00", "+12.50 ± 1.00", "1,319",
    ]  # fmt: skip
    assert rows[1][0].startswith("boolq") and rows[2] == ["mean", "50.00", "62.50", "+12.50", ""]
    assert cells(result(0.5, stderr=None, tasks=("gsm8k",)))[1][0][3] == "+0.00"


@pytest.mark.parametrize("paired", [True, False])
def test_notes_say_when_differences_are_paired(paired):
    assert ("paired" in notes(result(0.6, paired))) == paired
    assert "first 20 rows" in notes(result(0.6) | {"limit": 20})


def test_lines_of_a_study():
    text = of_study([("sft", result(0.6)), ("dft", result(0.7)), ("dft", result(0.75))])
    lines = text.splitlines()
    assert lines[0] == "|  | GSM8K | boolq | mean |" and lines[2] == "| base | 50.00 | 50.00 | 50.00 |"
    assert lines[3].startswith("| sft | 60.00 ± 2.00 (+10.00 ± 1.00) |")
    assert lines[4].startswith("| dft | 72.50 ± 3.54 (+22.50 ± 1.00) |") and lines[4].endswith("| 72.50 |")
