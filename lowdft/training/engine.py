"""One optimizer step of any objective: from its micro-batches to a gradient and the new `log_u`.

This is Algorithm 1 of arXiv 2502.18679 with everything that a large model needs; the algorithm alone is in
`examples/dft_in_one_file.py`. The engine does not depend on a trainer; any training loop can use it:

    engine.begin(batches, step)
    for batch in batches:
        engine.accumulate(batch)
    optimizer.step(); optimizer.zero_grad()

From a prompt to a gradient: the batch chooses the negatives of this visit, `Passes` scores negatives and completion
within a token budget, and the objective turns the summed log-probabilities into one loss per prompt and the new
`log_u`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lowdft.data.batch import Batch
from lowdft.distributed import collectives
from lowdft.errors import is_out_of_memory
from lowdft.logprobs import Group
from lowdft.models.reference import reference_logps
from lowdft.objectives import Losses, Objective, Scores
from lowdft.training import finite
from lowdft.training.log_u import LogU
from lowdft.training.metrics import StepMetrics, check_gap
from lowdft.training.score_inputs import mismatched_gain, prepare
from lowdft.training.step import Snapshot, StepTotals
from lowdft.training.token_budget import Backward, Passes


class StepEngine:
    """Accumulates the gradient of an objective over micro-batches, and keeps the table `log_u`.

    Args:
        model: a causal language model with its adapter and wrappers; in train mode for `accumulate`, in eval mode for
            `evaluate`.
        objective: the objective to minimize; called with `hyperparameters`.
        log_u: the table of the training examples; `Batch.index_M` are positions in it.
        passes: splits a micro-batch into forward passes.
        negatives_per_step: B, the number of negatives that a prompt uses per visit.
        reference_prompt: "training" or "sampling", if the model without adapter is the reference.
        backward: backpropagates a pass's share of the loss; `loss.backward()` by default.
        around: a context for every pass (autocast, hooks on saved tensors).
        spare: a row that a rank scores with weight 0 when only other ranks have work left.

    Attributes:
        metrics, evaluation: `StepMetrics` of training and of evaluation.
        totals: the `StepTotals` of the current step.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        hyperparameters: Mapping[str, object],
        log_u: LogU,
        passes: Passes,
        negatives_per_step: int = 1,
        reference_prompt: str = "training",
        backward: Backward | None = None,
        around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        spare: dict | None = None,
    ):
        self.model, self.objective, self.hyperparameters = model, objective, dict(hyperparameters)
        self.log_u, self.passes, self.spare = log_u, passes, spare
        self.reference_prompt, self.around = reference_prompt, around
        self.count = negatives_per_step if objective.uses_negatives else 0
        self.metrics, self.evaluation = StepMetrics(), StepMetrics()
        self.totals, self.step = StepTotals(), 0
        self._evaluating, self._largest = False, 0.0  # the largest |log-probability| of the step
        self._backward = backward or (lambda loss, last: loss.backward())
        self._done: list[Batch] = []
        self._left, self._most, self._first = 0, 0, True
        self.computes_in: torch.dtype | None = None  # the dtype of the layers, if it is not that of the weights
        self.starts_as_reference = False  # is the policy, before the first step, the model that scored the reference?
        self._start: Snapshot | None = None
        self._last: tuple[Batch, Tensor, Callable[[Tensor], Tensor]] | None = None  # with log-probs and their surrogate

    @property
    def policy(self) -> nn.Module:
        """The model without the wrapper of a library for several processes."""
        return getattr(self.model, "module", self.model)

    # ---- training ---------------------------------------------------------------------------------------------------

    def begin(self, batches: Sequence[Batch], step: int = 0) -> int:
        """Begins an optimizer step: saves the state to return to, and returns the number of prompts on all ranks.

        Args:
            batches: this rank's micro-batches, in the order in which they will be passed to `accumulate`.
            step: the number of the step, for error messages.
        """
        prompts, tokens = sum(map(len, batches)), sum(batch.completion_tokens for batch in batches)
        prompts, tokens = collectives.total([prompts, tokens], self.passes.device)
        self._most = collectives.largest(max(map(len, batches), default=0), self.passes.device)
        with self.around():
            self.totals = StepTotals(max(1, prompts), max(1, tokens), self._mismatched_gain(batches))
        index_M = torch.cat([batch.index_M for batch in batches] or [torch.zeros(0, dtype=torch.int64)])
        self._start = Snapshot.take(self.log_u, index_M, self.metrics)
        self._first = not self.log_u.visits.any()
        self._done, self._left, self.step = [], len(batches), step
        self._evaluating, self._largest = False, 0.0
        return prompts

    def accumulate(self, batch: Batch) -> Tensor:
        """Adds the gradient of a micro-batch, updates `log_u`, and returns its share of the step's loss (a scalar).

        With several ranks the step's loss is the mean of their shares. Every rank then knows all updates of `log_u`,
        and after the last micro-batch all have the same gradient.

        Raises:
            UserError: a log-probability or a loss is not finite (names the step and the rows); or out of memory with
                one completion in a pass, or with several ranks.
        """
        self._left -= 1
        if collectives.world_size() > 1:
            return self._among_ranks(batch)
        todo = [batch]
        while todo:
            try:
                loss = self._backpropagate(todo[0])
                self._done.append(todo.pop(0))
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # its frames hold on to the tensors of the failed pass
            self.passes.shrink(self._groups(todo[0]), failure)
            todo = self._begin_again() + todo
        return loss

    def _begin_again(self) -> list[Batch]:
        """Restores the state at the beginning of the step; returns the micro-batches to repeat."""
        self.metrics = self._start.restore(self.log_u)
        self.model.zero_grad(set_to_none=True)
        done, self._done = self._done, []
        return done

    def _among_ranks(self, batch: Batch) -> Tensor:
        loss = torch.zeros((), device=self.passes.device)
        try:
            if len(batch):
                loss = self._backpropagate(batch)
            elif self.passes.in_step:
                self._idle()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self.passes.no_room() from error
        mine = (batch.index_M, self.log_u.values[batch.index_M], self.log_u.visits[batch.index_M])
        index, *updates = collectives.updates_from_all(*mine, self._most, self.passes.device)
        self.log_u.values[index], self.log_u.visits[index] = updates
        if self._left == 0 and not self.passes.in_step:
            collectives.average_gradients(self.model.parameters())
        return loss

    def _backpropagate(self, batch: Batch) -> Tensor:
        groups, totals = self._groups(batch), self.totals
        with self.around():
            given = self._given(batch, self.log_u.visits[batch.index_M], totals)
            if self.objective.uses_log_u:
                given["log_u_M"] = self.log_u.values[batch.index_M]

            def losses(numbers: Sequence[int], logps_MK: Tensor) -> tuple[Scores, Losses]:
                chosen = list(numbers)
                part = {name: value[chosen] for name, value in given.items()}
                return self._losses([groups[i] for i in chosen], logps_MK, part, totals)

            def surrogate(numbers: Sequence[int], logps_MK: Tensor) -> Tensor:
                return losses(numbers, logps_MK)[1].surrogate_M.sum() / totals.prompts

            scored = self.passes.backpropagate(self.model, groups, surrogate, self._scaled_backward)
        scores, final = losses(range(len(batch)), scored.logps_MK)
        self._require_finite("log-probabilities", scored.logps_MK, batch)
        self._require_finite("losses", torch.stack([final.surrogate_M.detach(), final.value_M], 1), batch)
        self._largest = max(self._largest, scored.logps_MK.abs().max().item())
        self._last = batch, scored.logps_MK, lambda logps_MK: losses(range(len(batch)), logps_MK)[1].surrogate_M.sum()
        self.log_u.update(batch.index_M, final.log_u_M)
        self.metrics.add(scores, final, self.objective, batch, scored)
        if self._first:
            self.metrics.gap(scores)
            if self.starts_as_reference:
                check_gap(scores, batch, self.computes_in or self.policy.get_output_embeddings().weight.dtype)
        return final.value_M.sum() / totals.prompts * collectives.world_size()

    def _scaled_backward(self, loss: Tensor, last: bool) -> None:
        self._backward(loss * collectives.world_size(), last)  # the mean over ranks is taken

    def _idle(self) -> None:
        """Runs passes of weight 0 on a rank without examples in this micro-batch, in step with the other ranks."""
        spare = Batch(torch.zeros(1, dtype=torch.int64), [self.spare])
        with self.around():
            self._given(spare, self.log_u.visits[spare.index_M], self.totals)
            nothing = lambda numbers, logps_MK: 0 * logps_MK.sum()  # noqa: E731
            self.passes.backpropagate(self.model, self._groups(spare), nothing, self._scaled_backward)

    # ---- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """The mean loss of some rows (a scalar), with their first negatives and no moving averages (as with gamma = 1).

        Raises:
            UserError: a log-probability or a loss is not finite; names the rows.
        """
        first_M = torch.zeros(len(batch), dtype=torch.int64)
        groups, self._evaluating = self._groups(batch, first_M), True
        with self.around():
            totals = StepTotals(len(batch), batch.completion_tokens, self._mismatched_gain([batch]))
            given = self._given(batch, first_M, totals)
            logps_MK = self.passes.score(self.model, groups, weighted=True)
        scores, losses = self._losses(groups, logps_MK, given, totals)
        self._require_finite("log-probabilities", logps_MK, batch)
        self._require_finite("losses", losses.value_M[:, None], batch)
        self.evaluation.add(scores, losses, self.objective, batch)
        return losses.value_M.mean()

    # ---- used by both -----------------------------------------------------------------------------------------------

    def _groups(self, batch: Batch, visits_M: Tensor | None = None) -> list[Group]:
        """The groups to score for a visit of each prompt; by default, the next visit."""
        visits_M = self.log_u.visits[batch.index_M] if visits_M is None else visits_M
        return batch.groups(batch.negatives(visits_M, self.count))

    def _losses(
        self, groups: Sequence[Group], logps_MK: Tensor, given: Mapping[str, Tensor], totals: StepTotals
    ) -> tuple[Scores, Losses]:
        """The objective of a scored micro-batch; of K completions the negatives come first."""
        tokens_MK = torch.tensor([group.scored_tokens for group in groups], device=logps_MK.device)
        scores = Scores(logps_MK[:, -1], tokens_MK[:, -1], tokens_per_prompt=totals.tokens / totals.prompts)
        if self.count:
            scores.policy_negative_logps_MB, scores.negative_tokens_MB = logps_MK[:, :-1], tokens_MK[:, :-1]
        for name, value in given.items():
            setattr(scores, name, value.to(logps_MK))
        return scores, self.objective.compute(scores, **self.hyperparameters)

    def _given(self, batch: Batch, visits_M: Tensor, totals: StepTotals) -> dict[str, Tensor]:
        """The other inputs of the objective, besides the policy's scores: fields of `Scores`, one row per prompt."""
        how = (self.count, self.objective, self.reference_prompt, self.passes)
        given = prepare(self.policy, batch, visits_M, *how)
        for name, value in given.items():
            what = "reference's log-probabilities" if name.startswith("ref") else name.removesuffix("_M")
            self._require_finite(what, value, batch)
        if self.objective.uses_mismatched:
            given["mismatched_gain_M"] = torch.full((len(batch),), totals.mismatched_gain, dtype=torch.float64)
        return given

    def _mismatched_gain(self, batches: Sequence[Batch]) -> float:
        return mismatched_gain(self.policy, batches, self.passes) if self.objective.uses_mismatched else 0.0

    def check_gradient(self, norm: float, scaled: bool = False) -> None:
        """Raises UserError for a step whose gradient is not finite, or zero although the objective wants to change it.

        Call it before the optimizer's step.

        Args:
            scaled: a loss scaler handles overflows and skips such steps.
        """
        if scaled:
            return
        if not math.isfinite(norm):
            raise finite.bad_gradient(self.step, norm, self._done, self._largest)
        if norm == 0 and self._last and finite.acts(*self._last[1:]):
            raise finite.no_gradient(self.step, self._last[0], self._largest)

    def check_weights(self) -> None:
        """Raises UserError if the current weights give a training row no finite score.

        Call it on every rank before anything is saved.
        """
        spare = Batch(torch.zeros(1, dtype=torch.int64), [self.spare])
        with self.around():
            logps_1K = reference_logps(self.policy, self._groups(spare, spare.index_M), self.passes)
        if not logps_1K.isfinite().all():
            raise finite.bad_weights(self.step, self.spare, self._largest)

    def _require_finite(self, what: str, values: Tensor, batch: Batch) -> None:
        finite.require_rows(self.step, self._evaluating, what, values, batch)

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The state for an exact resume: the table, and the budget of passes (rounding depends on it)."""
        return self.log_u.state_dict() | self.passes.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a `state_dict`; the budget of passes only if `tokens_per_pass` is the same."""
        self.log_u.load_state_dict(state)
        self.passes.load_state_dict(state)
