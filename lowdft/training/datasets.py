"""The data sets of a trainer: one for training, and none, one or several (by name) for evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from lowdft.config.requirements import RowFacts, check_datasets, check_rows
from lowdft.config.training import DFTConfig
from lowdft.data.batch import collate
from lowdft.data.encode import Encoder
from lowdft.data.encoded import EncodedRows
from lowdft.data.prepare import with_mismatched
from lowdft.data.python_rows import encode_rows
from lowdft.data.sampler import StepSampler
from lowdft.errors import InvalidRows, UserError
from lowdft.objectives import Objective


def encoded(dataset, encoder: Encoder, objective: Objective, name: str = "eval_dataset", faults: list | None = None):
    """A data set, or a dictionary of several, as `EncodedRows` with the mismatched completions that KTO needs.

    None, or the name of a data set, is returned unchanged.

    Args:
        name: the name of the data set in error messages.
        faults: a list for the errors of invalid rows, which are then left out; None raises them.
    """
    if isinstance(dataset, dict) and name == "eval_dataset":
        return {key: encoded(rows, encoder, objective, f"{name}[{key!r}]", faults) for key, rows in dataset.items()}
    if name != "train_dataset" and (dataset is None or isinstance(dataset, str)):
        return dataset
    try:
        rows = encode_rows(dataset, encoder, name)
    except InvalidRows as error:
        if faults is None:
            raise
        faults.append(str(error))
        rows = error.valid
    if objective.uses_mismatched and not rows.has("mismatched_ids").all():
        rows = with_mismatched(rows, encoder.max_length)
    return rows


def read_datasets(
    train_dataset, eval_dataset, encoder: Encoder, objective: Objective, args: DFTConfig, has_adapter: bool
) -> tuple[EncodedRows, EncodedRows | dict[str, EncodedRows] | None]:
    """Encodes both data sets and checks what the objective requires; gives warnings.

    Args:
        has_adapter: the model has an adapter, or gets a new one.

    Raises:
        UserError: with all errors in the rows of both data sets.
    """
    faults: list[str] = []
    train_rows = encoded(train_dataset, encoder, objective, "train_dataset", faults)
    eval_sets = encoded(eval_dataset, encoder, objective, "eval_dataset", faults)
    valid = [rows for rows in (train_rows, *as_list(eval_sets)) if len(rows) or not faults]
    try:
        notes = check_datasets(valid[0], valid[1:], objective, args, has_adapter) if valid else []
    except UserError as error:
        faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    for note in [*notes, encoder.cuts()]:
        if note:
            warnings.warn(note, stacklevel=4)
    return train_rows, eval_sets


def check_ids(sets: Iterable[EncodedRows], model: nn.Module) -> None:
    """Raises UserError for rows with a token id that the model has no embedding for."""
    embeddings = model.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", None) or model.config.get_text_config().vocab_size
    for rows in sets:
        for name in ("prompt_ids", "completion_ids", "negative_ids"):
            if (largest := rows.largest_id(name)) >= size:
                number = next(i for i, row in enumerate(rows) if largest in np.concatenate(row[name], axis=None))
                raise UserError(
                    f"row {rows.example_ids([number])[0]}: {name} has the token id {largest}, but the model has "
                    f"embeddings for 0 to {size - 1}. Use the model's tokenizer, or resize its embeddings."
                )


def as_list(dataset: EncodedRows | dict[str, EncodedRows] | None) -> list[EncodedRows]:
    """None, one data set or several by name, as a list."""
    return [] if dataset is None else list(dataset.values()) if isinstance(dataset, dict) else [dataset]


def train_loader(rows: EncodedRows, args: DFTConfig) -> DataLoader:
    """This rank's micro-batches of every epoch; the last ones may be empty."""
    seed = args.seed if args.data_seed is None else args.data_seed
    sampler = StepSampler(
        len(rows),
        args.per_device_train_batch_size,
        seed if args.train_sampling_strategy == "random" else None,
        args.process_index,
        args.world_size,
        args.dataloader_drop_last,
    )
    return DataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=args.dataloader_num_workers)


def check_evaluation(sets: list[EncodedRows], objective: Objective, args: DFTConfig, at_hand: bool) -> None:
    """Raises UserError for rows that cannot be evaluated.

    Args:
        at_hand: the model can still compute the reference's log-probabilities.
    """
    for facts in (RowFacts.of(rows, objective) for rows in sets):
        check_rows(facts, objective, args, training=False)
        if not (facts.has_reference_N.all() or at_hand):
            raise UserError(
                "these rows have no reference log-probabilities, and the reference (the initial weights) is no longer "
                "there to score them. Pass the rows as eval_dataset when you create the trainer, and evaluate after "
                "train() has begun."
            )
