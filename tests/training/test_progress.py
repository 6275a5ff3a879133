"""What is seen of a running training: trackers get numbers and the warning, sample answers change nothing."""

from __future__ import annotations

import json
import warnings

import pytest
from helpers import losses, make_rows, make_tokenizer, make_trainer

from lowdft.reporting import metrics
from lowdft.training.progress import TITLE, NegligibleNegatives, Progress, SampleAnswers


@pytest.fixture
def negligible(monkeypatch):
    """Every weight counts as negligible, so that the fifth log line warns."""
    monkeypatch.setattr(metrics, "NEGLIGIBLE", 100.0)


def test_tensorboard_gets_the_numbers_and_the_warning(tmp_path, monkeypatch, negligible):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(tmp_path, report_to="tensorboard")
    trainer.add_callback(NegligibleNegatives(trainer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    board = reader.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    logged = [one["margin"] for one in trainer.state.log_history if "margin" in one]
    assert [event.value for event in board.Scalars("train/margin")] == pytest.approx(logged)
    [event] = board.Tensors(f"{TITLE}/text_summary")
    assert event.step == 5 and b"contribute almost nothing" in event.tensor_proto.string_val[0]


def test_trackio_gets_the_numbers_and_an_alert(tmp_path, monkeypatch, negligible):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    seen = []
    monkeypatch.setattr(trackio, "alert", lambda **alert: seen.append(alert))
    trainer = make_trainer(tmp_path, num_train_epochs=2)
    trainer.add_callback(type("TrackioCallback", (Progress,), {})())  # a tracker is known by its name
    trainer.add_callback(NegligibleNegatives(trainer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    [alert] = seen
    assert alert["title"] == TITLE and alert["level"] == trackio.AlertLevel.WARN


def test_sample_answers_are_kept_and_change_nothing(tmp_path, capsys):
    tokenizer, rows = make_tokenizer(), make_rows()
    plain = make_trainer(tmp_path / "plain", layout="padded")
    plain.train()
    trainer = make_trainer(tmp_path / "shown", layout="padded")
    path = tmp_path / "samples.jsonl"
    trainer.add_callback(SampleAnswers(trainer, rows[:2], 3, path, tokenizer.decode, [2], max_new_tokens=5))
    trainer.train()
    assert losses(trainer) == losses(plain)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6] and all(len(line["answers"]) == 2 for line in lines)
    assert "step 3, answer 1: " in capsys.readouterr().out


def test_the_bar_shows_what_to_watch():
    class Bar:
        def set_postfix(self, shown):
            self.shown = shown

    progress = Progress()
    progress.training_bar = Bar()
    progress.on_log(
        None, None, None, logs={"loss": 1.25, "margin": 3.0, "weights/mean": 0.5, "tokens_per_second": 99.0}
    )
    assert progress.training_bar.shown == {"objective": "1.25", "margin": "3", "weight": "0.5", "tokens/s": "99"}
    progress.on_log(None, None, None, logs={"train_runtime": 1.0})
