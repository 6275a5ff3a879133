"""What the trainer asks of its rows: enough negatives, a fingerprint, and reference log-probabilities."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from lowdft.config.sections import ModelSection
from lowdft.config.training import DFTConfig
from lowdft.data.encode import Encoder
from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.files import replacing
from lowdft.models.adapters import REFERENCE
from lowdft.models.base import Source, context_length, generation_end_ids
from lowdft.models.reference import (
    has_reference,
    reference_fields,
    reference_group,
    reference_logps,
)
from lowdft.objectives import Objective
from lowdft.training.token_budget import Passes

REFERENCE_FILE = "reference.safetensors"


def encoder_for(model, tokenizer, args: DFTConfig) -> Encoder:
    """What turns a trainer's rows into ids: with the lengths of `args`, the model's context and its end tokens.

    Args:
        model: a transformers model, or the name of one, which is not loaded.
        tokenizer: None for rows of ids.
    """
    if isinstance(model, str):
        source = Source(model, None, model, is_local=False)
        try:
            context, ends = context_length(source, ModelSection(model)), generation_end_ids(source)
        except OSError:  # no such model: loading it says so, after the rows were checked
            context, ends = None, []
    else:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        ends = generation_end_ids(model)
    return Encoder(tokenizer, args.max_length, args.max_prompt_length, context, ends)


def encode_rows(dataset, encoder: Encoder) -> list[dict]:
    """Rows of ids from rows of text or of ids."""
    rows = list(dataset)
    if encoder.turns is None and any("prompt_ids" not in row for row in rows):
        raise UserError(
            "rows of text need a tokenizer: pass processing_class, or rows with prompt_ids, completion_ids and "
            "negative_ids"
        )
    return encoder.rows(rows)


def check_rows(rows: list[dict], objective: Objective, args: DFTConfig, training: bool = True) -> None:
    """Raises UserError, naming the rows, when they cannot be trained on (or evaluated) with this objective."""
    if not rows:
        raise UserError("the data set is empty; at least one row is needed")
    empty = [row["example_id"] for row in rows if not row["completion_ids"] or not row["prompt_ids"]]
    empty += [row["example_id"] for row in rows if not all(row["negative_ids"])]
    if empty:
        raise UserError(f"{len(empty)} rows have a prompt, completion or negative without tokens: {_some(empty)}")
    if objective.uses_aligned and any("aligned_logps" not in row for row in rows):
        raise UserError(
            f"{objective.name} needs `aligned_logps` in every row: the mean log-probability a token of its completion "
            "under aligned models, scored beforehand"
        )
    scored = all(has_reference(row, objective) for row in rows)
    if args.reference_prompt == "proposal" and not scored:
        raise UserError("reference_prompt: proposal needs rows with ref_negative_logps; run `lowdft score` first")
    if not objective.uses_negatives:
        return
    wanted = negatives_least(args, len(rows), objective) if training else args.negatives_per_step
    short = [row["example_id"] for row in rows if len(row["negative_ids"]) < wanted]
    if short:
        fewest = min(len(row["negative_ids"]) for row in rows)
        raise UserError(
            f"{len(short)} of {len(rows)} rows have too few negatives (the fewest: {fewest}; first rows: "
            f"{_some(short)}); {args.negatives_per_step} a visit need {wanted} a row. "
            "Generate more, or lower negatives_per_step or num_train_epochs."
        )


def check_adapter(args: DFTConfig, objective: Objective, rows: list[dict] | None = None) -> None:
    """Raises UserError for what only an adapter can do, for a training without one.

    Args:
        rows: of training and evaluation, which may bring the reference; None: they do not.
    """
    brought = rows is not None and all(has_reference(row, objective) for row in rows)
    if args.reference == "online" and objective.uses_any_reference and not brought:
        raise UserError(
            "training.reference: online needs an adapter to switch off; with full parameters use reference: "
            "precomputed (the initial weights score once, before the first step)"
        )
    if objective.uses_mismatched:
        raise UserError(
            f"training.objective {objective.name} needs an adapter: its reference is the base with the adapter off"
        )
    if args.freeze_half:
        raise UserError("training.freeze_half halves the modules of an adapter; this training has none")


def negatives_least(args: DFTConfig, n: int, objective: Objective) -> int:
    """Negatives that a row must have. A moving average wants other ones at each visit; pairs may be seen again."""
    return negatives_needed(args, n) if objective.uses_log_u else args.negatives_per_step


def negatives_needed(args: DFTConfig, n: int) -> int:
    """Negatives of one prompt over the whole training: B for each of its visits."""
    if args.max_steps > 0:
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return math.ceil(args.max_steps * batch / n) * args.negatives_per_step
    return math.ceil(args.num_train_epochs) * args.negatives_per_step


def fingerprint(rows: list[dict], args: DFTConfig) -> dict:
    """What a `log_u` table belongs to; hashed over the ids of every prompt, completion and negative."""
    digest = hashlib.sha256()
    for row in rows:
        kept = [row["example_id"], row["prompt_ids"], row["completion_ids"], row["negative_ids"]]
        digest.update(json.dumps(kept, separators=(",", ":")).encode())
    names = (
        "objective",
        "tau",
        "gamma",
        "negatives_per_step",
        "negatives_scored",
        "log_u_init",
        "reference",
        "reference_model",
        "reference_prompt",
        "objective_args",
    )
    return {"data": digest.hexdigest()} | {name: getattr(args, name) for name in names}


def check_reference(model: nn.Module, rows: list[dict], objective: Objective, args: DFTConfig, resuming: bool) -> None:
    """Raises UserError when rows lack reference log-probabilities that this model cannot give.

    That is, `reference: online` under an adapter that is already trained, or a resumed run without its file.
    """
    if all(has_reference(row, objective) for row in rows):
        return
    if args.reference == "online":
        _check_online(model, resuming)
    elif resuming and not (path := Path(args.output_dir) / REFERENCE_FILE).is_file():
        raise UserError(f"{path}: is not there; a resumed training needs the scores of its initial weights")


def attach_reference(
    model: nn.Module, rows: list[dict], objective: Objective, args: DFTConfig, passes: Passes, resuming: bool
) -> None:
    """Gives every row the reference log-probabilities it lacks (`reference.FIELDS`) where they are "precomputed".

    They come from the initial weights, before the first step: for full parameters that is the only moment at which
    they exist. Each rank scores its share of the rows. A resumed training reads them back from its output folder.
    """
    rows = [row for row in rows if not has_reference(row, objective)]
    if args.reference == "online" or not rows:
        return
    path = Path(args.output_dir) / REFERENCE_FILE
    if resuming:
        table = load_file(path)["logps"]
    else:
        groups = [reference_group(row, objective, args) for row in rows]
        mine = groups[collectives.rank() :: collectives.world_size()]
        scored = []
        for i in tqdm(
            range(math.ceil(len(rows) / collectives.world_size())), "scoring the reference", disable=args.disable_tqdm
        ):
            group = mine[i] if i < len(mine) else groups[0]  # with sharded parameters every rank takes part
            scored.append(reference_logps(model, [group], passes)[0].float().cpu())
        by_rank = collectives.from_all(scored)
        size = collectives.world_size()
        table = torch.cat([by_rank[i % size][i // size] for i in range(len(rows))])
        if collectives.rank() == 0:
            with replacing(path) as temporary:
                save_file({"logps": table}, temporary)
    start = 0
    for row in rows:
        end = start + len(reference_group(row, objective, args).completions)
        row |= reference_fields(table[start:end].tolist(), objective)
        start = end


def _check_online(model, resuming: bool) -> None:
    if REFERENCE in model.peft_config:
        return
    trained = any(bool(p.detach().any()) for name, p in model.named_parameters() if "lora_B" in name)
    if trained and not resuming:
        raise UserError(
            "reference: online would take the bare base, but this adapter is already trained, so the policy "
            "starts elsewhere. Name it as reference_model: adapter:PATH, or use reference: precomputed."
        )


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
