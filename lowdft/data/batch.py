"""Micro-batches of `EncodedRows` for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowdft.logprobs import Group


@dataclass(frozen=True)
class Batch:
    """M encoded rows and their positions in the data set. Opaque to the data loader, which copies none of it."""

    index_M: Tensor
    rows: list[dict]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def completion_tokens(self) -> int:
        """Scored tokens of all completions."""
        return sum(len(row["completion_ids"]) for row in self.rows)

    def groups(self, negatives: Sequence[Sequence[Sequence[int]]], **how) -> list[Group]:
        """One group per row with its chosen negatives; `how` is passed to `group_of`."""
        return [group_of(row, chosen, **how) for row, chosen in zip(self.rows, negatives, strict=True)]

    def negatives(self, visits_M: Sequence[int], count: int) -> list[list[list[int]]]:
        """The `count` negatives of each row for its current visit; all are used once before any is used again."""
        return [
            [row["negative_ids"][i] for i in visit_range(int(visit), count, len(row["negative_ids"]))]
            for row, visit in zip(self.rows, visits_M, strict=True)
        ]

    def column(self, name: str) -> Tensor:
        """One number per row, [M]."""
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
    """A row's group: negatives first, then the completion (left out for the reference)."""
    completions = [*negatives, row["completion_ids"]] if completion else negatives
    return Group(row.get(prompt, row["prompt_ids"]), completions)


def visit_range(visit: int, count: int, pool: int) -> list[int]:
    """Which negatives of a row a visit uses; starts over when all have been used."""
    return [(visit * count + j) % pool for j in range(count)]


def collate(items: list[tuple[int, dict]]) -> dict:
    """Positions and rows (`EncodedRows.__getitems__`) as {"batch": Batch, "index": [M]}."""
    index = torch.tensor([i for i, _ in items], dtype=torch.int64)
    return {"index": index, "batch": Batch(index, [row for _, row in items])}
