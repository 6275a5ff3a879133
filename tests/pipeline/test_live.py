"""Trackers during a real training by `lowdft run`: what their own readers find, and what is said if one is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, folder

from lowdft.cli import main
from lowdft.reporting import run_page

KEYS = {"train/" + key: key for key in ("loss", "margin", "weights/mean", "tokens_per_second")}
FADING = "their mean weight has been below 0.01 for 5 log lines"
READ_TRACKIO = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
[run] = trackio.Api().runs("lowdft")
print(json.dumps([run.name, SQLiteStorage.get_logs("lowdft", run.name), run.alerts()]))
"""


@pytest.fixture
def fading(recipe):
    """Arguments of a training of all parameters, whose easy negatives soon contribute almost nothing."""
    rows = [{"prompt": f"{i}?", "completion": f"yes{i % 10}", "negatives": [f"no no{i % 7}", f"never {i % 3}"]}
            for i in range(35)]  # fmt: skip
    Path(recipe).with_name("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"objective": "listwise", "negatives_per_step": 2, "learning_rate": 1e-2, "num_train_epochs": 5,
                "per_device_train_batch_size": 8, "save_steps": 20}  # fmt: skip
    chosen = [f"training.{key}={value}" for key, value in settings.items()]
    return [recipe, "adapter=null", "evaluation.samples_every=10", "evaluation.answer=none", *chosen]


def logged(recipe: str) -> list[dict]:
    return [json.loads(line) for line in (folder(recipe) / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_the_numbers_the_answers_and_the_warning(fading, capsys):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main(["run", *fading, "training.report_to=tensorboard"]) == 0
    runs = folder(fading[0]) / "checkpoints" / "runs"
    assert f"tensorboard --logdir {runs}\n" in capsys.readouterr().out
    board, lines = reader.EventAccumulator(str(next(runs.iterdir()))), logged(fading[0])
    board.Reload()
    for name, key in KEYS.items():
        found = {event.step: event.value for event in board.Scalars(name)}
        assert found == pytest.approx({line["step"]: line[key] for line in lines}) and len(found) == 20
    texts = {tag: board.Tensors(tag) for tag in board.Tags()["tensors"]}
    assert [event.step for event in texts["sample answers/text_summary"]] == [10, 20]
    [warning] = texts["negatives contribute almost nothing/text_summary"]
    assert FADING.encode() in warning.tensor_proto.string_val[0]


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="pip install trackio")
def test_trackio_has_the_numbers_the_answers_and_the_warning(fading, tmp_path):
    """In processes of their own, because trackio reads TRACKIO_DIR once."""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}

    def python(*arguments: str) -> str:
        line = [sys.executable, *arguments]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = python("-m", "lowdft", "run", *fading, "training.report_to=trackio")
    assert 'trackio show --project "lowdft"' in out
    name, logs, alerts = json.loads(python("-c", READ_TRACKIO).splitlines()[-1])
    assert name.startswith("run ")  # the run folder's name
    steps = {line["train/global_step"]: line for line in logs if "train/loss" in line}
    assert [[steps[line["step"]][name] for name in KEYS] for line in logged(fading[0])] == [
        [line[key] for key in KEYS.values()] for line in logged(fading[0])
    ]
    answers = sorted(alert["text"].split(":")[0] for alert in alerts if alert["title"] == "sample answers")
    assert answers == ["step 10", "step 20"]
    [warning] = [alert for alert in alerts if alert["level"] == "warn"]
    assert FADING in warning["text"] and warning["text"].startswith("step ")
    assert "TRACKIO INFO" not in out and "step 10, answer 1: " in out  # the terminal has each text once


@pytest.mark.parametrize("name, words", [
    ("tensorbord", "training.report_to is 'tensorbord', which transformers does not know. Did you mean 'tensorboard'?"),
    ("neptune", "training.report_to has neptune, whose package is not installed"),
])  # fmt: skip
def test_a_tracker_that_is_missing_is_told_before_anything_is_made(recipe, capsys, name, words):
    assert main(["run", recipe, f"training.report_to={name}"]) == 1
    assert words in capsys.readouterr().err
    assert not list(folder(recipe).glob("negatives*"))


def test_a_trained_run_needs_no_tracker(recipe, capsys):
    """A run folder that was copied to a machine without the tracker."""
    assert main(["run", recipe]) == 0
    assert main(["evaluate", recipe, "training.report_to=neptune"]) == 0


def test_the_page_reloads_itself_until_the_report_is_complete(recipe, monkeypatch):
    """Nine rows in batches of four, twice; `train` alone is complete when training is."""
    pages, render = [], run_page.render
    monkeypatch.setattr(run_page, "render", lambda **values: pages.append(values["live"]) or render(**values))
    monkeypatch.setattr(run_page, "REFRESH", 0)
    assert main(["run", recipe]) == 0
    steps = [f"training is running, step {step} of 6" for step in range(1, 7)]
    shown = [live and live.split(": ", 1)[1] for live in pages]
    assert shown == [*steps, "training is finished, the evaluation follows", None]
    pages.clear()
    assert main(["train", recipe, f"output_dir={folder(recipe)}-alone", "training.objective=sft"]) == 0
    assert len(pages) == 7 and pages[-1] is None
