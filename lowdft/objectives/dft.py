"""DFT and DFT2: Discriminative Fine-Tuning (arXiv 2502.18679, Eq. 7-13, Algorithms 1 and 2).

For one prompt with completion y and negatives y'_j (logarithms are natural):

    m       = logmeanexp_j(log w_j)
    log_u'  = logaddexp(log(1 - gamma) + log_u, log(gamma) + m)
    omega_j = stop_gradient(exp(log w_j - log_u'))
    surrogate = -s(y) + mean_j(omega_j s(y'_j))        its gradient is Eq. 8 (DFT) or Eq. 13 (DFT2)
    value     = -s(y) + tau log_u'

`nll_weight` (not in the paper, default 0) adds nll_weight * -s(y) to both, which pushes the completion up harder.

In DFT s(y) = log P(y) and log w_j = log P(y'_j) / tau - log P_ref(y'_j). In DFT2 s(y) is the mean log-probability per
token, and log w_j = s(y'_j) / tau needs no reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowdft.objectives.base import Losses, Objective, Scores


def dft(scores: Scores, tau: float, gamma: float, nll_weight: float = 0.0) -> Losses:
    """DFT (Eq. 7-8). Scores are summed log-probabilities; the reference is part of the negatives' weights."""
    score_MB = scores.policy_negative_logps_MB
    log_w_MB = score_MB.detach() / tau - scores.ref_negative_logps_MB
    return _discriminate(scores.policy_logps_M, score_MB, log_w_MB, scores.log_u_M, tau, gamma, nll_weight)


def dft2(scores: Scores, tau: float, gamma: float, nll_weight: float = 0.0) -> Losses:
    """DFT2 (Eq. 11-13). Scores are log-probabilities per token; no reference."""
    score_M = scores.policy_logps_M / scores.completion_tokens_M
    score_MB = scores.policy_negative_logps_MB / scores.negative_tokens_MB
    return _discriminate(score_M, score_MB, score_MB.detach() / tau, scores.log_u_M, tau, gamma, nll_weight)


def update_log_u(log_w_MB: Tensor, log_u_M: Tensor | None, gamma: float) -> Tensor:
    """The moving average of Algorithm 1 in logarithms: [M] new values. Where `log_u_M` is NaN, it starts at m."""
    m_M = torch.logsumexp(log_w_MB, dim=1) - math.log(log_w_MB.shape[1])
    if log_u_M is None or gamma == 1:
        return m_M
    old_M = torch.where(log_u_M.isnan(), m_M, log_u_M)
    return torch.logaddexp(math.log1p(-gamma) + old_M, math.log(gamma) + m_M)


def _discriminate(score_M, score_MB, log_w_MB, log_u_M, tau, gamma, nll_weight) -> Losses:
    new_log_u_M = update_log_u(log_w_MB, log_u_M, gamma)
    omega_MB = torch.exp(log_w_MB - new_log_u_M[:, None])
    return Losses(
        surrogate_M=-(1 + nll_weight) * score_M + (omega_MB * score_MB).mean(dim=1),
        value_M=-(1 + nll_weight) * score_M.detach() + tau * new_log_u_M,
        log_u_M=new_log_u_M,
        weights_MB=omega_MB,
    )


OBJECTIVES = (
    Objective(
        name="dft",
        compute=dft,
        source="arXiv 2502.18679, Eq. 7-8",
        defaults={"tau": 1.0, "gamma": 0.85, "nll_weight": 0.0},
        needs=frozenset({"negatives", "reference", "log_u"}),
        linear=True,
    ),
    Objective(
        name="dft2",
        compute=dft2,
        source="arXiv 2502.18679, Eq. 11-13",
        defaults={"tau": 0.3, "gamma": 0.9, "nll_weight": 0.0},
        needs=frozenset({"negatives", "log_u"}),
        per_token=True,
        linear=True,
    ),
)
