"""Prompts with their completions, laid out as rows for one forward pass.

Layout "shared": one row a prompt, `[prompt][completion 1]…[completion K]`. Every completion's positions start right
after the prompt, and a mask lets it see the prompt and itself alone, so the prompt is computed once for all of them.
Layout "padded": one row a completion, for models that take no 4-D mask. Both give the same log-probabilities.

Shape suffixes: R rows, L tokens of the longest row, S scored tokens, C completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PROMPT, PADDING = 0, -1  # segments of a row; completion k of a row is segment k + 1


@dataclass(frozen=True)
class Group:
    """Token ids of one prompt (at least one token) and of its completions (at least one token each)."""

    prompt_ids: Sequence[int]
    completions: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Rows:
    """What a forward pass takes, and which hidden states score which tokens."""

    layout: str
    input_ids_RL: Tensor
    position_ids_RL: Tensor
    segments_RL: Tensor
    predictor_S: Tensor  # flat index into R * L of the hidden state that predicts the token
    target_S: Tensor  # the token's id
    completion_S: Tensor  # which completion it belongs to, counted through all groups
    num_completions: int

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Rows(**moved)


def lay_out(groups: Sequence[Group], layout: str = "shared", pad_id: int = 0) -> Rows:
    """Lays groups out as rows; completions are counted group by group, in the order given."""
    if layout == "padded":
        groups = [Group(g.prompt_ids, [completion]) for g in groups for completion in g.completions]
    lengths = [len(g.prompt_ids) + sum(map(len, g.completions)) for g in groups]
    width = max(lengths)
    input_ids = torch.full((len(groups), width), pad_id)
    position_ids = torch.zeros((len(groups), width), dtype=torch.int64)
    segments = torch.full((len(groups), width), PADDING)
    predictors, targets, owners = [], [], []
    num_completions = 0
    for row, group in enumerate(groups):
        start = prompt_length = len(group.prompt_ids)
        input_ids[row, :start] = torch.as_tensor(group.prompt_ids)
        position_ids[row, :start] = torch.arange(start)
        segments[row, :start] = PROMPT
        for k, completion in enumerate(group.completions):
            end = start + len(completion)
            ids = torch.as_tensor(completion)
            input_ids[row, start:end] = ids
            position_ids[row, start:end] = torch.arange(prompt_length, prompt_length + len(ids))
            segments[row, start:end] = k + 1
            first = row * width
            predictors.append(torch.tensor([first + prompt_length - 1]))
            predictors.append(torch.arange(first + start, first + end - 1))
            targets.append(ids)
            owners.append(torch.full((len(ids),), num_completions))
            num_completions += 1
            start = end
    return Rows(
        layout,
        input_ids,
        position_ids,
        segments,
        torch.cat(predictors),
        torch.cat(targets),
        torch.cat(owners),
        num_completions,
    )


def visible(rows: Rows, window: int | None = None) -> Tensor:
    """Bool [R, 1, L, L]: may query q see key k? Within a sliding `window` of positions where the model has one."""
    segments, positions = rows.segments_RL, rows.position_ids_RL
    width = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    order = torch.arange(width, device=segments.device)
    seen = (order[None, :, None] >= order[None, None, :]) & ((key == PROMPT) | (key == query)) & (key != PADDING)
    if window is not None:
        seen = seen & (positions[:, :, None] - positions[:, None, :] < window)
    seen = seen | torch.eye(width, dtype=torch.bool, device=segments.device)  # padding sees itself: no empty softmax
    return seen[:, None]
