"""The other inputs of an objective, besides the policy's scores: reference scores and other constants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from lowdft.data.batch import Batch
from lowdft.distributed import collectives
from lowdft.logprobs import Group
from lowdft.models.reference import has_reference, reference_logps, reference_on
from lowdft.objectives import Objective
from lowdft.training.token_budget import IDLE, Passes


def prepare(
    model: nn.Module,
    batch: Batch,
    visits_M: Tensor,
    count: int,
    objective: Objective,
    reference_prompt: str,
    passes: Passes,
) -> dict[str, Tensor]:
    """The fields of `Scores` that the objective uses, by name, one row per prompt, without gradient.

    The reference scores come from the rows if they have them, else from the model with its adapter off. (The engine
    adds `log_u_M` and `mismatched_gain_M`, which belong to training and to the step.)
    """
    given = {}
    if objective.uses_aligned:
        given["aligned_logps_M"] = batch.column("aligned_logps")
    if not objective.uses_any_reference:
        return given
    with_negatives, with_completion = objective.uses_reference, objective.uses_completion_reference
    if not passes.most(any(not has_reference(row, objective) for row in batch.rows)):
        if with_negatives:
            given["ref_negative_logps_MB"] = batch.ref_negative_logps(visits_M, count)
        if with_completion:
            given["ref_logps_M"] = batch.column("ref_logps")
        return given
    prompt = "prompt_ids" if reference_prompt == "training" else "sampling_prompt_ids"
    negatives = batch.negatives(visits_M, count if with_negatives else 0)
    groups = batch.groups(negatives, prompt=prompt, completion=with_completion)
    with reference_on(model):
        ref_MK = reference_logps(model, groups, passes)
    if with_completion:
        given["ref_logps_M"], ref_MK = ref_MK[:, -1], ref_MK[:, :-1]
    if with_negatives:
        given["ref_negative_logps_MB"] = ref_MK
    return given


def mismatched_gain(model: nn.Module, batches: Sequence[Batch], passes: Passes) -> float:
    """The mean of log policy - log reference of another row's completion, over a step's prompts on all ranks.

    Args:
        batches: this rank's micro-batches of the step.
    """
    rows = [row for batch in batches for row in batch.rows]
    groups = [Group(row["prompt_ids"], [row["mismatched_ids"]]) for row in rows] or [IDLE]
    policy_M1 = reference_logps(model, groups, passes)
    if passes.most(any("ref_mismatched_logps" not in row for row in rows)):
        with reference_on(model):
            gains = (policy_M1 - reference_logps(model, groups, passes))[: len(rows), 0].tolist()
    else:
        gains = [logp - row["ref_mismatched_logps"] for logp, row in zip(policy_M1[:, 0].tolist(), rows, strict=False)]
    gains = list(itertools.chain(*collectives.from_all(gains)))
    return math.fsum(gains) / max(1, len(gains))
