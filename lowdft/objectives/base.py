"""What every objective takes and gives.

Shape suffixes: M prompts of a micro-batch, B negatives of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Scores:
    """Summed log-probabilities (nats) of a micro-batch and what else an objective may need.

    Policy tensors carry gradients, reference tensors never do. What an objective did not declare in `needs` is None.
    """

    policy_logps_M: Tensor
    completion_tokens_M: Tensor
    policy_negative_logps_MB: Tensor | None = None
    negative_tokens_MB: Tensor | None = None
    ref_negative_logps_MB: Tensor | None = None
    log_u_M: Tensor | None = None  # None: no moving average (evaluation), as with gamma = 1; NaN: not started yet
    tokens_per_prompt: float | Tensor = 1.0  # completion tokens of the whole optimizer step over its prompts


@dataclass
class Losses:
    """One loss a prompt; the loss of a step is their mean over the step's prompts.

    `surrogate_M` has the objective's gradient, `value_M` (detached) is the number to show people. `log_u_M` holds the
    new moving averages; `weights_MB` (detached) how hard each negative is pushed.
    """

    surrogate_M: Tensor
    value_M: Tensor
    log_u_M: Tensor | None = None
    weights_MB: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A named loss: `compute(scores, **hyperparameters) -> Losses`.

    `needs` is a subset of {"negatives", "reference", "log_u"}: what the trainer has to prepare. `per_token` says that
    the objective compares completions by mean rather than summed log-probability. `linear` says that the surrogate is
    linear in the completion's score, so that its derivative is known before the completion is scored.
    """

    name: str
    compute: Callable[..., Losses]
    source: str
    defaults: Mapping[str, float] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    per_token: bool = False
    linear: bool = False
