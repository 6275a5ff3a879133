"""Listwise: one softmax of the completion against all of its negatives, plus an NLL.

This is the discriminative likelihood of arXiv 2502.18679 (Eq. 2) with the completion y and its negatives y'_j as the
only candidates. For one prompt, with s the score of a completion:

    h_j      = beta (s(y'_j) - s(y))
    contrast = (1 / beta) log(1 + sum_j exp(h_j))
    loss     = nll_weight * NLL(y) + contrast          NLL: the completion's share of the step's token mean
    omega_j  = exp(h_j) / (1 + sum_k exp(h_k))         d contrast / d s(y'_j); their sum is below 1

There is no moving average. The gradient of the contrast vanishes when the completion is far ahead of every negative. If
scores are sums, tokens that the completion shares with all its negatives get exactly the gradient of the NLL. With beta
1, scores per token and nll_weight 1 it is T-Few's L_LM + L_LN (arXiv 2205.05638, Eq. 2 and 3).

Shape suffixes: M prompts of a micro-batch, B negatives of one prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowdft.objectives.base import Losses, Objective, Scores
from lowdft.objectives.sft import token_mean_nll


def listwise(scores: Scores, beta: float, nll_weight: float, per_token: bool) -> Losses:
    """The contrast of log-probabilities, per token (mean) or summed; no reference."""
    return _contrast(scores, scores.policy_logps_M, scores.policy_negative_logps_MB, beta, nll_weight, per_token)


def listwise_ref(scores: Scores, beta: float, nll_weight: float, per_token: bool) -> Losses:
    """The contrast of log-probabilities minus the reference's; with beta 1 and sums, noise-contrastive estimation."""
    gain_M = scores.policy_logps_M - scores.ref_logps_M
    gain_MB = scores.policy_negative_logps_MB - scores.ref_negative_logps_MB
    return _contrast(scores, gain_M, gain_MB, beta, nll_weight, per_token)


def _contrast(scores: Scores, s_M: Tensor, s_MB: Tensor, beta: float, nll_weight: float, per_token: bool) -> Losses:
    if per_token:
        s_M, s_MB = s_M / scores.completion_tokens_M, s_MB / scores.negative_tokens_MB
    h_MB = beta * (s_MB - s_M[:, None])
    h_MC = torch.cat([torch.zeros_like(h_MB[:, :1]), h_MB], dim=1)  # the completion itself, then its negatives
    loss_M = nll_weight * token_mean_nll(scores) + h_MC.logsumexp(1) / beta
    return Losses(loss_M, loss_M.detach(), weights_MB=h_MC.detach().softmax(1)[:, 1:])


DEFAULTS = {"beta": 1.0, "nll_weight": 1.0, "per_token": True}
OBJECTIVES = (
    Objective(
        "listwise",
        listwise,
        "arXiv 2502.18679, Eq. 2 on a closed set; arXiv 2205.05638, Eq. 2-3",
        DEFAULTS,
        frozenset({"negatives"}),
    ),
    Objective(
        "listwise_ref",
        listwise_ref,
        "the same with log P - log P_ref; arXiv 1809.01812 (ranking NCE)",
        DEFAULTS,
        frozenset({"negatives", "reference", "completion_reference"}),
    ),
)
