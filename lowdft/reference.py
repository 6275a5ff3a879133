"""Reference log-probabilities: P_g0 of completions, by the base with its adapter off or by the initial weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lowdft.logps import Group
from lowdft.objectives import Objective
from lowdft.passes import Passes

FIELDS = {"reference": "ref_negative_logps", "completion_reference": "ref_logps"}  # of encoded rows, by need
REFERENCE_NEEDS = frozenset(FIELDS)


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """The base under a peft model; a model without an adapter is its own base."""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
        yield model


def has_reference(row: dict, objective: Objective) -> bool:
    """Does an encoded row bring the reference log-probabilities that this objective needs?"""
    return all(FIELDS[need] in row for need in objective.needs & REFERENCE_NEEDS)


def reference_logps(model: nn.Module, groups: Sequence[Group], passes: Passes) -> Tensor:
    """Summed log-probabilities [M, K] of completions under `model` as it stands, in eval mode and without gradient.

    Args:
        groups: prompts with K completions each.
        passes: how they are scored; training's own, so that rounding is the same.
    """
    training = model.training
    model.eval()
    try:
        return passes.score(model, groups)
    finally:
        model.train(training)
