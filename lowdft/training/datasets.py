"""The data sets of a trainer: one to train on, and none, one or several by name to evaluate on."""

from __future__ import annotations

from torch.utils.data import DataLoader

from lowdft.config.requirements import RowFacts, check_rows
from lowdft.config.training import DFTConfig
from lowdft.data.batch import collate
from lowdft.data.encode import Encoder
from lowdft.data.encoded import EncodedRows
from lowdft.data.prepare import encode_rows
from lowdft.data.sampler import StepSampler
from lowdft.errors import UserError
from lowdft.objectives import Objective


def encoded(dataset, encoder: Encoder | None):
    """A data set, or several by name, as `EncodedRows`; what is that already, None or a name stays."""
    if isinstance(dataset, dict):
        return {name: encoded(rows, encoder) for name, rows in dataset.items()}
    return dataset if dataset is None or isinstance(dataset, str | EncodedRows) else encode_rows(dataset, encoder)


def as_list(dataset: EncodedRows | dict[str, EncodedRows] | None) -> list[EncodedRows]:
    """None, one or several by name as a list."""
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
        at_hand: the model can still give the reference's log-probabilities.
    """
    for facts in (RowFacts.of(rows, objective) for rows in sets):
        check_rows(facts, objective, args, training=False)
        if not (facts.has_reference_N.all() or at_hand):
            raise UserError(
                "these rows have no reference log-probabilities, and the weights that training began with, which are "
                "the reference, are no longer there to score them. Pass the rows as eval_dataset when the trainer is "
                "made, and evaluate after train() has begun."
            )
