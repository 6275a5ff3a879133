"""serve: the commands that serve base and adapter over an OpenAI-compatible API, by vLLM and by transformers itself."""

from __future__ import annotations

import shlex

from lowdft.errors import UserError
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.systems import trained_folder
from lowdft.sampling.vllm import served_rank


def main(run: Run) -> None:
    """Prints the commands.

    Raises:
        UserError: nothing is trained, or on another base.
    """
    say("vLLM (model names: the base's, and tuned for the adapter):")
    try:
        say(f"  {shlex.join(vllm_command(run))}")
    except UserError as error:
        say(f"  {error}")
    say('transformers (pip install "transformers[serving]"):')
    say(f"  {shlex.join(transformers_command(run))}")


def vllm_command(run: Run) -> list[str]:
    """`vllm serve`, with the adapter beside the base."""
    folder = trained_folder(run)
    template = folder / "chat_template.jinja"
    with_template = ["--chat-template", str(template)] if template.is_file() else []
    if run.recipe.adapter is None:
        return ["vllm", "serve", str(folder), "--served-model-name", "tuned", *with_template]
    revision = ["--revision", run.source.revision] if run.source.revision else []
    quantized = ["--quantization", "bitsandbytes"] if run.recipe.model.load_in_4bit else []
    adapter = ["--enable-lora", "--max-lora-rank", str(served_rank(folder)), "--lora-modules", f"tuned={folder}"]
    return ["vllm", "serve", run.source.path, *revision, *quantized, *adapter, *with_template]


def transformers_command(run: Run) -> list[str]:
    """`transformers serve`, which loads an adapter's base by itself."""
    quantized = run.recipe.adapter and run.recipe.model.load_in_4bit
    return ["transformers", "serve", str(trained_folder(run)), *(["--quantization", "bnb-4bit"] if quantized else [])]
