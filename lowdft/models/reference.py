"""Reference log-probabilities: P_g0 of completions, by the base with its adapter off or by the initial weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lowdft.config.training import DFTConfig
from lowdft.data.batch import group_of
from lowdft.logprobs import Group
from lowdft.models.adapters import REFERENCE
from lowdft.objectives import Objective
from lowdft.training.token_budget import Passes

FIELDS = {"reference": "ref_negative_logps", "completion_reference": "ref_logps"}  # of encoded rows, by need
REFERENCE_NEEDS = frozenset(FIELDS)


@contextlib.contextmanager
def reference_on(model: nn.Module) -> Iterator[nn.Module]:
    """A peft model as its reference: with its frozen reference adapter, else with no adapter.

    A model without an adapter is its own reference.
    """
    if REFERENCE in getattr(model, "peft_config", {}):
        trained, trainable = model.active_adapter, [p for p in model.parameters() if p.requires_grad]
        model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield model
        finally:
            model.set_adapter(trained, inference_mode=True)
            for parameter in trainable:
                parameter.requires_grad_(True)
    else:
        with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
            yield model


def has_reference(row: dict, objective: Objective) -> bool:
    """Does an encoded row bring the reference log-probabilities that this objective needs?"""
    return all(FIELDS[need] in row for need in objective.needs & REFERENCE_NEEDS)


def reference_group(row: dict, objective: Objective, args: DFTConfig) -> Group:
    """The completions of a row that the reference scores for this objective: negatives first, the good one last."""
    prompt = "prompt_ids" if args.reference_prompt == "training" else "sampling_prompt_ids"
    negatives = row["negative_ids"] if objective.uses_reference else []
    return group_of(row, negatives, prompt, objective.uses_completion_reference)


def reference_fields(logps: list[float], objective: Objective) -> dict:
    """The fields of an encoded row (`FIELDS`) from the log-probabilities of its `reference_group`."""
    with_completion = objective.uses_completion_reference
    fields = {"ref_logps": logps[-1]} if with_completion else {}
    return fields | ({"ref_negative_logps": logps[: len(logps) - with_completion]} if objective.uses_reference else {})


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
