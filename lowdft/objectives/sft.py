"""Supervised fine-tuning: the negative log-likelihood of the completion, averaged over the step's tokens."""

from __future__ import annotations

from lowdft.objectives.base import Losses, Objective, Scores


def sft(scores: Scores) -> Losses:
    """Token-mean NLL. The step's mean over prompts of these [M] values is its summed NLL over its token count."""
    nll_M = -scores.policy_logps_M / scores.tokens_per_prompt
    return Losses(surrogate_M=nll_M, value_M=nll_M.detach())


SFT = Objective(name="sft", compute=sft, source="maximum likelihood")
