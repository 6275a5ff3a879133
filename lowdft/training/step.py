"""One optimizer step: what its losses are divided by, and the way back to its beginning."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowdft.data.batch import Batch
from lowdft.training.log_u import LogU
from lowdft.training.metrics import StepMetrics


@dataclass
class Step:
    """One optimizer step: what its losses are divided by, and how to begin it again.

    `prompts`, `tokens` (of completions) and `mismatched_gain` (for KTO) are those of all ranks and micro-batches.
    """

    prompts: int = 1
    tokens: int = 1
    mismatched_gain: float = 0.0
    done: list[Batch] = field(default_factory=list)

    def remember(self, log_u: LogU, index: Tensor, metrics: StepMetrics) -> None:
        """Keeps what `begin_again` goes back to; `index` are the step's examples."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        values, visits = log_u.values[index].clone(), log_u.visits[index].clone()
        self._start = (index, values, visits, copy.deepcopy(metrics), torch.get_rng_state(), cuda)

    def begin_again(self, log_u: LogU, metrics: StepMetrics, model: nn.Module) -> list[Batch]:
        """Tables, random numbers and gradients as at the step's beginning; returns the micro-batches to do again."""
        index, values, visits, old, cpu, cuda = self._start
        log_u.values[index], log_u.visits[index] = values, visits
        vars(metrics).update(copy.deepcopy(vars(old)))
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        model.zero_grad(set_to_none=True)
        done, self.done = self.done, []
        return done
