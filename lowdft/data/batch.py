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
    row: dict, negatives: Sequence[Sequence[int]], prompt: str = "prompt_ids", completion: bool = True
) -> Group:
    """A row's group: negatives first, the completion last (or left out, for the reference)."""
    completions = [*negatives, row["completion_ids"]] if completion else negatives
    return Group(row.get(prompt, row["prompt_ids"]), completions)


def visit_range(visit: int, count: int, pool: int) -> list[int]:
    """Which negatives of a pool a visit uses; starts over when the pool is used up."""
    return [(visit * count + j) % pool for j in range(count)]


def collate(items: list[tuple[int, dict]]) -> dict:
    """Positions and rows (`EncodedRows.__getitems__`) as {"batch": Batch, "index": [M]}."""
    index = torch.tensor([i for i, _ in items], dtype=torch.int64)
    return {"index": index, "batch": Batch(index, [row for _, row in items])}
