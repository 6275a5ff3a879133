"""What is shown during training: the progress bar, sample answers, warnings at trackers, and the live report."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

from transformers import ProgressCallback, TrainerCallback

from lowdft.distributed import collectives
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.metrics_file import mend
from lowdft.reporting import run_page
from lowdft.training.progress import NegligibleNegatives, Progress, SampleAnswers
from lowdft.training.trainer import DFTTrainer

WATCHED = 3  # prompts that are answered during training


def watch(run: Run, trainer: DFTTrainer, checkpoint: str | None) -> None:
    """Adds the callbacks for people and trackers to a training run that resumes from `checkpoint`."""
    if not run.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress())
    trainer.add_callback(NegligibleNegatives(trainer))
    if "tensorboard" in run.args.report_to:
        say(f"TensorBoard: tensorboard --logdir {board_folder(run)}")
    section, path = run.recipe.evaluation, run.folder / "samples.jsonl"
    if not section.samples_every:
        return
    if trainer.sharded:
        say("warning: evaluation.samples_every has no effect if the model is sharded; use --launch ddp")
        return
    split = "heldout" if run.examples("heldout") else "train"
    encoded = run.encoded(split, with_negatives=False)
    rows = [encoded[i] for i in range(min(WATCHED, len(encoded)))]
    if collectives.rank() == 0:
        mend(path, checkpoint, resuming=True, log=False)
    encoder = run.encoder
    trainer.add_callback(
        SampleAnswers(trainer, rows, section.samples_every, path, encoder.text, encoder.end_ids, section.max_new_tokens)
    )


def board_folder(run: Run) -> Path:
    """Where transformers' callback writes TensorBoard's files."""
    return Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or Path(run.args.output_dir) / "runs").expanduser()


class LivePage(TrainerCallback):
    """Keeps the run folder's report.html up to date during training; a failure here never stops training."""

    def __init__(self, run: Run):
        self.run, self.written, self.failed = run, 0.0, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Writes the page, at most once per interval in which it reloads itself."""
        due = time.monotonic() - self.written >= run_page.REFRESH
        if not (state.is_world_process_zero and "loss" in (logs or {}) and due) or self.failed:
            return
        try:
            run_page.write(self.run, live=f"training is running, step {state.global_step} of {state.max_steps}")
        except Exception as error:
            self.failed = True
            warnings.warn(f"report.html is not kept up to date: {error}", stacklevel=2)
        self.written = time.monotonic()
