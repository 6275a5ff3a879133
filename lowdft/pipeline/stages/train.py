"""train: adapters on the 4-bit base learn to tell answers from negatives -> checkpoints/, adapter/, metrics.jsonl."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from functools import partial
from pathlib import Path

from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from lowdft import models
from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.files import replacing, write_text
from lowdft.models.adapters import REFERENCE
from lowdft.pipeline.context import Run, say
from lowdft.reporting import run_page
from lowdft.training.metrics import hardware
from lowdft.training.progress import NegligibleNegatives, Progress, SampleAnswers
from lowdft.training.trainer import DFTTrainer

WATCHED = 3  # prompts that are answered while training


def main(run: Run) -> None:
    """Trains, or goes on from the last whole checkpoint; saves the adapter (or the model) with its tokenizer."""
    product = run.training
    if collectives.from_all(product.is_done())[0]:
        say(f"{product.path}: already trained")
        return
    checkpoint = get_last_checkpoint(run.args.output_dir) if Path(run.args.output_dir).is_dir() else None
    if checkpoint and not product.manifest.is_file():
        raise UserError(
            f"{checkpoint}: no {product.manifest.name} says what it was trained from: it cannot be gone on from. "
            f"Delete {run.args.output_dir} to train anew, or choose another output_dir."
        )
    rows = run.encoded("train")
    if run.reference_from_file:
        rows = run.with_reference(rows)
    if cut := run.encoder.truncation.words(run.args.max_length, run.args.max_prompt_length):
        say(f"warning: {cut}")
    model = run.base()
    if run.recipe.adapter and not run.args.reference_adapter:
        model = models.add_adapter(model, run.recipe.adapter, run.args.seed)
    metrics, machines = run.folder / "metrics.jsonl", hardware()
    if collectives.rank() == 0:
        product.begin()
        keep_until(metrics, _step_of(checkpoint))
    if checkpoint:
        say(f"going on from {checkpoint}")
    shown = [MetricsFile(metrics), LivePage(run)]
    trainer = DFTTrainer(model, run.args, rows, processing_class=run.tokenizer, callbacks=shown)
    watch(run, trainer, _step_of(checkpoint))
    trainer.train(resume_from_checkpoint=checkpoint)
    if collectives.rank() > 0:
        trainer.save_model()  # gives its part to the first rank, which writes the whole
        return
    with replacing(product.path) as temporary:
        trainer.save_model(str(temporary))
        shutil.rmtree(Path(temporary) / REFERENCE, ignore_errors=True)  # the frozen reference is not what was trained
        run.tokenizer.save_pretrained(temporary)
    seconds = trainer.state.log_history[-1].get("train_runtime")
    product.finish(
        steps=trainer.state.global_step,
        seconds=seconds,
        objective=run.args.hyperparameters(),
        hardware=machines,
        truncation=cut,
    )
    run_page.write(run)
    say(f"{product.path}: trained in {trainer.state.global_step} steps")


def watch(run: Run, trainer: DFTTrainer, step: int) -> None:
    """Adds what people and trackers see of the training, which resumes after `step`."""
    if not run.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress())
    trainer.add_callback(NegligibleNegatives(trainer))
    section, path = run.recipe.evaluation, run.folder / "samples.jsonl"
    if not section.samples_every:
        return
    if trainer.sharded:
        say("warning: evaluation.samples_every does nothing where the model is sharded; use --launch ddp")
        return
    split = "heldout" if run.examples("heldout") else "train"
    rows = run.encoded(split, with_negatives=False)[:WATCHED]
    if collectives.rank() == 0:
        keep_until(path, step)
    decode = partial(run.tokenizer.decode, skip_special_tokens=True)
    ends = models.end_ids(run.tokenizer, trainer.model)
    trainer.add_callback(
        SampleAnswers(trainer, rows, section.samples_every, path, decode, ends, section.max_new_tokens)
    )


class LivePage(TrainerCallback):
    """Keeps the run folder's report.html up to date while training runs; what fails there never stops the training."""

    def __init__(self, run: Run):
        self.run, self.written, self.failed = run, 0.0, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Writes the page, at most once in the time after which it reloads itself."""
        due = time.monotonic() - self.written >= run_page.REFRESH
        if not (state.is_world_process_zero and "loss" in (logs or {}) and due) or self.failed:
            return
        try:
            run_page.write(self.run, running=True)
        except Exception as error:
            self.failed = True
            warnings.warn(f"report.html is not kept up to date: {error}", stacklevel=2)
        self.written = time.monotonic()


class MetricsFile(TrainerCallback):
    """Appends every log line to metrics.jsonl; the file survives a kill and is cut back to the checkpoint on resume.

    `seconds` in a line counts from the beginning of its session.
    """

    def __init__(self, path: Path):
        self.path, self.began = path, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the clock."""
        self.began = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One JSON line a log."""
        if state.is_world_process_zero and "loss" in (logs or {}):
            with open(self.path, "a", encoding="utf-8") as file:
                seconds = round(time.monotonic() - self.began, 3)
                file.write(json.dumps({"step": state.global_step, **logs, "seconds": seconds}) + "\n")


def keep_until(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`: they will be made again. A line cut off by a kill goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    write_text(path, "".join(kept))


def _step_of(checkpoint: str | None) -> int:
    return int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
