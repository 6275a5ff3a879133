"""train: adapters on the 4-bit base learn to tell answers from negatives -> checkpoints/, adapter/, metrics.jsonl."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from lowdft import models
from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.files import replacing, write_text
from lowdft.models.adapters import REFERENCE
from lowdft.pipeline.context import Run, say
from lowdft.training.trainer import DFTTrainer


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
    if cut := run.encoder.cuts():
        say(f"warning: {cut}")
    model = run.base()
    if run.recipe.adapter and not run.args.reference_adapter:
        model = models.add_adapter(model, run.recipe.adapter, run.args.seed)
    metrics = run.folder / "metrics.jsonl"
    if collectives.rank() == 0:
        product.begin()
        keep_until(metrics, _step_of(checkpoint))
    if checkpoint:
        say(f"going on from {checkpoint}")
    trainer = DFTTrainer(model, run.args, rows, processing_class=run.tokenizer, callbacks=[MetricsFile(metrics)])
    if not run.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress())
    trainer.train(resume_from_checkpoint=checkpoint)
    if collectives.rank() > 0:
        trainer.save_model()  # gives its part to the first rank, which writes the whole
        return
    with replacing(product.path) as temporary:
        trainer.save_model(str(temporary))
        shutil.rmtree(Path(temporary) / REFERENCE, ignore_errors=True)  # the frozen reference is not what was trained
        run.tokenizer.save_pretrained(temporary)
    seconds = trainer.state.log_history[-1].get("train_runtime")
    product.finish(steps=trainer.state.global_step, seconds=seconds, objective=run.args.hyperparameters())
    say(f"{product.path}: trained in {trainer.state.global_step} steps")


class Progress(ProgressCallback):
    """transformers' bar with the numbers to watch beside it, in place of a dictionary a step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows the last step's loss, margin and weights."""
        shown = {"loss": "loss", "margin": "margin", "weights/mean": "weight"}
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix({shown[k]: f"{logs[k]:.3g}" for k in shown if k in logs})


class MetricsFile(TrainerCallback):
    """Appends every log line to metrics.jsonl; the file survives a kill and is cut back to the checkpoint on resume."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One JSON line a log."""
        if state.is_world_process_zero and "loss" in (logs or {}):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


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
