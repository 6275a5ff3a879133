"""Assigns examples to micro-batches and processes, with the same optimizer steps on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """The micro-batches of one rank.

    Every epoch has its own order, which all ranks know. Each `size * ranks` examples of it are split among the ranks,
    in order of rank. No example occurs twice in an epoch: when examples run out, the last micro-batch of a rank is
    shorter or empty.

    Args:
        n: number of examples.
        size: examples per micro-batch.
        seed: determines the order; None keeps the order of the data set.
        drop_last: leave out examples that do not fill a micro-batch on every rank.
    """

    def __init__(self, n: int, size: int, seed: int | None, rank: int = 0, ranks: int = 1, drop_last: bool = False):
        self.n, self.size, self.seed, self.rank, self.ranks, self.drop_last = n, size, seed, rank, ranks, drop_last
        self.epoch = 0

    @property
    def batch_sampler(self) -> StepSampler:
        """The sampler itself: through accelerate's wrapper, transformers looks here for the one to set the epoch of."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        together = self.size * self.ranks
        return self.n // together if self.drop_last else -(-self.n // together)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.n)
        if self.seed is not None:
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        together = self.size * self.ranks
        for k in range(len(self)):
            start = k * together + self.rank * self.size
            yield order[start : min(start + self.size, (k + 1) * together)].tolist()
