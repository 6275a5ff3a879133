"""The totals that an optimizer step is divided by, and the state at its beginning."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from lowdft.training.log_u import LogU
from lowdft.training.metrics import StepMetrics


@dataclass(frozen=True)
class StepTotals:
    """Totals of one optimizer step, over all micro-batches on all ranks, by which its losses are divided.

    `tokens` counts those of completions; `mismatched_gain` (nats) is KTO's reference point.
    """

    prompts: int = 1
    tokens: int = 1
    mismatched_gain: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """The state at the beginning of a step: its examples' entries in the table, the metrics, and the random state."""

    index_M: Tensor
    values_M: Tensor
    visits_M: Tensor
    metrics: StepMetrics
    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def take(cls, log_u: LogU, index_M: Tensor, metrics: StepMetrics) -> Snapshot:
        """The current state; `index_M` are the step's examples."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        values_M, visits_M = log_u.values[index_M].clone(), log_u.visits[index_M].clone()
        return cls(index_M, values_M, visits_M, copy.deepcopy(metrics), torch.get_rng_state(), cuda)

    def restore(self, log_u: LogU) -> StepMetrics:
        """Restores the table and the random state; returns a copy of the metrics."""
        log_u.values[self.index_M], log_u.visits[self.index_M] = self.values_M, self.visits_M
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        return copy.deepcopy(self.metrics)
