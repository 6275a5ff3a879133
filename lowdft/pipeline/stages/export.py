"""export: prepares the adapter (or model) in the run folder for publishing; --push uploads it to the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from lowdft import models
from lowdft.errors import UserError
from lowdft.files import replacing, write_text
from lowdft.pipeline import hub
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.publishable import clean
from lowdft.reporting import eval_results, model_card

RESULTS = ".eval_results/lowdft.yaml"


def main(
    run: Run,
    push: str | None = None,
    dry_run: bool = False,
    merged: str | None = None,
    extrapolate: float | None = None,
) -> None:
    """Cleans configuration files, writes README.md and evaluation results, and uploads to `push` if it is given.

    `dry_run` writes and uploads nothing, but shows the files with their sizes, the card, and what is missing. `merged`,
    "bf16" or "dequantized", exports the model that `lowdft merge` wrote instead of the adapter.

    Raises:
        UserError: no model was trained, a file would leak a secret or a local path, or the upload failed.
    """
    folder = _folder(run, merged)
    if extrapolate is not None:
        if dry_run or merged:
            raise UserError("--extrapolate writes an adapter; run it without --dry-run and --merged")
        folder = extrapolated(run, folder, extrapolate)
    card = model_card.card(run, push, extrapolate, merged is not None)
    results = eval_results.text(run)
    if dry_run:
        show(run, folder, str(card), results, push)
        return
    clean(folder, models.public_name(run.source, run.recipe.model), run.source.revision)
    write_text(folder / "README.md", str(card))
    if results:
        write_text(folder / RESULTS, results)
    files, left = hub.select(folder)
    for line in (line for file in files for line in file.leaks()):
        say(f"warning: {folder}: {line}; --push would stop here")
    say(f"{folder}: ready to publish, with README.md")
    if not push:
        name = run.recipe.export.push or "NAME"
        say(f"nothing was uploaded; to upload it: lowdft export {run.folder} --push {name}")
        say(f"to talk to it: lowdft chat {run.folder}")
        return
    say(f"uploading to {push}:\n{hub.listing(files)}")
    if left:
        say(f"not uploaded: {', '.join(left)}")
    say(f"pushed to {hub.push(files, push, run.recipe.export.private)}; the uploaded files are identical")


def show(run: Run, folder: Path, card: str, results: str | None, push: str | None) -> None:
    """Prints what would be uploaded, the card, and what is missing."""
    files, left = hub.select(folder)
    made = {"README.md": card, **({RESULTS: results} if results else {})}
    files = [file for file in files if file.name not in made]
    files += [hub.Upload(name, text.encode()) for name, text in made.items()]
    say(f"--push {push or 'NAME'} would upload:\n{hub.listing(files)}")
    if left:
        say(f"not uploaded: {', '.join(left)}")
    for line in (line for file in files for line in file.leaks()):
        say(f"would stop the upload: {line}")  # configuration files are cleaned by export itself
    for line in model_card.missing(run):
        say(f"missing: {line}")
    say(f"the card:\n\n{card}")


def _folder(run: Run, merged: str | None) -> Path:
    if merged:
        folder = run.folder / f"merged-{merged}"
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no merged model; run `lowdft merge {run.folder} --into {merged}` first")
        return folder
    if not run.training.is_done():
        raise UserError(
            f"{run.training.path} does not exist yet; run `lowdft train RECIPE` first, or `lowdft run RECIPE`"
        )
    return run.training.path


def extrapolated(run: Run, folder: Path, by: float) -> Path:
    """Writes a copy of the adapter, scaled by 1 + by: theta1 + by (theta1 - theta0).

    This is exact for LoRA, which is linear in B ("Model Extrapolation", ExPO, which uses 0.3 to 0.5).

    Raises:
        UserError: there is no LoRA adapter, or training did not start from a new one.
    """
    if run.recipe.adapter is None or run.args.reference_adapter:
        raise UserError("--extrapolate needs a LoRA adapter that was trained from scratch; this run has none")
    target = folder.with_name(f"{folder.name}-extrapolated")
    with replacing(target) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        weights = load_file(folder / "adapter_model.safetensors")
        scaled = {k: v * (1 + by) if "lora_B" in k else v for k, v in weights.items()}
        save_file(scaled, Path(temporary) / "adapter_model.safetensors", metadata={"format": "pt"})
    return target
