"""The micro-batches that training takes from `EncodedRows`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowdft.logprobs import Group


@dataclass(frozen=True)
class Batch:
    """M encoded rows and where they stand in the dataset. Opaque to the data loader: nothing is copied to a device."""

    index_M: Tensor
    rows: list[dict]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, numbers: Sequence[int]) -> Batch:
        """Some of the rows, in the order given."""
        return Batch(self.index_M[list(numbers)], [self.rows[i] for i in numbers])

    @property
    def completion_tokens(self) -> int:
        """Scored tokens of all completions."""
        return sum(len(row["completion_ids"]) for row in self.rows)

    def groups(self, negatives: Sequence[Sequence[Sequence[int]]], **how) -> list[Group]:
        """One group a row with its chosen negatives; `how` goes to `group_of`."""
        return [group_of(row, chosen, **how) for row, chosen in zip(self.rows, negatives, strict=True)]

    def negatives(self, visits_M: Sequence[int], count: int) -> list[list[list[int]]]:
        """Each row's next `count` negatives: those of its visit, without replacement until all were used."""
        return [
            [row["negative_ids"][i] for i in visit_range(int(visit), count, len(row["negative_ids"]))]
            for row, visit in zip(self.rows, visits_M, strict=True)
        ]

    def column(self, name: str) -> Tensor:
        """A number of every row, [M]."""
        return torch.tensor([row[name] for row in self.rows], dtype=torch.float64)

    def ref_negative_logps(self, visits_M: Sequence[int], count: int) -> Tensor:
        """The precomputed reference log-probabilities [M, count] of the same negatives."""
        return torch.tensor(
            [
                [row["ref_negative_logps"][i] for i in visit_range(int(visit), count, len(row["negative_ids"]))]
                for row, visit in zip(self.rows, visits_M, strict=True)
            ],
            dtype=torch.float64,
        )


def group_of(
    row: dict,
    negatives: Sequence[Sequence[int]],
    prompt: str = "prompt_ids",
    completion: bool = True,
    negatives_scored: str = "whole",
) -> Group:
    """A row's group: negatives first, the completion last (or left out, for the reference).

    `negatives_scored` is that of `DFTConfig`; what stands behind a negative's last scored token is not even read.
    """
    good = row["completion_ids"]
    shared = [0 if negatives_scored == "whole" else shared_prefix(negative, good) for negative in negatives]
    if negatives_scored == "at_difference":
        negatives = [negative[: first + 1] for negative, first in zip(negatives, shared, strict=True)]
    if completion:
        negatives, shared = [*negatives, good], [*shared, 0]
    return Group(row.get(prompt, row["prompt_ids"]), negatives, shared)


def shared_prefix(negative: Sequence[int], completion: Sequence[int]) -> int:
    """How many leading tokens two completions share; the negative's last token never counts as shared."""
    pairs = zip(negative[:-1], completion, strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(negative) - 1, len(completion)))


def visit_range(visit: int, count: int, pool: int) -> list[int]:
    """Which negatives of a pool a visit uses; starts over when the pool is used up."""
    return [(visit * count + j) % pool for j in range(count)]


def collate(items: list[tuple[int, dict]]) -> dict:
    """Positions and rows (`EncodedRows.__getitems__`) as {"batch": Batch, "index": [M]}."""
    index = torch.tensor([i for i, _ in items])
    return {"index": index, "batch": Batch(index, [row for _, row in items])}
