"""What an objective needs beside the policy's own scores of a micro-batch: the reference's, and other constants."""

from __future__ import annotations

from torch import Tensor, nn

from lowdft.config import DFTConfig
from lowdft.data.batch import Batch
from lowdft.logps import Group
from lowdft.objectives import Objective
from lowdft.passes import Passes
from lowdft.reference import REFERENCE_NEEDS, has_reference, reference_logps, reference_on


def prepare(
    model: nn.Module,
    batch: Batch,
    visits_M: Tensor,
    count: int,
    objective: Objective,
    args: DFTConfig,
    passes: Passes,
) -> dict[str, Tensor]:
    """Fields of `Scores` by name, a row a prompt, without gradient; only those that `objective.needs` names.

    The reference comes from the rows where they bring it, else from the model with its reference on.
    """
    needs, given = objective.needs, {}
    if "aligned" in needs:
        given["aligned_logps_M"] = batch.column("aligned_logps")
    if "mismatched" in needs:
        given["mismatched_gain_M"] = mismatched_gain(model, batch, passes)
    if not needs & REFERENCE_NEEDS:
        return given
    with_negatives, with_completion = "reference" in needs, "completion_reference" in needs
    if not passes.most(any(not has_reference(row, objective) for row in batch.rows)):
        if with_negatives:
            given["ref_negative_logps_MB"] = batch.ref_negative_logps(visits_M, count)
        if with_completion:
            given["ref_logps_M"] = batch.column("ref_logps")
        return given
    prompt = "prompt_ids" if args.reference_prompt == "training" else "sampling_prompt_ids"
    negatives = batch.negatives(visits_M, count if with_negatives else 0)
    groups = batch.groups(negatives, prompt=prompt, completion=with_completion, negatives_from=args.negatives_from)
    with reference_on(model):
        ref_MK = reference_logps(model, groups, passes)
    if with_completion:
        given["ref_logps_M"], ref_MK = ref_MK[:, -1], ref_MK[:, :-1]
    if with_negatives:
        given["ref_negative_logps_MB"] = ref_MK
    return given


def mismatched_gain(model: nn.Module, batch: Batch, passes: Passes) -> Tensor:
    """Mean log policy - log reference of every prompt with the next row's completion; [M], all the same.

    Over this micro-batch; several ranks do not share it.
    """
    groups = [
        Group(row["prompt_ids"], [other["completion_ids"]])
        for row, other in zip(batch.rows, [*batch.rows[1:], batch.rows[0]], strict=True)
    ]
    policy = reference_logps(model, groups, passes)
    with reference_on(model):
        gain_M1 = policy - reference_logps(model, groups, passes)
    return gain_M1.mean().expand(len(batch))
