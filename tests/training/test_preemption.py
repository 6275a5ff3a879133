"""SIGTERM: in training a checkpoint at the step's end, elsewhere an end at once; 143, words, and the same numbers."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from forked_ranks import run
from helpers import Preempt, folder, losses, make_rows, make_trainer, metrics
from transformers import TrainerCallback

from lowdft.cli import main
from lowdft.pipeline.stages import generate
from lowdft.training.preemption import Stopped


@pytest.mark.parametrize("objective", ["dft", "sft"])
def test_training_saves_at_the_steps_end(objective, tmp_path, capsys):
    """Told in the fourth of six steps: that step is finished, logged and saved; the rest has the very same numbers."""
    settings = dict(objective=objective, dropout=0.1, save_strategy="steps", save_steps=100, logging_steps=5)
    told = make_trainer(tmp_path / "told", **settings)
    told.add_callback(Preempt(3))
    with pytest.raises(Stopped) as stopped:
        told.train()
    assert stopped.value.code == 143
    assert "after step 4 of 6, which is saved" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "told").glob("checkpoint-*")] == ["checkpoint-4"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = make_trainer(tmp_path / "told", **settings)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert torch.equal(resumed.log_u, whole.log_u)
    for name, parameter in resumed.model.state_dict().items():
        assert torch.equal(parameter, whole.model.state_dict()[name]), name
    lines = [[(e["step"], e["loss"]) for e in t.state.log_history if "loss" in e] for t in (resumed, whole)]
    assert [step for step, _ in lines[0]] == [1, 4, 5, 6] and [step for step, _ in lines[1]] == [1, 5, 6]
    total = 3 * lines[0][1][1] + lines[0][2][1]
    assert total == pytest.approx(4 * lines[1][1][1], rel=1e-5)  # steps 2 to 5: no step lost or told twice


def test_after_the_last_step_it_is_passed_on(tmp_path):
    """Too late for a checkpoint of its own: whoever handled SIGTERM before gets it."""
    seen = []
    trainer = make_trainer(tmp_path)

    class Late(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            signal.raise_signal(signal.SIGTERM)

    trainer.add_callback(Late())
    old = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, old)
    assert seen == [1] and len(losses(trainer)) == 6


def test_command_goes_on_after_each_stage_was_stopped(recipe, monkeypatch, capsys):  # noqa: F811
    """SIGTERM in generation and in training: 143, words, no traceback; the third command's end is the usual one."""
    assert main(["run", recipe, f"output_dir={folder(recipe)}2"]) == 0
    capsys.readouterr()
    original, calls = generate.write_negatives, []

    def told(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(generate, "write_negatives", told)
    assert main(["run", recipe]) == 143
    assert "run the same command again to resume" in capsys.readouterr().err
    assert len(list((folder(recipe) / "negatives.parts").iterdir())) == 2
    from lowdft.training.log_u import LogU

    update, updates = LogU.update, []

    def told_in_a_step(self, *args):
        updates.append(1)
        if len(updates) == 4:
            signal.raise_signal(signal.SIGTERM)
        update(self, *args)

    monkeypatch.setattr(LogU, "update", told_in_a_step)
    assert main(["run", recipe, "training.save_steps=50"]) == 143
    out = capsys.readouterr()
    assert "after step 4 of 6, which is saved" in out.err and "Traceback" not in out.err
    assert main(["run", recipe]) == 0
    tables = [pq.read_table(f"{folder(recipe)}{n}/negatives.parquet").to_pylist() for n in ("", "2")]
    assert tables[0] == tables[1]
    whole = Path(f"{folder(recipe)}2") / "metrics.jsonl"
    assert metrics(recipe) == [
        {k: line[k] for k in ("step", "loss", "log_u/mean")} for line in map(json.loads, whole.open())
    ]


SCRIPT = """
import sys
from helpers import Preempt, make_rows, make_trainer
from torch import distributed
trainer = make_trainer(
    sys.argv[1], make_rows(8), per_device_train_batch_size=1, save_strategy="steps", ddp_backend="gloo"
)
if trainer.args.process_index == 1:
    trainer.add_callback(Preempt(1))
try:
    trainer.train()
finally:
    distributed.destroy_process_group()  # without this gloo's threads may abort the process at its end
"""


def test_one_rank_is_told_and_all_save(tmp_path):
    """SIGTERM on the second of two ranks: both end after the same step, and one process resumes from there."""
    (tmp_path / "script.py").write_text(SCRIPT)
    wrote = run(tmp_path / "script.py", 2, str(tmp_path / "run"), status=143)
    assert wrote.count("after step 2 of 4, which is saved") == 1, wrote
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed, whole = (
        make_trainer(tmp_path / name, make_rows(8), per_device_train_batch_size=2) for name in ("run", "whole")
    )
    resumed.train(resume_from_checkpoint=True), whole.train()
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-4)
    torch.testing.assert_close(resumed.log_u, whole.log_u, rtol=1e-3, atol=1e-4)
