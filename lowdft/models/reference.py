"""Reference log-probabilities: P_g0 of completions, by the base with its adapter off or by the initial weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowdft.config.training import DFTConfig
from lowdft.data.batch import group_of
from lowdft.data.encoded import EncodedRows
from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.files import replacing
from lowdft.logprobs import Group
from lowdft.models.adapters import REFERENCE
from lowdft.objectives import Objective
from lowdft.training.token_budget import Passes

FIELDS = {"reference": "ref_negative_logps", "completion_reference": "ref_logps"}  # of encoded rows, by need
REFERENCE_NEEDS = frozenset(FIELDS)
REFERENCE_FILE = "reference.safetensors"


@contextlib.contextmanager
def reference_on(model: nn.Module) -> Iterator[nn.Module]:
    """A peft model as its reference: with its frozen reference adapter, else with no adapter.

    A model without an adapter is its own reference.
    """
    if REFERENCE in getattr(model, "peft_config", {}):
        trained, trainable = model.active_adapter, [p for p in model.parameters() if p.requires_grad]
        model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield model
        finally:
            model.set_adapter(trained, inference_mode=True)
            for parameter in trainable:
                parameter.requires_grad_(True)
    else:
        with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
            yield model


def has_reference(row: dict, objective: Objective) -> bool:
    """Does an encoded row bring the reference log-probabilities that this objective needs?"""
    return all(FIELDS[need] in row for need in objective.needs & REFERENCE_NEEDS)


def rows_with_reference(rows: EncodedRows, objective: Objective) -> np.ndarray:
    """bool [rows]: which rows bring the reference log-probabilities that this objective needs."""
    found = np.ones(len(rows), bool)
    for need in objective.needs & REFERENCE_NEEDS:
        found &= rows.has(FIELDS[need])
    return found


def reference_group(row: dict, objective: Objective, args: DFTConfig) -> Group:
    """The completions of a row that the reference scores for this objective: negatives first, the good one last."""
    prompt = "prompt_ids" if args.reference_prompt == "training" else "sampling_prompt_ids"
    negatives = row["negative_ids"] if objective.uses_reference else []
    return group_of(row, negatives, prompt, objective.uses_completion_reference)


def reference_fields(logps: list[float], objective: Objective) -> dict:
    """The fields of an encoded row (`FIELDS`) from the log-probabilities of its `reference_group`."""
    with_completion = objective.uses_completion_reference
    fields = {"ref_logps": logps[-1]} if with_completion else {}
    return fields | ({"ref_negative_logps": logps[: len(logps) - with_completion]} if objective.uses_reference else {})


def reference_logps(model: nn.Module, groups: Sequence[Group], passes: Passes) -> Tensor:
    """Summed log-probabilities [M, K] of completions under `model` as it stands, in eval mode and without gradient.

    Args:
        groups: prompts with K completions each.
        passes: how they are scored; training's own, so that rounding is the same.
    """
    training = model.training
    model.eval()
    try:
        return passes.score(model, groups)
    finally:
        model.train(training)


def check_reference(
    model: nn.Module, datasets: Sequence[EncodedRows], objective: Objective, args: DFTConfig, resuming: bool
) -> None:
    """Raises UserError when rows lack reference log-probabilities that this model cannot give.

    That is, `reference: online` under an adapter that is already trained, or a resumed run without its file.
    """
    if all(rows_with_reference(rows, objective).all() for rows in datasets):
        return
    if args.reference == "online":
        _check_online(model, resuming)
    elif resuming and not (path := Path(args.output_dir) / REFERENCE_FILE).is_file():
        raise UserError(f"{path}: is missing; a resumed training needs the scores of its initial weights")


def attach_reference(
    model: nn.Module,
    datasets: Sequence[EncodedRows],
    objective: Objective,
    args: DFTConfig,
    passes: Passes,
    resuming: bool,
) -> None:
    """Gives every row the reference log-probabilities it lacks (`FIELDS`) where they are "precomputed", in place.

    They come from the initial weights, before the first step: for full parameters that is the only moment at which
    they exist. Each rank scores its share of the rows. A resumed training reads them back from its output folder.
    """
    lacking = [(rows, int(i)) for rows in datasets for i in np.flatnonzero(~rows_with_reference(rows, objective))]
    if args.reference == "online" or not lacking:
        return
    path = Path(args.output_dir) / REFERENCE_FILE
    if resuming:
        scored = load_file(path)["logps"]
    else:
        scored = _score_all(model, lacking, objective, args, passes)
        if collectives.rank() == 0:
            with replacing(path) as temporary:
                save_file({"logps": scored}, temporary)
    start = 0
    for rows in datasets:
        start += _store(rows, scored[start:], objective)


def _score_all(
    model: nn.Module, lacking: list[tuple[EncodedRows, int]], objective: Objective, args: DFTConfig, passes: Passes
) -> Tensor:
    """The log-probabilities of all their `reference_group`s, one after another; every rank returns the same."""
    rank, size = collectives.rank(), collectives.world_size()
    mine, scored = lacking[rank::size], []
    for k in tqdm(range(-(-len(lacking) // size)), "scoring the reference", disable=args.disable_tqdm):
        rows, i = mine[k] if k < len(mine) else lacking[0]  # with sharded parameters every rank takes part
        group = reference_group(rows[i], objective, args)
        scored.append(reference_logps(model, [group], passes)[0].float().cpu())
    by_rank = collectives.from_all(scored)
    return torch.cat([by_rank[i % size][i // size] for i in range(len(lacking))])


def _store(rows: EncodedRows, scored: Tensor, objective: Objective) -> int:
    """Fills the reference columns of the rows that lack them from the head of `scored`; returns how many it took."""
    there, start = rows_with_reference(rows, objective), 0
    if there.all():
        return 0
    names = [FIELDS[need] for need in objective.needs & REFERENCE_NEEDS]
    counts = rows.lengths("negative_ids") * objective.uses_reference + objective.uses_completion_reference
    columns = {name: rows.table[name].to_pylist() if rows.has(name).any() else [None] * len(rows) for name in names}
    for i in np.flatnonzero(~there):
        end = start + int(counts[i])
        for name, value in reference_fields(scored[start:end].tolist(), objective).items():
            columns[name][i] = value
        start = end
    rows.table = rows.with_columns(**columns).table
    return start


def is_trained(model: nn.Module) -> bool:
    """Does an adapter change the base?"""
    return any(bool(p.detach().any()) for name, p in model.named_parameters() if "lora_B" in name)


def _check_online(model: nn.Module, resuming: bool) -> None:
    if REFERENCE in model.peft_config:
        return
    if is_trained(model) and not resuming:
        raise UserError(
            "reference: online would take the bare base, but this adapter is already trained, so the policy "
            "starts elsewhere. Name it as reference_model: adapter:PATH, or use reference: precomputed."
        )
