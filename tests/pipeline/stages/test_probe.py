"""`lowdft probe` and the classification recipe on a tiny model, from the command line."""

from __future__ import annotations

import json

import pytest
from helpers import ROOT

from lowdft.cli import main


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """The classification recipe on a toy: is a number even or odd? 40 rows, 16 of them held out."""
    rows = [{"text": f"{n}", "label": ("even", "odd")[n % 2]} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"extends: {ROOT}/recipes/classification.yaml\n"
        f"output_dir: {tmp_path}/run\n"
        f"model: {{name_or_path: {tiny_folder}, dtype: float32}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl, eval_rows: 16}}\n"
        "adapter: {r: 2}\n"
        "training: {num_train_epochs: 1, use_cpu: true}\n"
    )
    return str(tmp_path / "recipe.yaml")


def test_classification(recipe, tmp_path, capsys):
    """The other label is the negative of every row, so chance is a half; nothing is generated."""
    assert main(["run", recipe]) == 0
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["negatives_per_row"] == 1
    assert set(evaluation["per_row"]["after"]["wins"]) <= {0.0, 1.0} and evaluation["rows"] == 16
    told = capsys.readouterr().out
    assert "labels: even, odd" in told and "accuracy of choice" in told
    assert not (tmp_path / "run" / "negatives.parquet").exists()


def test_probe_of_ready_negatives(recipe, tmp_path, capsys):
    assert main(["probe", recipe, "--rows", "16"]) == 0
    found = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert found["rows"] == [16, 16] and found["negatives"] == 1 and found["objective"] in found["gains"]
    assert set(found["gains"]) == {"sft", "listwise", "dft"} and "coverage" not in found
    assert "verdict: " in capsys.readouterr().out


def test_probe_of_sampled_negatives(recipe, tmp_path, capsys):
    """Eight are written for every row under the base; the recipe's own objective is tested too."""
    more = ["data.labels=null", "negatives.max_new_tokens=3", "training.objective=simpo", "negatives.strategy=direct"]
    assert main(["probe", recipe, "--rows", "16", *more]) == 0
    found = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert found["negatives"] == 8 and 0 <= found["coverage"] <= 1 and "simpo" in found["gains"]


def test_too_few_rows_are_told(recipe, capsys):
    assert main(["probe", recipe, "data.eval_rows=10"]) == 1
    assert "10 held-out rows are too few for a probe; wanted 16 of each" in capsys.readouterr().err
