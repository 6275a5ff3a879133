"""Supervised fine-tuning and its variants: objectives on the completion alone.

P is the summed log-probability of the completion, T its number of tokens, RP its log-probability under the reference,
and p_t the probability of token t.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from lowdft.objectives.base import Losses, Objective, Scores, plain


def sft(scores: Scores) -> Losses:
    """Token-mean NLL [M], scaled so that the mean over a step's prompts is its summed NLL divided by its tokens."""
    return plain(token_mean_nll(scores))


def token_mean_nll(scores: Scores) -> Tensor:
    """[M]: each prompt's share of the step's token-mean negative log-likelihood."""
    return -scores.policy_logps_M / scores.tokens_per_prompt


def own_probability(per_token_logps_S: Tensor, completion_S: Tensor) -> Tensor:
    """The weight of a token in `dynamic_ft`: its probability, as a constant."""
    return per_token_logps_S.detach().exp()


def f_sft(scores: Scores, divergence: str, beta: float) -> Losses:
    """-phi(D) / beta with D = beta (P - RP), mean over completions.

    Derived for this project from the ideas of "Implicit Reward as the Bridge" (arXiv 2507.00018); the paper's exact
    equations were not available. `divergence` chooses phi; total variation is SFT with summed log-probabilities.

    Raises:
        ValueError: an unknown divergence.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"objective_args.divergence is {divergence!r}; wanted {', '.join(DIVERGENCES)}")
    d_M = beta * (scores.policy_logps_M - scores.ref_logps_M)
    return plain(-DIVERGENCES[divergence](d_M) / beta)


def poft(scores: Scores, beta: float, shift: float) -> Losses:
    """-log sigmoid(beta (P/T - c) + shift), with c the mean log-probability per token of y under aligned models."""
    mean_M = scores.policy_logps_M / scores.completion_tokens_M
    return plain(-logsigmoid(beta * (mean_M - scores.aligned_logps_M) + shift))


def ift(scores: Scores, **_: object) -> Losses:
    """mean_t W_t l_t with l_t = -log p_t; the weights W are already in the summed log-probabilities (`later_loss`)."""
    return plain(-scores.policy_logps_M / scores.completion_tokens_M)


def later_loss(
    per_token_logps_S: Tensor, completion_S: Tensor, decay: float, detached: bool, predicted_share: float
) -> Tensor:
    """The weight of a token in `ift`: W_t = sum_{k >= t} decay^(k - t) l_k, scaled so that a completion's sum is T.

    Before that, the engine has mixed `predicted_share` of the predicted embeddings into the input. In the authors' code
    W has a gradient, too; `detached` makes it a constant.
    """
    loss_S = -(per_token_logps_S.detach() if detached else per_token_logps_S)
    ahead_S, step = loss_S, 1
    while step < len(loss_S):  # doubles how far every token has looked ahead
        same = completion_S[step:] == completion_S[:-step]
        ahead_S = ahead_S + nn.functional.pad(decay**step * ahead_S[step:] * same, (0, step))
        step *= 2
    sum_C = ahead_S.new_zeros(int(completion_S[-1]) + 1).index_add(0, completion_S, ahead_S)
    tokens_C = torch.bincount(completion_S)
    return ahead_S * (tokens_C / sum_C.clamp_min(torch.finfo(sum_C.dtype).tiny))[completion_S]


def _linear_below(point: float, phi, slope: float):
    """phi, continued as a straight line below `point`."""

    def continued(d_M: Tensor) -> Tensor:
        inside = d_M.clamp_min(point)
        return phi(inside) + slope * (d_M - inside)

    return continued


DIVERGENCES = {
    "total_variation": lambda d_M: d_M,
    "pearson": lambda d_M: d_M - d_M.square() / 4,
    "squared_hellinger": _linear_below(-0.5, lambda d_M: d_M / (1 + d_M), 4.0),
    "jensen_shannon": _linear_below(
        -0.5, lambda d_M: torch.log(2 - torch.exp(-d_M)), math.exp(0.5) / (2 - math.exp(0.5))
    ),
    "reverse_kl": lambda d_M: 1 - torch.exp((-d_M).clamp_max(30.0)),
}

OBJECTIVES = (
    Objective("sft", sft, "maximum likelihood"),
    Objective("dynamic_ft", sft, "arXiv 2508.05629 (Dynamic Fine-Tuning)", token_weight=own_probability),
    Objective(
        "f_sft",
        f_sft,
        "derived from arXiv 2507.00018",
        {"divergence": "pearson", "beta": 0.1},
        frozenset({"completion_reference"}),
    ),
    Objective(
        "ift",
        ift,
        "arXiv 2405.11870 (Intuitive Fine-Tuning)",
        {"predicted_share": 0.2, "decay": 0.95, "detached": False},
        frozenset({"predictions"}),
        token_weight=later_loss,
    ),
    Objective("poft", poft, "Preference-Oriented SFT", {"beta": 1.0, "shift": 0.0}, frozenset({"aligned"})),
)
