"""train: trains the adapter (or all parameters) -> checkpoints/, adapter/ (or model/), metrics.jsonl."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowdft import models
from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.files import digest_of, replacing
from lowdft.models.adapters import REFERENCE
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.live import LivePage, watch
from lowdft.pipeline.metrics_file import MetricsFile, mend
from lowdft.pipeline.publishable import clean
from lowdft.reporting import run_page
from lowdft.training.checkpoints import newest_whole
from lowdft.training.metrics import hardware
from lowdft.training.trainer import DFTTrainer


def main(run: Run) -> None:
    """Trains, or resumes from the newest intact checkpoint; saves the adapter (or the model) with its tokenizer."""
    product, metrics = run.training, run.folder / "metrics.jsonl"
    done = collectives.from_all(product.is_done())[0]
    checkpoint = newest_whole(run.args.output_dir)
    if done:
        if collectives.rank() == 0:
            mend(metrics, checkpoint, resuming=False)
        say(f"{product.path}: already trained")
        return
    if checkpoint and not product.manifest.is_file():
        raise UserError(
            f"{checkpoint}: cannot resume, because {product.manifest.name} is missing, which records what it was "
            f"trained from. Delete {run.args.output_dir} to train from the start, or choose another output_dir."
        )
    rows = run.encoded("train")
    if run.reference_from_file:
        rows = run.with_reference(rows)
    if cut := run.encoder.cuts():
        say(f"warning: {cut}")
    held_out = run.encoded("heldout") if run.args.eval_strategy != "no" else None
    model = run.base()
    if run.recipe.adapter and not run.args.reference_adapter:
        model = models.add_adapter(model, run.recipe.adapter, run.args.seed, rows)
    if collectives.rank() == 0:
        product.begin()
        mend(metrics, checkpoint, resuming=True)
    if checkpoint:
        say(f"resuming from {checkpoint}")
    lines = MetricsFile(metrics)
    callbacks = [lines, LivePage(run)]
    trainer = DFTTrainer(model, run.args, rows, held_out, processing_class=run.tokenizer, callbacks=callbacks)
    trainer.trust_checkpoint = run.trust_checkpoint
    watch(run, trainer, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    lines.flush()
    save(run, trainer, truncation=cut, hardware=hardware())


def save(run: Run, trainer: DFTTrainer, **facts) -> None:
    """Writes the trained adapter or model in publishable form, its manifest with these facts, and the report."""
    if collectives.rank() > 0:
        trainer.save_model()  # every rank sends its part to the first, which writes the whole
        return
    product, metrics = run.training, run.folder / "metrics.jsonl"
    with replacing(product.path) as temporary:
        trainer.save_model(str(temporary))
        shutil.rmtree(Path(temporary) / REFERENCE, ignore_errors=True)  # the frozen reference was not trained
        run.tokenizer.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty card; export writes one
        clean(temporary, models.public_name(run.source, run.recipe.model), run.source.revision)
    product.finish(
        steps=trainer.state.global_step,
        seconds=trainer.state.log_history[-1].get("train_runtime"),
        objective=run.args.hyperparameters(),
        metrics=digest_of(metrics) if metrics.is_file() else None,
        **facts,
    )
    if metrics.is_file():
        run_page.write(run, live="training is finished, the evaluation follows" if run.evaluation_follows else None)
    say(f"{product.path}: trained in {trainer.state.global_step} steps")
