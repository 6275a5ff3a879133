"""Reference log-probabilities: P_g0 of the negatives, by the base with its adapter off or by the initial weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lowdft.logps import Group
from lowdft.passes import Passes


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """The base under a peft model; a model without an adapter is its own base."""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
        yield model


def negative_logps(model: nn.Module, groups: Sequence[Group], passes: Passes) -> Tensor:
    """Summed log-probabilities [M, B] of completions under `model` as it stands, in eval mode and without gradient.

    Args:
        groups: prompts with B negatives each, in the order in which training will score them.
        passes: how they are scored; training's own, so that rounding is the same.
    """
    training = model.training
    model.eval()
    try:
        return passes.score(model, groups)
    finally:
        model.train(training)
