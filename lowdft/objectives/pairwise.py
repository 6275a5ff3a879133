"""Preference objectives on one completion and its B negatives: each compares them in pairs and averages over the pairs.

P and N are the summed log-probabilities of completion and negative, RP and RN those of the reference, T and T' the
numbers of tokens, and H = (P - RP) - (N - RN). The pairs can be preference data, or a completion with negatives sampled
from the base. Averaging over a prompt's negatives, then over prompts, is arXiv 2502.18679, Eq. 14.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from lowdft.objectives.base import Losses, Objective, Scores, plain
from lowdft.objectives.sft import token_mean_nll

PAIRS = frozenset({"negatives"})
REFERENCED = frozenset({"negatives", "reference", "completion_reference"})


def dpo(scores: Scores, beta: float, label_smoothing: float) -> Losses:
    """-(1 - e) log sigmoid(beta H) - e log sigmoid(-beta H): DPO (e = 0, also SPIN) and cDPO."""
    h_MB = beta * _h(scores)
    return plain(_mean(-(1 - label_smoothing) * logsigmoid(h_MB) - label_smoothing * logsigmoid(-h_MB)))


def robust_dpo(scores: Scores, beta: float, label_smoothing: float) -> Losses:
    """[-(1 - e) log sigmoid(beta H) + e log sigmoid(-beta H)] / (1 - 2 e)."""
    h_MB = beta * _h(scores)
    loss_MB = -(1 - label_smoothing) * logsigmoid(h_MB) + label_smoothing * logsigmoid(-h_MB)
    return plain(_mean(loss_MB / (1 - 2 * label_smoothing)))


def dpop(scores: Scores, beta: float, penalty: float) -> Losses:
    """-log sigmoid(beta (H - penalty max(0, RP - P))): penalizes a completion less likely than under the reference."""
    fall_M = relu(scores.ref_logps_M - scores.policy_logps_M)
    return plain(_mean(-logsigmoid(beta * (_h(scores) - penalty * fall_M[:, None]))))


def ipo(scores: Scores, beta: float, length_normalized: bool) -> Losses:
    """(H - 1 / (2 beta))^2, with summed log-probabilities (the paper) or means per token (as in TRL)."""
    h_MB = _h(scores)
    if length_normalized:
        gain_M = (scores.policy_logps_M - scores.ref_logps_M) / scores.completion_tokens_M
        gain_MB = (scores.policy_negative_logps_MB - scores.ref_negative_logps_MB) / scores.negative_tokens_MB
        h_MB = gain_M[:, None] - gain_MB
    return plain(_mean((h_MB - 1 / (2 * beta)).square()))


def rdpo(scores: Scores, beta: float, alpha: float) -> Losses:
    """-log sigmoid(beta H + alpha (T - T')): a length penalty inside DPO."""
    longer_MB = scores.completion_tokens_M[:, None] - scores.negative_tokens_MB
    return plain(_mean(-logsigmoid(beta * _h(scores) + alpha * longer_MB)))


def simpo(scores: Scores, beta: float, rho: float, nll_weight: float) -> Losses:
    """-log sigmoid(beta (P/T - N/T' - rho)), plus optionally the completion's token-mean NLL."""
    mean_M, mean_MB = _means(scores)
    loss_M = _mean(-logsigmoid(beta * (mean_M[:, None] - mean_MB - rho)))
    return plain(loss_M + nll_weight * token_mean_nll(scores))


def cpo(scores: Scores, beta: float, nll_weight: float, summed_nll: bool) -> Losses:
    """-log sigmoid(beta (P - N)) plus the NLL, token mean (as in TRL) or summed (as in the paper)."""
    loss_M = _mean(-logsigmoid(beta * (scores.policy_logps_M[:, None] - scores.policy_negative_logps_MB)))
    return plain(loss_M + nll_weight * (-scores.policy_logps_M if summed_nll else token_mean_nll(scores)))


def orpo(scores: Scores, beta: float, nll_weight: float) -> Losses:
    """Token-mean NLL - beta log sigmoid(log odds(y) - log odds(y')), with the odds of exp(mean log-probability)."""
    mean_M, mean_MB = _means(scores)
    return plain(
        nll_weight * token_mean_nll(scores) - beta * _mean(logsigmoid(_log_odds(mean_M)[:, None] - _log_odds(mean_MB)))
    )


def rrhf(scores: Scores, nll_weight: float, summed_nll: bool) -> Losses:
    """mean max(0, N/T' - P/T) plus the completion's NLL, averaged over its tokens or summed."""
    mean_M, mean_MB = _means(scores)
    nll_M = -scores.policy_logps_M if summed_nll else -mean_M
    return plain(_mean(relu(mean_MB - mean_M[:, None])) + nll_weight * nll_M)


def kto(scores: Scores, beta: float, weight_wanted: float | None, weight_unwanted: float) -> Losses:
    """Wanted w (1 - sigmoid(beta (P - RP - z))), unwanted w' (1 - sigmoid(beta (z - (N - RN)))), mean over 1 + B.

    z = max(0, mean over the step's mismatched prompts and completions of log policy - log reference), a constant. The
    completion is wanted, the negatives are unwanted. The default weight w is B, so that both count equally.
    """
    count = scores.policy_negative_logps_MB.shape[1]
    z_M = scores.mismatched_gain_M.clamp_min(0)
    gain_M = scores.policy_logps_M - scores.ref_logps_M
    gain_MB = scores.policy_negative_logps_MB - scores.ref_negative_logps_MB
    wanted_M = (count if weight_wanted is None else weight_wanted) * torch.sigmoid(-beta * (gain_M - z_M))
    unwanted_M = weight_unwanted * torch.sigmoid(-beta * (z_M[:, None] - gain_MB)).sum(1)
    return plain((wanted_M + unwanted_M) / (1 + count))


def _h(scores: Scores) -> Tensor:
    gain_M = scores.policy_logps_M - scores.ref_logps_M
    return gain_M[:, None] - (scores.policy_negative_logps_MB - scores.ref_negative_logps_MB)


def _means(scores: Scores) -> tuple[Tensor, Tensor]:
    mean_MB = scores.policy_negative_logps_MB / scores.negative_tokens_MB
    return scores.policy_logps_M / scores.completion_tokens_M, mean_MB


def _mean(loss_MB: Tensor) -> Tensor:
    return loss_MB.mean(dim=1)


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = exp(mean), kept finite as p approaches 1."""
    mean = mean.clamp_max(-torch.finfo(mean.dtype).eps)
    return mean - torch.log(-torch.expm1(mean))


OBJECTIVES = (
    Objective("spin", dpo, "arXiv 2401.01335, Eq. 4.7", {"beta": 0.1, "label_smoothing": 0.0}, REFERENCED),
    Objective("dpo", dpo, "arXiv 2305.18290, Eq. 7", {"beta": 0.1, "label_smoothing": 0.0}, REFERENCED),
    Objective("cdpo", dpo, "Mitchell 2023, cDPO", {"beta": 0.1, "label_smoothing": 0.1}, REFERENCED),
    Objective("robust_dpo", robust_dpo, "arXiv 2403.00409", {"beta": 0.1, "label_smoothing": 0.1}, REFERENCED),
    Objective("dpop", dpop, "arXiv 2402.13228, Eq. 3", {"beta": 0.3, "penalty": 50.0}, REFERENCED),
    Objective("ipo", ipo, "arXiv 2310.12036, Eq. 17", {"beta": 0.1, "length_normalized": False}, REFERENCED),
    Objective("rdpo", rdpo, "arXiv 2403.19159, Eq. 9", {"beta": 0.1, "alpha": 0.05}, REFERENCED),
    Objective("simpo", simpo, "arXiv 2405.14734, Eq. 6", {"beta": 2.0, "rho": 0.25, "nll_weight": 0.0}, PAIRS),
    Objective("simpo_sft", simpo, "arXiv 2405.14734", {"beta": 2.0, "rho": 0.25, "nll_weight": 1.0}, PAIRS),
    Objective(
        "kto",
        kto,
        "arXiv 2402.01306, Eq. 8",
        {"beta": 0.1, "weight_wanted": None, "weight_unwanted": 1.0},
        REFERENCED | {"mismatched"},
    ),
    Objective("orpo", orpo, "arXiv 2403.07691, Eq. 6", {"beta": 0.1, "nll_weight": 1.0}, PAIRS),
    Objective("cpo", cpo, "arXiv 2401.08417", {"beta": 0.1, "nll_weight": 1.0, "summed_nll": False}, PAIRS),
    Objective("rrhf", rrhf, "arXiv 2304.05302", {"nll_weight": 1.0, "summed_nll": False}, PAIRS),
)
