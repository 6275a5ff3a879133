"""serve: the commands that serve base and adapter over an OpenAI-compatible API, by vLLM and by transformers itself."""

from __future__ import annotations

import shlex

from lowdft.files import read_json
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.systems import trained_folder

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


def main(run: Run) -> None:
    """Prints the commands.

    Raises:
        UserError: nothing is trained, or on another base.
    """
    folder = trained_folder(run)
    say("vLLM (model names: the base's, and tuned for the adapter):")
    say(f"  {shlex.join(vllm_command(run))}")
    if run.recipe.adapter and (read_json(folder / "adapter_config.json").get("modules_to_save") or []):
        say("  vLLM cannot serve this adapter's modules_to_save: merge it first (lowdft merge)")
    say('transformers (pip install "transformers[serving]"):')
    say(f"  {shlex.join(transformers_command(run))}")


def vllm_command(run: Run) -> list[str]:
    """`vllm serve`, with the adapter beside the base."""
    folder = trained_folder(run)
    template = folder / "chat_template.jinja"
    with_template = ["--chat-template", str(template)] if template.is_file() else []
    if run.recipe.adapter is None:
        return ["vllm", "serve", str(folder), "--served-model-name", "tuned", *with_template]
    rank = read_json(folder / "adapter_config.json")["r"]
    revision = ["--revision", run.source.revision] if run.source.revision else []
    quantized = ["--quantization", "bitsandbytes"] if run.recipe.model.load_in_4bit else []
    most = next((one for one in VLLM_RANKS if one >= rank), rank)
    return ["vllm", "serve", run.source.path, *revision, *quantized, "--enable-lora", "--max-lora-rank", str(most),
            "--lora-modules", f"tuned={folder}", *with_template]  # fmt: skip


def transformers_command(run: Run) -> list[str]:
    """`transformers serve`, which loads an adapter's base by itself."""
    quantized = run.recipe.adapter and run.recipe.model.load_in_4bit
    return ["transformers", "serve", str(trained_folder(run)), *(["--quantization", "bnb-4bit"] if quantized else [])]
