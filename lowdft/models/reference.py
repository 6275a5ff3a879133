"""Reference log-probabilities (P_g0 in the paper), from the base with its adapter off or from the initial weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
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
from lowdft.logprobs.check import own_logps, require_finite, small_group
from lowdft.models.adapters import REFERENCE
from lowdft.objectives import Objective
from lowdft.training.token_budget import Passes

FIELDS = {  # fields of encoded rows, by the objective's need
    "reference": "ref_negative_logps",
    "completion_reference": "ref_logps",
    "mismatched": "ref_mismatched_logps",
}
REFERENCE_NEEDS = frozenset(FIELDS)
NOT_FINITE = (
    "The weights of the base (or of the reference's adapter) contain NaN or infinity, or its dtype overflows. Check "
    "them, or set model.dtype=bfloat16 or float32."
)
REFERENCE_FILE = "reference.safetensors"


@contextlib.contextmanager
def reference_on(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which a peft model is its reference: with its frozen reference adapter, or else with no adapter.

    A model without an adapter is its own reference.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if REFERENCE in getattr(model, "peft_config", {}):
            trained = model.active_adapter
            model.set_adapter(REFERENCE, inference_mode=True)
            try:
                yield model
            finally:
                model.set_adapter(trained, inference_mode=True)
        else:
            with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
                yield model
    finally:
        for parameter, flag in flags:  # peft makes all weights of an adapter trainable when it switches it on
            parameter.requires_grad_(flag)


def has_reference(row: dict, objective: Objective) -> bool:
    """Whether an encoded row has the reference log-probabilities that this objective needs."""
    return all(FIELDS[need] in row for need in objective.needs & REFERENCE_NEEDS)


def rows_with_reference(rows: EncodedRows, objective: Objective) -> np.ndarray:
    """bool [rows]: which rows have the reference log-probabilities that this objective needs."""
    found = np.ones(len(rows), bool)
    for need in objective.needs & REFERENCE_NEEDS:
        found &= rows.has(FIELDS[need])
    return found


def reference_group(row: dict, objective: Objective, args: DFTConfig) -> Group:
    """What the reference scores of a row for this objective: negatives, then another row's completion, then its own."""
    prompt = "prompt_ids" if args.reference_prompt == "training" else "sampling_prompt_ids"
    wrong = row["negative_ids"] if objective.uses_reference else []
    wrong = [*wrong, row["mismatched_ids"]] if objective.uses_mismatched else wrong
    return group_of(row, wrong, prompt, objective.uses_completion_reference)


def reference_fields(logps: list[float], objective: Objective) -> dict:
    """The fields of an encoded row (`FIELDS`) from the log-probabilities of its `reference_group`."""
    fields, rest = {}, list(logps)
    for name in ("ref_logps", "ref_mismatched_logps"):  # from the last to the first
        if name in (FIELDS[need] for need in objective.needs & REFERENCE_NEEDS):
            fields[name] = rest.pop()
    return fields | ({"ref_negative_logps": rest} if objective.uses_reference else {})


def reference_logps(model: nn.Module, groups: Sequence[Group], passes: Passes) -> Tensor:
    """Summed log-probabilities [M, K] of completions under the current `model`, in eval mode and without gradient.

    Args:
        groups: prompts with K completions each.
        passes: the same as in training, so that rounding is the same.
    """
    training = model.training
    model.eval()
    try:
        return passes.score(model, groups)
    finally:
        model.train(training)


def check_reference(
    model: nn.Module,
    datasets: Sequence[EncodedRows],
    objective: Objective,
    args: DFTConfig,
    resuming: bool,
    at_hand: bool,
) -> None:
    """Raises UserError if rows lack reference log-probabilities that this model cannot compute.

    This happens with `reference: online` and an already trained adapter, or in a resumed run whose file is missing.

    Args:
        at_hand: the reference is the model with its adapter off, which training does not change.
    """
    if all(rows_with_reference(rows, objective).all() for rows in datasets):
        return
    if args.reference == "online":
        _check_online(model, resuming)
    elif resuming and not at_hand and not (path := Path(args.output_dir) / REFERENCE_FILE).is_file():
        raise UserError(
            f"{path} is missing; a resumed run needs the scores of its initial weights. Restore it, or train from the "
            "start."
        )


