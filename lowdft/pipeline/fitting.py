"""Finds the fastest settings that fit a GPU: which layers are checkpointed, and how many tokens a pass has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from lowdft.config.sections import Recipe
from lowdft.config.training import DFTConfig
from lowdft.logprobs import Group
from lowdft.models.memory import estimate
from lowdft.training.token_budget import Passes, num_tokens

DEQUANTIZING = 200  # dequantizing a weight takes as long as its product with this many tokens (3090: 100, H100: 370)
BATCHES = 50  # micro-batches that represent all
# settings of checkpointing, and products with every weight per token: forward, recomputed, backward
SETTINGS = (
    (dict(gradient_checkpointing=False), 2.0),
    (dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"every_n_layers": 2}), 2.5),
    (dict(gradient_checkpointing=True), 3.0),
    (dict(gradient_checkpointing=True, offload_checkpoints=True), 3.3),  # a guess: waiting for copies was not measured
)


@dataclass(frozen=True)
class Fit:
    """A setting that fits: fields of `DFTConfig`, tokens per pass, bytes of memory.

    `work` is its time as a number of products of a weight with a token, to compare settings.
    """

    settings: dict
    tokens: int
    bytes: float
    work: float


def fits(
    recipe: Recipe, args: DFTConfig, config: PreTrainedConfig, groups: Sequence[Group], room: float, gpus: int = 1
) -> list[Fit]:
    """Every setting with the largest passes that fit into `room` bytes, fastest first."""
    found = []
    for settings, products in SETTINGS:
        changed = with_settings(args, settings)
        fit = _largest(recipe, changed, config, groups, room, gpus)
        if fit:
            tokens, needed = fit
            found.append(Fit(settings, tokens, needed, _work(changed, groups, tokens, products, recipe)))
    return sorted(found, key=lambda fit: fit.work)


def with_settings(args: DFTConfig, settings: dict) -> DFTConfig:
    """The same arguments with different checkpointing."""
    changed = copy.copy(args)
    for name, value in (dict(offload_checkpoints=False, gradient_checkpointing_kwargs={}) | settings).items():
        setattr(changed, name, value)
    changed.gradient_checkpointing_kwargs = {"use_reentrant": False} | changed.gradient_checkpointing_kwargs
    return changed


def passes_of(args: DFTConfig, tokens: int) -> Passes:
    """Packed passes of so many tokens."""
    return Passes("packed", args.logits_chunk_size, tokens)


def largest_pass(args: DFTConfig, groups: Sequence[Group], tokens: int) -> list[Group]:
    """The largest pass of a micro-batch with the longest groups."""
    batch = sorted(groups, key=lambda group: -num_tokens(group, "packed"))[: args.per_device_train_batch_size]
    passes = passes_of(args, tokens).expected(batch)[1]
    return max(passes, key=lambda some: sum(num_tokens(group, "packed") for group in some))


def _largest(recipe, args, config, groups, room, gpus) -> tuple[int, float] | None:
    """(tokens per pass, bytes) of the largest pass that fits; None if a single completion does not fit."""

    def needed(tokens: int) -> float:
        some = largest_pass(args, groups, tokens)
        return estimate(config, recipe.model, recipe.adapter, args, some, on_gpu=True, gpus=gpus).total

    least = max(len(g.prompt_ids) + max(map(len, g.completions)) for g in groups)
    most = max(least, sum(num_tokens(group, "packed") for group in largest_pass(args, groups, 10**9)))
    if (bytes_ := needed(most)) <= room:
        return most, bytes_
    low, high = (least, needed(least)), (most, bytes_)
    if low[1] > room:
        return None
    for _ in range(4):  # memory grows in proportion, except for the padding of passes
        share = (room - low[1]) / (high[1] - low[1])
        tokens = int(low[0] + min(0.95, share) * (high[0] - low[0]))
        if tokens <= low[0] or tokens >= high[0]:
            break
        now = (tokens, needed(tokens))
        low, high = (now, high) if now[1] <= room else (low, now)
        if room - low[1] < 0.02 * room:
            break
    return low


def _work(args: DFTConfig, groups: Sequence[Group], tokens: int, products: float, recipe: Recipe) -> float:
    """Products of a weight with a token in some micro-batches; dequantizing a weight counts as `DEQUANTIZING`."""
    size = args.per_device_train_batch_size
    each = DEQUANTIZING if recipe.model.holds_4bit else 0
    batches = [groups[i : i + size] for i in range(0, len(groups), size)]
    total = 0.0
    for batch in batches[:: max(1, len(batches) // BATCHES)]:
        scored, backward = passes_of(args, tokens).expected(batch)
        for some, times in ((scored, 1.0), (backward, products)):
            total += sum(times * (each + sum(num_tokens(g, "packed") for g in turn)) for turn in some)
    return total
