"""Lays out prompts with their completions for one forward pass.

Layout "packed": one row without padding, `[prompt][completion 1]…[completion K][prompt]…`. The positions of a
completion start right after its prompt, and `attention.Pieces` holds which tokens each piece attends to, so that a
prompt is computed once for all of its completions. Layout "padded": one row per completion, for models whose attention
does not support that. Both give the same log-probabilities.

Shape suffixes: R rows, L tokens of the longest row, S scored tokens, C completions, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lowdft.logprobs.attention import Pieces

ROW_ALIGNMENT = 16


@dataclass(frozen=True)
class Group:
    """Token ids of one prompt (at least one token) and of its completions (at least one token each)."""

    prompt_ids: Sequence[int]
    completions: Sequence[Sequence[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens that a packed row computes for this group."""
        return len(self.prompt_ids) + sum(map(len, self.completions))

    @property
    def scored_tokens(self) -> list[int]:
        """Scored tokens of each completion."""
        return [len(completion) for completion in self.completions]

    def select(self, numbers: Sequence[int]) -> Group:
        """The prompt with some of its completions, in the order given."""
        return Group(self.prompt_ids, [self.completions[k] for k in numbers])


@dataclass(frozen=True)
class Rows:
    """The inputs of a forward pass, and which hidden states score which tokens."""

    input_ids_RL: Tensor
    position_ids_RL: Tensor
    predictor_S: Tensor  # flat index into R * L of the hidden state that predicts the token
    target_S: Tensor  # the token's id
    place_S: Tensor  # flat index into R * L of the token itself
    completion_S: Tensor  # index of the completion that it belongs to, counted over all groups
    pieces: Pieces | None = None  # packed: which tokens attend to which

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rows(**{name: value if value is None else value.to(device) for name, value in moved.items()})


def lay_out(groups: Sequence[Group], layout: str = "packed") -> Rows:
    """Lays out groups as rows; completions are numbered group by group, in the order given."""
    return _pack(groups) if layout == "packed" else _pad(groups)


def _pack(groups: Sequence[Group]) -> Rows:
    ids, positions, predictors, places, owners = [], [], [], [], []
    prompts, completions = [], []
    start = 0
    for group in groups:
        prompt_start, prompt_length = start, len(group.prompt_ids)
        prompts.append((prompt_start, 0, prompt_start, prompt_length))
        ids.append(torch.as_tensor(group.prompt_ids))
        positions.append(torch.arange(prompt_length))
        start += prompt_length
        for completion in group.completions:
            length = len(completion)
            place = torch.arange(start, start + length)
            predictor = place - 1
            predictor[0] = prompt_start + prompt_length - 1
            predictors.append(predictor)
            places.append(place)
            owners.append(torch.full((length,), len(completions)))
            completions.append((prompt_start, prompt_length, start, length))
            ids.append(torch.as_tensor(completion))
            positions.append(torch.arange(prompt_length, prompt_length + length))
            start += length
    filler = torch.zeros(-start % ROW_ALIGNMENT, dtype=torch.int64)
    input_ids, place_S = torch.cat([*ids, filler]), torch.cat(places)
    return Rows(
        input_ids_RL=input_ids[None],
        position_ids_RL=torch.cat([*positions, filler])[None],
        predictor_S=torch.cat(predictors),
        target_S=input_ids[place_S],
        place_S=place_S,
        completion_S=torch.cat(owners),
        pieces=Pieces(prompts, completions, len(input_ids)),
    )


def _pad(groups: Sequence[Group]) -> Rows:
    pairs = [(group.prompt_ids, completion) for group in groups for completion in group.completions]
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    input_ids = torch.zeros((len(pairs), width), dtype=torch.int64)
    places, owners = [], []  # padding comes last, where no real token attends to it, so it needs no mask
    for row, (prompt, completion) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(completion)
        input_ids[row, :end] = torch.cat([torch.as_tensor(prompt), torch.as_tensor(completion)])
        places.append(torch.arange(start, end) + row * width)
        owners.append(torch.full((end - start,), row))
    place_S = torch.cat(places)
    return Rows(
        input_ids_RL=input_ids,
        position_ids_RL=torch.arange(width).expand(len(pairs), width),
        predictor_S=place_S - 1,
        target_S=input_ids.flatten()[place_S],
        place_S=place_S,
        completion_S=torch.cat(owners),
    )
