"""How a micro-batch becomes a gradient within a budget of tokens: what shares a forward pass, what goes backward.

An objective sees summed log-probabilities only. So its derivative by each of them, the completion's *pull*, is known
once all are scored, and the gradient of the micro-batch is the sum of pull * grad log P over completions, in any order
and any grouping. That makes memory independent of the number of negatives, and lets negatives that no longer pull go.

Shape suffixes: M prompts of a micro-batch, K completions of a prompt (its negatives first), B negatives of a prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.logprobs import CompletionLogps, Group, Head, score

# surrogate(numbers, logps): the loss of the prompts `numbers`, from their completions' log-probabilities [.., K]
Surrogate = Callable[[Sequence[int], Tensor], Tensor]
HeadLogps = Callable[[Tensor, Head, Tensor], Tensor]
# backward(share, last): backpropagates a pass's share of a loss; is it the micro-batch's last?
Backward = Callable[[Tensor, bool], None]
IDLE = Group([0], [[0]])  # what a rank scores in a pass that only other ranks need


@dataclass(frozen=True)
class Scored:
    """Detached log-probabilities [M, K] and which negatives were left out [M, B].

    `computed` counts the tokens of all forward passes, `needed` those of them that are not padding.
    """

    logps_MK: Tensor
    skipped_MB: Tensor
    computed: int
    needed: int


@dataclass
class Passes:
    """Forward and backward passes of at most `budget` tokens each.

    Args:
        skip_negligible: the share of the pull that may be left out of the backward pass, see `negligible`; 0: nothing.
        backward_cost: of a token, in forward passes.
        knows_last: the completion's pull does not depend on its score, so it need not be scored first.
        head_logps: another density than the model's own, see `logps.score`; for scoring only.
        token_weight, predicted_share: see `logps.score`; not for the reference, whose scores are plain.
        in_step: all ranks run equally many passes, idle ones where others have more: with sharded parameters every
            pass needs all of them.
    """

    layout: str
    chunk_size: int
    budget: int
    skip_negligible: float = 0.0
    backward_cost: float = 1.4
    knows_last: bool = False
    head_logps: HeadLogps | None = None
    token_weight: Callable[[Tensor, Tensor], Tensor] | None = None
    predicted_share: float = 0.0
    in_step: bool = False
    expected_skips: float = 0.0  # the share of negative tokens that the last micro-batches could leave out

    @torch.no_grad()
    def score(self, model: nn.Module, groups: Sequence[Group]) -> Tensor:
        """Plain log-probabilities [M, K] of every group's completions (all groups have K), without gradient."""
        while True:
            try:
                return self._score_pieces(model, groups, self._pieces(groups), weighted=False)[0]
            except torch.OutOfMemoryError as error:
                self.shrink(groups, error)

    def backpropagate(
        self, model: nn.Module, groups: Sequence[Group], surrogate: Surrogate, backward: Backward
    ) -> Scored:
        """Accumulates the gradient of the surrogate of all groups; `backward` takes a pass's share of it."""
        if self.most(self._in_two(groups)):
            return self._score_then_backpropagate(model, groups, surrogate, backward)
        rows, computed = {}, 0
        needed = sum(num_tokens(group, self.layout) for group in groups)
        for numbers, last in self._turns(groups):
            out = self.forward(model, [groups[i] for i in numbers] or [IDLE])
            if not numbers:
                backward(0 * out.logps_C.sum(), last)
                continue
            logps_MK = out.logps_C.view(len(numbers), -1)
            backward(surrogate(numbers, logps_MK), last)
            rows |= dict(zip(numbers, logps_MK.detach(), strict=True))
            computed += out.computed
        logps_MK = torch.stack([rows[i] for i in range(len(groups))])
        if self.skip_negligible > 0 and logps_MK.shape[1] > 1:
            self._negligible(groups, self._pull(surrogate, logps_MK))  # for what the next micro-batches expect
        nothing_MB = torch.zeros_like(logps_MK[:, :-1], dtype=torch.bool)
        return Scored(logps_MK, nothing_MB, computed, needed)

    def forward(self, model: nn.Module, groups: Sequence[Group], weighted: bool = True) -> CompletionLogps:
        """One pass over all groups; `weighted` as the objective wants tokens read and weighed."""
        for_objective = (self.token_weight, self.predicted_share) if weighted else ()
        return score(model, groups, self.layout, self.chunk_size, self.head_logps, *for_objective)

    def shrink(self, groups: Sequence[Group], error: torch.OutOfMemoryError) -> None:
        """Halves the budget after these groups ran out of memory, and says so.

        Raises:
            UserError: one prompt with one completion fills the budget already, or other ranks are in the midst of the
                same pass; with advice.
        """
        if self.in_step:
            raise self.no_room() from error
        longest = max(len(g.prompt_ids) + max(map(len, g.completions)) for g in groups)
        if self.budget <= longest:
            raise UserError(
                f"out of memory in a pass of at most {self.budget} tokens, which one prompt with one completion may "
                "need. Lower training.max_length, set training.gradient_checkpointing=true, load the base in 4 bit, or "
                "use a smaller adapter; `lowdft plan` shows what takes the memory."
            ) from error
        self.budget = max(longest, min(self.budget, sum(num_tokens(g, self.layout) for g in groups)) // 2)
        warnings.warn(
            f"out of memory: from here a pass takes at most {self.budget} tokens, and what failed is computed again. "
            f"training.tokens_per_pass={self.budget} saves the attempt.",
            stacklevel=2,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def no_room(self) -> UserError:
        """What to tell when one of several ranks runs out of memory in a pass that others are in, too."""
        return UserError(
            f"out of memory in a pass of at most {self.budget} tokens. Other processes wait for this one, so it cannot "
            f"be tried again in smaller passes: set training.tokens_per_pass={self.budget // 2} and run the same "
            "command again, which goes on from the last checkpoint."
        )

    def _score_then_backpropagate(self, model, groups, surrogate, backward) -> Scored:
        last = len(groups[0].completions) - 1
        with torch.no_grad():
            first = range(last + (not self.knows_last))
            logps_MK, computed, needed = self._score_pieces(model, groups, self._pieces(groups, [first] * len(groups)))
        pull_MK = self._pull(surrogate, logps_MK)
        skip_MB = self._negligible(groups, pull_MK)
        kept = [[*(~skip).nonzero()[:, 0].tolist(), last] for skip in skip_MB]
        pieces = self._pieces(groups, kept)
        again_MK, computed_again, needed_again = self._score_pieces(model, groups, pieces, pull_MK, backward)
        logps_MK[:, last] = again_MK[:, last]
        return Scored(logps_MK, skip_MB, computed + computed_again, needed + needed_again)

    def _score_pieces(self, model, groups, pieces, pull_MK=None, backward=None, weighted=True):
        """Detached log-probabilities [M, K] of (group, completions) pieces, 0 elsewhere; tokens computed and needed.

        With a pull, every pass is backpropagated before the next begins.
        """
        parts = [groups[i].select(completions) for i, completions in pieces]
        found, computed = [], 0
        for numbers, last in self._turns(parts):
            out = self.forward(model, [parts[n] for n in numbers] or [IDLE], weighted)
            if not numbers:
                if backward is not None:
                    backward(0 * out.logps_C.sum(), last)
                continue
            at = [(pieces[n][0], k) for n in numbers for k in pieces[n][1]]
            if backward is not None:
                pull_C = torch.stack([pull_MK[place] for place in at])
                backward((out.logps_C * pull_C.to(out.logps_C)).sum(), last)
            found.append((at, out.logps_C.detach()))
            computed += out.computed
        logps_MK = found[0][1].new_zeros(len(groups), len(groups[0].completions))
        for at, logps_C in found:
            rows, columns = zip(*at, strict=True)
            logps_MK[list(rows), list(columns)] = logps_C
        return logps_MK, computed, sum(num_tokens(part, self.layout) for part in parts)

    def _pull(self, surrogate: Surrogate, logps_MK: Tensor) -> Tensor:
        leaf_MK = logps_MK.detach().clone().requires_grad_()
        return torch.autograd.grad(surrogate(range(len(leaf_MK)), leaf_MK), leaf_MK)[0]

    def _negligible(self, groups: Sequence[Group], pull_MK: Tensor) -> Tensor:
        tokens_MK = torch.tensor([group.scored_tokens for group in groups], device=pull_MK.device)
        skip_MB = negligible(pull_MK, tokens_MK, self.skip_negligible)
        share = (skip_MB * tokens_MK[:, :-1]).sum().item() / max(1, tokens_MK[:, :-1].sum().item())
        self.expected_skips = (self.expected_skips + share) / 2
        return skip_MB

    def _in_two(self, groups: Sequence[Group]) -> bool:
        """Must the micro-batch be scored before anything is backpropagated, or is that cheaper?"""
        if len(groups[0].completions) == 1:
            return False
        sizes = [num_tokens(group, self.layout) for group in groups]
        if max(sizes) > self.budget:
            return True
        prompt = sum(len(g.prompt_ids) for g in groups)
        negative = sum(len(c) for g in groups for c in g.completions[:-1])
        last = sum(len(g.completions[-1]) for g in groups)
        both = 1 + self.backward_cost
        first = prompt + negative + (0 if self.knows_last else last)
        second = both * (prompt + last + (1 - self.expected_skips) * negative)
        return self.skip_negligible > 0 and first + second < both * (prompt + negative + last)

    def _turns(self, groups: Sequence[Group]) -> Iterator[tuple[list[int], bool]]:
        """(groups that share a pass, is it the last?); none of them where only other ranks have work left."""
        own = self._split(groups)
        turns = self.most(len(own))
        for n in range(turns):
            yield (own[n] if n < len(own) else []), n == turns - 1

    def most(self, value: int) -> int:
        """The largest value of all ranks, where they must do the same; else this rank's own."""
        return max(collectives.from_all(value)) if self.in_step else value

    def _split(self, groups: Sequence[Group]) -> list[list[int]]:
        """Groups (by number) that share a pass, like lengths together; one longer than the budget comes alone."""
        sizes = [num_tokens(group, self.layout) for group in groups]
        passes, used = [], self.budget
        for i in sorted(range(len(groups)), key=lambda i: -sizes[i]):
            if used + sizes[i] > self.budget:
                passes.append([])
                used = 0
            passes[-1].append(i)
            used += sizes[i]
        return passes

    def _pieces(self, groups: Sequence[Group], kept: Sequence[Sequence[int]] | None = None):
        """(group, its completions) pieces that fit the budget, or hold one completion."""
        pieces = []
        for i, group in enumerate(groups):
            piece: list[int] = []
            for k in range(len(group.completions)) if kept is None else kept[i]:
                if piece and num_tokens(group.select([*piece, k]), self.layout) > self.budget:
                    pieces.append((i, piece))
                    piece = []
                piece = [*piece, k]
            pieces.append((i, piece))
        return pieces


def negligible(pull_MK: Tensor, tokens_MK: Tensor, bound: float) -> Tensor:
    """Bool [M, B]: negatives that the backward pass may leave out.

    A completion counts with |pull| times its tokens. The smallest counts go, while together they stay under `bound`
    times the count of all. The relative error of the gradient is then at most `bound` * r, where r is the norm of a
    left-out token's grad log P over the norm of the gradient per unit of count. (r is near 1 when gradients of tokens
    point alike, and grows with the square root of their number when they do not.)
    """
    count_MK = pull_MK.abs().double() * tokens_MK
    ordered_X, order_X = count_MK[:, :-1].flatten().sort()
    out = torch.zeros_like(ordered_X, dtype=torch.bool)
    out[order_X] = (ordered_X.cumsum(0) <= bound * count_MK.sum()) & (bound > 0)
    return out.view(pull_MK.shape[0], -1)


def num_tokens(group: Group, layout: str) -> int:
    """Tokens that a forward pass computes for a group (padding between rows not counted)."""
    prompts = len(group.completions) if layout == "padded" else 1
    return prompts * len(group.prompt_ids) + sum(map(len, group.completions))
