"""Which examples each process takes in each micro-batch: the same steps on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """Micro-batches of one rank.

    Every epoch has an order of its own, known to all ranks. They share each `size * ranks` examples of it, the first
    rank taking the first. No example comes twice in an epoch: where examples run out, a rank's last micro-batch is
    shorter, or empty.

    Args:
        n: examples.
        size: of a micro-batch.
        seed: of the order; None: the order of the dataset.
        drop_last: leave out what does not fill every rank's micro-batch.
    """

    def __init__(self, n: int, size: int, seed: int | None, rank: int = 0, ranks: int = 1, drop_last: bool = False):
        self.n, self.size, self.seed, self.rank, self.ranks, self.drop_last = n, size, seed, rank, ranks, drop_last
        self.epoch = 0

    @property
    def batch_sampler(self) -> StepSampler:
        """Itself: transformers looks for the sampler to tell the epoch to behind accelerate's wrapper."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch."""
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
