"""The interface of every objective: `Scores` in, `Losses` out.

Shape suffixes: M prompts of a micro-batch, B negatives of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

NEEDS = {
    "negatives": "B negatives per prompt and visit",
    "reference": "the reference's log-probabilities of the negatives",
    "completion_reference": "the reference's log-probability of the completion",
    "log_u": "a moving average per example",
    "mismatched": "completions scored under other rows' prompts (at least two prompts per micro-batch)",
    "predictions": "input embeddings mixed with those of the model's predictions, by `predicted_share`",
    "aligned": "`aligned_logps` of every row, computed beforehand with aligned models",
}


@dataclass
class Scores:
    """Summed log-probabilities (nats) of a micro-batch, and other inputs that an objective may need.

    Policy tensors have gradients, reference tensors never do. Inputs that are not declared in `needs` are None.
    """

    policy_logps_M: Tensor
    completion_tokens_M: Tensor
    policy_negative_logps_MB: Tensor | None = None
    negative_tokens_MB: Tensor | None = None
    ref_negative_logps_MB: Tensor | None = None
    log_u_M: Tensor | None = None  # None: no moving average (evaluation), as with gamma = 1; NaN: not started yet
    tokens_per_prompt: float | Tensor = 1.0  # completion tokens of the whole optimizer step over its prompts
    ref_logps_M: Tensor | None = None
    mismatched_gain_M: Tensor | None = None  # mean log policy - log reference under other prompts, over the step
    aligned_logps_M: Tensor | None = None  # mean log-probability per token of the completion under aligned models


@dataclass
class Losses:
    """One loss per prompt; the loss of a step is the mean over its prompts.

    `surrogate_M` has the objective's gradient; `value_M` (detached) is the number that is logged. `log_u_M` holds the
    new moving averages, `weights_MB` (detached) how hard each negative is pushed down.
    """

    surrogate_M: Tensor
    value_M: Tensor
    log_u_M: Tensor | None = None
    weights_MB: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A named loss: `compute(scores, **hyperparameters) -> Losses`.

    `needs` is a subset of `NEEDS`: what the trainer has to prepare. `per_token`: the objective compares completions by
    mean instead of summed log-probability. `linear`: the surrogate is linear in the completion's score, so its
    derivative is known before the completion is scored. `token_weight` maps the log-probabilities [S] of tokens, and
    the index [S] of the completion that each belongs to (ascending), to their weights in the sums that the objective
    sees (default 1); it is also passed the hyper-parameters.
    """

    name: str
    compute: Callable[..., Losses]
    source: str
    defaults: Mapping[str, object] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    per_token: bool = False
    linear: bool = False
    token_weight: Callable[..., Tensor] | None = None

    def __post_init__(self):
        assert self.needs <= NEEDS.keys(), self.needs

    @property
    def uses_negatives(self) -> bool:
        """Whether it compares the completion with negatives."""
        return "negatives" in self.needs

    @property
    def uses_reference(self) -> bool:
        """Whether it needs the reference's log-probabilities of the negatives."""
        return "reference" in self.needs

    @property
    def uses_completion_reference(self) -> bool:
        """Whether it needs the reference's log-probability of the completion."""
        return "completion_reference" in self.needs

    @property
    def uses_any_reference(self) -> bool:
        """Whether it needs the reference at all."""
        return self.uses_reference or self.uses_completion_reference

    @property
    def uses_log_u(self) -> bool:
        """Whether it keeps a moving average per example."""
        return "log_u" in self.needs

    @property
    def uses_mismatched(self) -> bool:
        """Whether it needs completions scored under other prompts."""
        return "mismatched" in self.needs

    @property
    def uses_predictions(self) -> bool:
        """Whether it mixes the model's own predictions into the input."""
        return "predictions" in self.needs

    @property
    def uses_aligned(self) -> bool:
        """Whether it needs `aligned_logps` of every row."""
        return "aligned" in self.needs

    @torch.enable_grad()
    def try_out(self, hyperparameters: Mapping[str, object]) -> Losses:
        """The losses of two made-up prompts, to find bad hyper-parameters before anything is loaded.

        The policy is as far from the reference for every completion.

        Raises:
            ValueError: with these hyper-parameters the loss cannot be computed, is not finite, or does not fall when
                completions become likelier.
        """
        some_M, some_MB = torch.tensor([-3.0, -5.0], requires_grad=True), torch.tensor([[-4.0, -1.0], [-6.0, -9.0]])
        tokens_M, tokens_MB = torch.tensor([2, 3]), torch.tensor([[2, 1], [3, 4]])
        ref_MB, ref_M = some_MB - 1, some_M.detach() - 1
        scores = Scores(some_M, tokens_M, some_MB, tokens_MB, ref_MB, torch.zeros(2), 2.5, ref_M)
        scores.mismatched_gain_M, scores.aligned_logps_M = torch.ones(2), torch.full((2,), -1.0)
        try:
            if "beta" in hyperparameters and not 0 < hyperparameters["beta"] < math.inf:
                raise ValueError(f"{self.name}: beta is {hyperparameters['beta']!r}; wanted a number above 0")
            if not 0 <= (smoothing := hyperparameters.get("label_smoothing", 0)) < 0.5:
                raise ValueError(f"{self.name}: label_smoothing is {smoothing!r}; wanted a number from 0 to below 0.5")
            losses = self.compute(scores, **hyperparameters)
            loss_M = losses.surrogate_M
            if self.token_weight is not None:
                loss_M = loss_M * self.token_weight(some_M.detach(), torch.tensor([0, 1]), **hyperparameters)
        except (TypeError, RuntimeError, ArithmeticError) as error:
            raise ValueError(f"{self.name} cannot be computed with {dict(hyperparameters)}: {error}") from error
        if not loss_M.isfinite().all():
            raise ValueError(f"{self.name} is not finite with {dict(hyperparameters)}")
        (pull_M,) = torch.autograd.grad(loss_M.sum(), some_M)
        if (pull_M > 0).any() or not pull_M.any():
            raise ValueError(
                f"{self.name} would not make good answers likelier with {dict(hyperparameters)}: its loss does not "
                "fall with them. Check the signs of these numbers."
            )
        return losses


def plain(loss_M: Tensor) -> Losses:
    """Losses whose surrogate is the loss itself."""
    return Losses(surrogate_M=loss_M, value_M=loss_M.detach())