def attach_reference(
    model: nn.Module,
    datasets: Sequence[EncodedRows],
    objective: Objective,
    args: DFTConfig,
    passes: Passes,
    resuming: bool,
    at_hand: bool,
) -> None:
    """Adds missing reference log-probabilities (`FIELDS`) to every row, in place, if the reference is "precomputed".

    They are computed with the initial weights before the first step; when all parameters are trained, the reference
    exists only then. Each rank scores its share of the rows. A resumed run finds them in its output folder by the ids
    that were scored. It scores new rows if the reference still exists (see `check_reference`).

    Raises:
        UserError: a resumed run has new rows, and the reference no longer exists to score them.
    """
    datasets = list({id(rows): rows for rows in datasets}.values())
    lacking = [(rows, int(i)) for rows in datasets for i in np.flatnonzero(~rows_with_reference(rows, objective))]
    if args.reference == "online" or not lacking:
        return
    path = Path(args.output_dir) / REFERENCE_FILE
    groups = [reference_group(rows[i], objective, args) for rows, i in lacking]
    keys = [_key(group) for group in groups]
    known = _load_scores(path) if resuming and path.is_file() else {}
    new = [n for n, key in enumerate(keys) if key not in known]
    if new:
        if resuming and not at_hand:
            names = ", ".join(rows.example_ids([i])[0] for rows, i in (lacking[n] for n in new[:5]))
            raise UserError(
                f"{len(new)} rows (example_id {names}{', …' if len(new) > 5 else ''}) are new to this run: {path} has "
                "no reference scores for them, and the reference (the initial weights) is no longer there to score "
                "them. Resume with the rows that the run began with, or train from the start."
            )
        with reference_on(model) if resuming else contextlib.nullcontext():
            scored = _score_all(model, [groups[n] for n in new], passes, args.disable_tqdm)
        names = [lacking[n][0].example_ids([lacking[n][1]])[0] for n in new]
        require_finite("the reference's log-probabilities", names, scored, NOT_FINITE)
        known |= zip((keys[n] for n in new), scored, strict=True)
        if collectives.rank() == 0:
            _save_scores(path, known)
    for rows in datasets:
        _store(rows, [known[key] for (owner, _), key in zip(lacking, keys, strict=True) if owner is rows], objective)


def _key(group: Group) -> int:
    """A hash of the ids of a prompt and of its completions."""
    parts = [group.prompt_ids, *group.completions]
    return xxhash.xxh3_64_intdigest(np.concatenate([[len(ids), *ids] for ids in parts]).astype(np.int32)) >> 1


def _save_scores(path: Path, known: dict[int, Tensor]) -> None:
    """Reads log-probabilities, with the key of what was scored, one after another."""
    counts = torch.tensor([len(logps) for logps in known.values()])
    tensors = {"key": torch.tensor([*known]), "count": counts, "logps": torch.cat([*known.values()])}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def _load_scores(path: Path) -> dict[int, Tensor]:
    found = load_file(path)
    if not {"key", "count", "logps"} <= found.keys():
        raise UserError(f"{path} was written by another version of lowdft. Train from the start.")
    return dict(zip(found["key"].tolist(), found["logps"].split(found["count"].tolist()), strict=True))


def _score_all(model: nn.Module, groups: Sequence[Group], passes: Passes, quiet: bool) -> list[Tensor]:
    """The log-probabilities of all groups; every rank scores its share and returns all."""
    rank, size = collectives.rank(), collectives.world_size()
    mine, scored = groups[rank::size], []
    for k in tqdm(range(-(-len(groups) // size)), "scoring the reference", disable=quiet):
        group = mine[k] if k < len(mine) else groups[0]  # with sharded parameters every rank takes part
        scored.append(reference_logps(model, [group], passes)[0].float().cpu())
    by_rank = collectives.from_all(scored)
    return [by_rank[i % size][i // size] for i in range(len(groups))]


def _store(rows: EncodedRows, scored: Sequence[Tensor], objective: Objective) -> None:
    """Fills the reference columns of the rows that lack them, in order."""
    there = rows_with_reference(rows, objective)
    if there.all():
        return
    names = [FIELDS[need] for need in objective.needs & REFERENCE_NEEDS]
    columns = {name: rows.table[name].to_pylist() if rows.has(name).any() else [None] * len(rows) for name in names}
    for i, logps in zip(np.flatnonzero(~there), scored, strict=True):
        for name, value in reference_fields(logps.tolist(), objective).items():
            if columns[name][i] is None:  # values that the row already has are kept
                columns[name][i] = value
    rows.table = rows.with_columns(**columns).table


def is_trained(model: nn.Module) -> bool:
    """Whether an adapter changes the base's output: from LoRA's weights, or with a small forward pass for others."""
    if not hasattr(model, "disable_adapter"):
        return False
    ups = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_A" in name]
    if ups or next(model.parameters()).numel() == 0:  # empty under ZeRO-3, which shards parameters
        return any(bool(p.detach().any()) for p in ups)
    groups, sequences = small_group(model.config.get_text_config().vocab_size)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with_it = own_logps(model, sequences.to(model.device), groups)
            with reference_on(model):
                return not torch.allclose(with_it, own_logps(model, sequences.to(model.device), groups), atol=1e-3)
    finally:
        model.train(training)


def _check_online(model: nn.Module, resuming: bool) -> None:
    if REFERENCE in model.peft_config:
        return
    if is_trained(model) and not resuming:
        raise UserError(
            "reference: online would use the base as the reference, but this adapter is already trained, so the policy "
            "does not start as the base. Set reference_model: adapter:PATH, or use reference: precomputed."
        )
