"""Reference log-probabilities: P_g0 of the negatives, by the base with its adapter off or by the initial weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lowdft.logps import Group, proposal_logps, score


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """The base under a peft model; a model without an adapter is its own base."""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
        yield model


@torch.no_grad()
def negative_logps(
    model: nn.Module, groups: Sequence[Group], layout: str, chunk_size: int, proposal: dict | None = None
) -> Tensor:
    """Summed log-probabilities [C] of completions under `model` as it stands, in eval mode and without gradient.

    Args:
        groups: prompts with B negatives each, in the order in which training will score them.
        proposal: temperature, top_p and top_k of the sampler, for its density instead of the model's.
    """
    training = model.training
    model.eval()
    try:
        head_logps = partial(proposal_logps, chunk_size=chunk_size, **proposal) if proposal else None
        return score(model, groups, layout, chunk_size, head_logps).logps_C
    finally:
        model.train(training)
