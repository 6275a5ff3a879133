"""Interrupted trainings: resumed, killed, refused."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TESTS, lora, losses, make_llama, make_rows, make_trainer

from lowdft import DFTTrainer
from lowdft.errors import UserError


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("objective", ["dft", "dft2"])
def test_resume_gives_the_same_numbers(objective, peft, tmp_path):
    """Stopped after each of its six steps and resumed, with dropout: bit-equal losses and log_u (float32, CPU)."""
    settings = dict(
        objective=objective, peft=peft, dropout=0.1, save_strategy="steps", save_steps=1, num_train_epochs=2
    )
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert len(losses(whole)) == 6
    for stop in (1, 3, 5):
        resumed = make_trainer(tmp_path / f"resumed-{stop}-{peft}", **settings)
        resumed.train(resume_from_checkpoint=str(_with_reference(tmp_path, stop, peft)))
        assert losses(resumed) == losses(whole)
        assert torch.equal(resumed.log_u, whole.log_u)


def _with_reference(tmp_path: Path, stop: int, peft: bool) -> Path:
    """A resumed training reads the reference of its initial weights from its own folder."""
    target = tmp_path / f"resumed-{stop}-{peft}"
    target.mkdir(exist_ok=True)
    source = tmp_path / "whole" / "reference.safetensors"
    if source.is_file():
        (target / source.name).write_bytes(source.read_bytes())
    return tmp_path / "whole" / f"checkpoint-{stop}"


@pytest.mark.parametrize("steps", [3, 4])
def test_a_finished_training_takes_no_further_step(steps, tmp_path):
    """As after a kill between the last checkpoint and the end; max_steps in the middle and at the end of an epoch."""
    settings = dict(save_strategy="steps", save_steps=1, max_steps=steps, lr_scheduler_type="constant")
    rows = make_rows(8)  # two steps per epoch
    whole = make_trainer(tmp_path, rows, **settings)
    whole.train()
    again = make_trainer(tmp_path, rows, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps and again.state.epoch == whole.state.epoch
    assert losses(again) == losses(whole) and torch.equal(again.log_u, whole.log_u)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_resume_on_another_base_is_refused(tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, max_steps=2)
    make_trainer(tmp_path, **settings).train()
    other = DFTTrainer(make_llama(seed=9), make_trainer(tmp_path, **settings).args, make_rows(), peft_config=lora())
    with pytest.raises(UserError, match="belongs to another run .base was .*, is now "):
        other.train(resume_from_checkpoint=True)


KILLED = """
import sys; sys.path.insert(0, {tests!r})
from helpers import make_trainer
import os, signal
from transformers import TrainerCallback
trainer = make_trainer({folder!r}, objective={objective!r}, dropout=0.1, save_strategy="steps", save_steps=1)
class Kill(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 4: os.kill(os.getpid(), signal.SIGKILL)
trainer.add_callback(Kill())
trainer.train()
"""


@pytest.mark.parametrize("objective", ["dft", "dft2"])
def test_killed_in_the_middle_of_a_step(objective, tmp_path):
    """SIGKILL between two micro-batches; the resumed run has the uninterrupted run's very losses and log_u."""
    code = KILLED.format(tests=str(TESTS), folder=str(tmp_path / "killed"), objective=objective)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    settings = dict(objective=objective, dropout=0.1, save_strategy="steps", save_steps=1)
    resumed = make_trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert losses(resumed) == losses(whole)
    assert torch.equal(resumed.log_u, whole.log_u)


def test_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    """A disk that fills up while log_u is written leaves no checkpoint folder behind, and says so in words."""
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowdft.training.trainer.save_table", full)
    with pytest.raises(UserError, match="No space left on device"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == []
    assert not (tmp_path / ".partial").exists()


def test_resume_with_other_settings_is_refused(tmp_path):
    """Those that would change the order of rows, and those whose old value the checkpoint would bring back unsaid."""
    saved = dict(save_strategy="steps", save_steps=1, max_steps=1)
    make_trainer(tmp_path, **saved).train()
    for name, was, now in (
        ("tau", "1.0", 0.5),
        ("seed", "42", 7),
        ("data_seed", "None", 7),
        ("train_sampling_strategy", "random", "sequential"),
        ("dataloader_drop_last", "False", True),
        ("learning_rate", "0.01", 0.02),
        ("lr_scheduler_type", "cosine", "linear"),
        ("weight_decay", "0.0", 0.1),
    ):
        with pytest.raises(UserError, match=rf"another run \({name} was {was}, is now {now}\)"):
            make_trainer(tmp_path, **(saved | {name: now})).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match=r"another run \(adapter was \{.*'lora_dropout': 0.5"):
        make_trainer(tmp_path, dropout=0.5, **saved).train(resume_from_checkpoint=True)
    split = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=2)
    make_trainer(tmp_path, **(saved | split)).train(resume_from_checkpoint=True)  # the same steps in other portions


@pytest.mark.parametrize("strategy, checks", [("steps", 2), ("no", 1)])
def test_weights_are_checked_once_for_every_step_that_is_saved(strategy, checks, tmp_path, monkeypatch):
    trainer, seen = make_trainer(tmp_path, save_strategy=strategy, save_steps=1, max_steps=2), []
    check = trainer.engine.check_weights
    monkeypatch.setattr(trainer.engine, "check_weights", lambda: (seen.append(trainer.state.global_step), check()))
    trainer.train()
    assert seen == [1, 2][-checks:]
