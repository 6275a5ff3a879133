"""Computes the gradient of a micro-batch within a token budget: splits it into forward and backward passes.

An objective only depends on summed log-probabilities. So its derivative with respect to each of them, called the
completion's *pull*, is known once all completions are scored, and the gradient of the micro-batch is the sum of
pull * grad log P over completions, in any order and grouping. So memory does not depend on the number of negatives.

Shape suffixes: M prompts of a micro-batch, K completions of a prompt (its negatives first).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowdft.distributed import collectives
from lowdft.errors import UserError, is_out_of_memory
from lowdft.logprobs import CompletionLogps, Group, Head, bare, packed_attention, score

# surrogate(numbers, logps): the loss of the prompts `numbers`, from their completions' log-probabilities [.., K]
Surrogate = Callable[[Sequence[int], Tensor], Tensor]
HeadLogps = Callable[[Tensor, Head, Tensor], Tensor]
# backward(share, last): backpropagates a pass's share of a loss; `last`: it is the micro-batch's last pass
Backward = Callable[[Tensor, bool], None]
IDLE = Group([0], [[0]])  # scored by a rank in a pass that only other ranks need


@dataclass(frozen=True)
class Scored:
    """Detached log-probabilities [M, K].

    `computed` counts the tokens of all forward passes, `needed` those that are not padding.
    """

    logps_MK: Tensor
    computed: int
    needed: int


@dataclass
class Passes:
    """Forward and backward passes of at most `budget` tokens each.

    Args:
        chunk_size: see `logprobs.score`.
        tokens_per_pass: the initial budget; `shrink` lowers it.
        knows_last: the pull of the last completion does not depend on its score, so it need not be scored first.
        head_logps: a density other than the model's, see `logprobs.score`; for scoring only.
        token_weight, predicted_share: see `logprobs.score`; not used for the reference.
        in_step: all ranks run the same number of passes, with idle ones if needed; with sharded parameters every pass
            needs all ranks.
        device: the device on which ranks exchange tensors.
    """

    layout: str
    chunk_size: int | None
    tokens_per_pass: int
    knows_last: bool = False
    head_logps: HeadLogps | None = None
    token_weight: Callable[[Tensor, Tensor], Tensor] | None = None
    predicted_share: float = 0.0
    in_step: bool = False
    device: torch.device = torch.device("cpu")
    budget: int = field(init=False)

    def __post_init__(self):
        self.budget = self.tokens_per_pass

    def state_dict(self) -> dict[str, Tensor]:
        """The budget, and the setting that it started from."""
        return {name: torch.tensor(getattr(self, name)) for name in ("tokens_per_pass", "budget")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the budget, unless `tokens_per_pass` has changed since."""
        if int(state["tokens_per_pass"]) == self.tokens_per_pass:
            self.budget = int(state["budget"])

    @torch.no_grad()
    def score(self, model: nn.Module, groups: Sequence[Group], weighted: bool = False) -> Tensor:
        """Log-probabilities [M, K] of every group's completions (all groups have K), without gradient.

        With `weighted`, as the objective sees them (with token weights and predictions).
        """
        while True:
            try:
                return self._score_pieces(model, groups, self._pieces(groups), weighted=weighted)[0]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # its frames hold on to the tensors of the failed pass
            self.shrink(groups, failure)

    def backpropagate(
        self, model: nn.Module, groups: Sequence[Group], surrogate: Surrogate, backward: Backward
    ) -> Scored:
        """Accumulates the gradient of the surrogate of all groups; `backward` is called with each pass's share."""
        packed = packed_attention(bare(model)) if self.layout == "packed" else contextlib.nullcontext()
        with packed:  # gradient checkpointing runs layers again in the backward pass
            if self.most(self._in_two(groups)):
                return self._score_then_backpropagate(model, groups, surrogate, backward)
            return self._in_one(model, groups, surrogate, backward)

    def _in_one(self, model, groups, surrogate, backward) -> Scored:
        """Backpropagates when every group fits into a pass."""
        rows, computed = {}, 0
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
        return Scored(logps_MK, computed, sum(num_tokens(group, self.layout) for group in groups))

    def forward(self, model: nn.Module, groups: Sequence[Group], weighted: bool = True) -> CompletionLogps:
        """One pass over all groups; `weighted` as in `score`."""
        for_objective = (self.token_weight, self.predicted_share) if weighted else ()
        return score(model, groups, self.layout, self.chunk_size, self.head_logps, *for_objective)

    def shrink(self, groups: Sequence[Group], error: BaseException) -> None:
        """Halves the budget after these groups ran out of memory, with a warning.

        Raises:
            UserError: one prompt with one completion already fills the budget, or other ranks are in the middle of the
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
            f"Set training.tokens_per_pass={self.budget} to avoid the failed attempt.",
            stacklevel=2,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def no_room(self) -> UserError:
        """The error of one of several ranks that ran out of memory in a pass that they all share."""
        return UserError(
            f"out of memory in a pass of at most {self.budget} tokens. Other processes wait for this one, so it cannot "
            f"retry with smaller passes: set training.tokens_per_pass={self.budget // 2} and run the same command "
            "again, which resumes from the last checkpoint."
        )

    def _score_then_backpropagate(self, model, groups, surrogate, backward) -> Scored:
        last = len(groups[0].completions) - 1
        first = range(last + (not self.knows_last))
        with torch.no_grad():
            pieces = self._pieces([group.select(first) for group in groups])
            logps_MK, computed, needed = self._score_pieces(model, groups, pieces)
        leaf_MK = logps_MK.requires_grad_()
        (pull_MK,) = torch.autograd.grad(surrogate(range(len(groups)), leaf_MK), leaf_MK)
        again = self._score_pieces(model, groups, self._pieces(groups), pull_MK, backward)
        logps_MK = torch.cat([logps_MK.detach()[:, :last], again[0][:, last:]], 1)
        return Scored(logps_MK, computed + again[1], needed + again[2])

    def _score_pieces(self, model, groups, pieces, pull_MK=None, backward=None, weighted=True):
        """Detached log-probabilities [M, K] of (group, completions) pieces, 0 elsewhere; counts tokens.

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

    def _in_two(self, groups: Sequence[Group]) -> bool:
        """Whether everything must be scored before it is backpropagated, because a group is too long for a pass."""
        return any(len(g.completions) > 1 and num_tokens(g, self.layout) > self.budget for g in groups)

    def _turns(self, groups: Sequence[Group]) -> Iterator[tuple[list[int], bool]]:
        """(groups that share a pass, whether it is the last); no groups if only other ranks have work left."""
        own = self._split(groups)
        turns = self.most(len(own))
        for n in range(turns):
            yield (own[n] if n < len(own) else []), n == turns - 1

    def most(self, value: int) -> int:
        """The largest value of all ranks if they must run in step, else this rank's value."""
        return collectives.largest(value, self.device) if self.in_step else int(value)

    def expected(self, groups: Sequence[Group]) -> tuple[list[list[Group]], list[list[Group]]]:
        """The passes for a gradient of these groups: those that only score, and those with a backward pass."""
        if not self._in_two(groups):
            return [], [[groups[i] for i in numbers] for numbers in self._split(groups)]
        first = range(len(groups[0].completions) - self.knows_last)
        return self._chosen([group.select(first) for group in groups]), self._chosen(groups)

    def _chosen(self, groups: Sequence[Group]) -> list[list[Group]]:
        parts = [groups[i].select(completions) for i, completions in self._pieces(groups)]
        return [[parts[n] for n in numbers] for numbers in self._split(parts)]

    def _split(self, groups: Sequence[Group]) -> list[list[int]]:
        """Groups (by number) that share a pass; a group longer than the budget is alone.

        The number of passes is what taking the longest first gives. Packed passes have similar sizes: four passes of
        four groups instead of three of five and one of one.
        """
        passes: list[list[int]] = []
        order = sorted(range(len(groups)), key=lambda i: -_longest(groups[i], self.layout))
        for i in order:
            if passes and self._cost([groups[n] for n in [*passes[-1], i]]) <= self.budget:
                passes[-1].append(i)
            else:
                passes.append([i])
        if self.layout == "padded" or len(passes) == 1:
            return passes
        balanced: list[list[int]] = [[] for _ in passes]
        for i in order:
            min(balanced, key=lambda some: self._cost([groups[n] for n in some])).append(i)
        largest = (max(self._cost([groups[n] for n in some]) for some in split) for split in (balanced, passes))
        return balanced if next(largest) <= next(largest) else passes

    def _pieces(self, groups: Sequence[Group]) -> list[tuple[int, list[int]]]:
        """(group, its completions) pieces that fit the budget or have a single completion."""
        pieces = []
        for i, group in enumerate(groups):
            piece: list[int] = []
            for k in range(len(group.completions)):
                if piece and self._cost([group.select([*piece, k])]) > self.budget:
                    pieces.append((i, piece))
                    piece = []
                piece = [*piece, k]
            pieces.append((i, piece))
        return pieces

    def _cost(self, groups: Sequence[Group]) -> int:
        """Tokens that one pass over these groups computes, including the padding between its rows."""
        if self.layout == "packed":
            return sum(num_tokens(group, self.layout) for group in groups)
        return sum(len(group.completions) for group in groups) * max(_longest(group, self.layout) for group in groups)


def num_tokens(group: Group, layout: str) -> int:
    """Tokens that a forward pass computes for a group, without padding between rows."""
    prompts = len(group.completions) if layout == "padded" else 1
    return prompts * len(group.prompt_ids) + sum(map(len, group.completions))


def _longest(group: Group, layout: str) -> int:
    """The length of a group's longest row, by which groups are sorted."""
    if layout == "packed":
        return num_tokens(group, layout)
    return len(group.prompt_ids) + max(map(len, group.completions))
