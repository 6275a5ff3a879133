"""serve: base and adapter with an OpenAI-compatible API, by vLLM (command printed) or transformers' server (started).

transformers' server loads complete models and no adapters, so it serves a merged model, or one with all parameters
trained.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from transformers.utils.import_utils import is_serve_available

from lowdft.errors import UserError
from lowdft.models.merge import WAYS
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.systems import trained_folder
from lowdft.sampling.vllm import served_rank


def main(run: Run) -> None:
    """Prints the commands. If there is a complete model and transformers' server is installed, runs it until stopped.

    Raises:
        UserError: no model was trained, or it has another base, or the server failed.
    """
    say("vLLM (the model names are the base's name, and tuned for the adapter):")
    try:
        say(f"  {shlex.join(vllm_command(run))}")
    except UserError as error:
        say(f"  {error}")
    model = whole_model(run)
    if model is None:
        say(f"transformers' server loads no adapters: run `lowdft merge {run.folder}`, then this command starts it")
        return
    arguments = transformers_arguments(run, model)
    if not is_serve_available():
        say('transformers (pip install "transformers[serving]", then this command starts it):')
        say(f"  {shlex.join(['transformers', *arguments])}")
        return
    say(f"transformers serves {model} at http://localhost:8000/v1 until Ctrl-C:")
    say(f"  {shlex.join(['transformers', *arguments])}")
    ended = subprocess.run([sys.executable, "-m", "transformers.cli.transformers", *arguments]).returncode
    if ended > 0:
        raise UserError(f"transformers serve ended with status {ended}; its messages are above")


def whole_model(run: Run) -> Path | None:
    """The folder of a complete model: one with all parameters trained, or a merged one."""
    if run.recipe.adapter is None:
        return trained_folder(run)
    return next((folder for way in WAYS if (folder := run.folder / f"merged-{way}").is_dir()), None)


def vllm_command(run: Run) -> list[str]:
    """The arguments of `vllm serve`, with the adapter next to the base."""
    folder = trained_folder(run)
    template = folder / "chat_template.jinja"
    with_template = ["--chat-template", str(template)] if template.is_file() else []
    if run.recipe.adapter is None:
        return ["vllm", "serve", str(folder), "--served-model-name", "tuned", *with_template]
    revision = ["--revision", run.source.revision] if run.source.revision else []
    quantized = ["--quantization", "bitsandbytes"] if run.recipe.model.load_in_4bit else []
    adapter = ["--enable-lora", "--max-lora-rank", str(served_rank(folder)), "--lora-modules", f"tuned={folder}"]
    return ["vllm", "serve", run.source.path, *revision, *quantized, *adapter, *with_template]


def transformers_arguments(run: Run, model: Path) -> list[str]:
    """The arguments of `transformers serve`, in the dtype of the run."""
    return ["serve", str(model), "--dtype", run.recipe.model.dtype]
