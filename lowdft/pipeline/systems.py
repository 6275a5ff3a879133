"""The models of a run for evaluation, benchmarks and chat: the base, the trained model, and compared ones."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from lowdft import models
from lowdft.errors import UserError
from lowdft.models.adapters import adapter_digest
from lowdft.models.reference import reference_on
from lowdft.pipeline.artifact import Product
from lowdft.pipeline.context import Run
from lowdft.pipeline.identity import adapter_folder
from lowdft.sampling import Request, SamplingSettings, get_sampler


def trained_folder(run: Run) -> Path:
    """The trained adapter or model of the run.

    Raises:
        UserError: nothing is trained yet, it was trained on another base than the recipe's, or it is damaged.
    """
    folder = run.folder / ("adapter" if run.recipe.adapter else "model")  # without reading any data
    if not folder.exists():
        raise UserError(f"{folder} does not exist yet; run `lowdft train RECIPE` first, or `lowdft run RECIPE`")
    require_as_trained(run, folder)
    return folder


def require_as_trained(run: Run, trained: Path) -> None:
    """Raises UserError if the manifest of an adapter or model does not match its content or this base."""
    product = Product(trained, {})
    if not product.manifest.is_file():
        return
    product.require_whole()
    if run.recipe.adapter and product.base() != run.source.identity:
        raise UserError(
            f"{trained} was trained on another base ({product.base()}) than this recipe's ({run.source.identity}). "
            "Set model.name_or_path and model.revision to that base."
        )


def compared_adapters(run: Run) -> dict[str, Path]:
    """The adapters of `evaluation.compare`, by name."""
    found = {}
    for name, given in run.recipe.evaluation.compare.items():
        found[name] = adapter_folder(given)
        require_as_trained(run, found[name])
    return found


def identities(run: Run) -> dict[str, str]:
    """Every system of the run ("base", "after", compared ones), and what identifies its weights on top of the base."""
    trained = trained_folder(run)
    if run.recipe.adapter:
        after = adapter_digest(trained, "adapter")
    else:
        after = models.locate(dataclasses.replace(run.recipe.model, name_or_path=str(trained))).identity
    compared = compared_adapters(run)
    return {"base": "base", "after": after} | {
        name: adapter_digest(path, f"evaluation.compare.{name}") for name, path in compared.items()
    }


def systems(run: Run, wanted: set[str] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """(name, model) of base, after and every compared adapter, one in memory at a time; None means all of them.

    Base and after are one model with its adapter off and on, unless all parameters were trained.
    """
    trained = trained_folder(run)
    compared = compared_adapters(run)
    wanted = {"base", "after", *compared} if wanted is None else wanted
    if "base" in wanted or (run.recipe.adapter and "after" in wanted):
        with loaded(run, trained if run.recipe.adapter else None) as model:
            if "base" in wanted:
                with reference_on(model):
                    yield "base", model
            if run.recipe.adapter and "after" in wanted:
                yield "after", model
            del model
    if not run.recipe.adapter and "after" in wanted:
        yield "after", models.load_base(models.Source(str(trained), None, "", True), run.recipe.model)
    for name, adapter in compared.items():
        if name in wanted:
            with loaded(run, adapter) as model:
                yield name, model
                del model


@contextlib.contextmanager
def loaded(run: Run, adapter: Path | None) -> Iterator[nn.Module]:
    """The run's base, with an adapter if one is given, after freeing the memory of earlier models."""
    models.release_memory()
    model = run.base()
    if adapter:
        model = models.load_adapter(model, adapter)
    yield model


def greedy_answers(run: Run, model: nn.Module, prompts: list[list[int]], name: str) -> list[str]:
    """The greedy answer to every prompt (token ids) as text, with a progress bar called `name`."""
    section = run.recipe.evaluation
    settings = SamplingSettings(temperature=0.0, max_new_tokens=section.max_new_tokens)
    sampler = get_sampler("padded", model, run.encoder.end_ids, settings, section.batch_size)
    texts = []
    with tqdm(total=len(prompts), desc=f"answers, {name}", unit="row") as bar:
        for start in range(0, len(prompts), 4 * section.batch_size):
            part = prompts[start : start + 4 * section.batch_size]
            samples = sampler.sample([Request(prompt, 0) for prompt in part])
            texts += [run.encoder.text(sample.token_ids) for sample in samples]
            bar.update(len(part))
    return texts
