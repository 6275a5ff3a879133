"""Listwise objectives: recorded float64 numbers, cases worked by hand, and simpo_sft at one negative."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import GOLDEN

from lowdft import objectives
from lowdft.objectives import Scores

CASES = json.loads((GOLDEN / "listwise.json").read_text())["cases"]


def scores_of(pos, neg, len_pos, len_neg) -> Scores:
    tokens_M, tokens_MB = (torch.tensor(x, dtype=torch.float64) for x in (len_pos, len_neg))
    return Scores(
        policy_logps_M=torch.tensor(pos, dtype=torch.float64, requires_grad=True),
        completion_tokens_M=tokens_M,
        tokens_per_prompt=tokens_M.mean(),
        policy_negative_logps_MB=torch.tensor(neg, dtype=torch.float64, requires_grad=True),
        negative_tokens_MB=tokens_MB,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(case):
    """The contrast, its weights and gradients within 1e-9."""
    scores = scores_of(case["logp_pos"], case["logp_neg"], case["len_pos"], case["len_neg"])
    settings = {"beta": case["beta"], "per_token": case["per_token"], "nll_weight": 0.0}
    losses = objectives.get("listwise").compute(scores, **settings)
    losses.surrogate_M.mean().backward()
    assert losses.value_M.tolist() == pytest.approx(case["loss_per_prompt"], abs=1e-9)
    for found, wanted in (
        (losses.weights_MB, case["weights"]),
        (scores.policy_negative_logps_MB.grad, case["grad_neg"]),
        (scores.policy_logps_M.grad, case["grad_pos"]),
    ):
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_by_hand_with_the_nll():
    """P = -2 over 2 tokens, N = -2 over 1 and -6 over 3: per token -1, -2, -2, so h = [-1, -1] at beta 1.

    contrast = log(1 + 2/e) = 0.5514447; omega = (1/e) / (1 + 2/e) = 0.2119416 each; NLL = 2/2 = 1.
    d loss / dP = -1/2 - (2 * 0.2119416) / 2; d loss / dN = [omega / 1, omega / 3].
    """
    scores = scores_of([-2.0], [[-2.0, -6.0]], [2.0], [[1.0, 3.0]])
    losses = objectives.get("listwise").compute(scores, beta=1.0, nll_weight=1.0, per_token=True)
    losses.surrogate_M.sum().backward()
    omega = (1 / math.e) / (1 + 2 / math.e)
    assert losses.value_M.item() == pytest.approx(1 + math.log1p(2 / math.e), abs=1e-12)
    assert losses.weights_MB.tolist() == [pytest.approx([omega, omega], abs=1e-12)]
    assert scores.policy_logps_M.grad.item() == pytest.approx(-0.5 - omega, abs=1e-12)
    assert scores.policy_negative_logps_MB.grad.tolist() == [pytest.approx([omega, omega / 3], abs=1e-12)]


def test_shared_tokens_keep_the_pull_of_the_nll():
    """A token in the completion and all negatives gets d/dP + sum_j d/dN_j: with summed scores, that of the NLL."""
    scores = scores_of([-5.0], [[-4.0, -9.0, -5.5]], [4.0], [[3.0, 7.0, 4.0]])
    loss = objectives.get("listwise").compute(scores, beta=0.7, nll_weight=1.0, per_token=False).surrogate_M.sum()
    loss.backward()
    pull = scores.policy_logps_M.grad + scores.policy_negative_logps_MB.grad.sum()
    assert pull.item() == pytest.approx(-1 / 4, abs=1e-12)  # the NLL's: one over the step's mean token count


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_one_negative_is_simpo_sft_without_rho(beta):
    """beta * listwise(beta, nll_weight) = simpo_sft(beta, rho 0, nll_weight * beta) at B = 1, gradients too."""
    grads = []
    for name, scale, settings in (
        ("listwise", beta, {"nll_weight": 0.4, "per_token": True}),
        ("simpo_sft", 1.0, {"nll_weight": 0.4 * beta, "rho": 0.0}),
    ):
        scores = scores_of([-7.0, -3.0], [[-6.0], [-11.0]], [5.0, 2.0], [[3.0], [9.0]])
        loss = scale * objectives.get(name).compute(scores, beta=beta, **settings).surrogate_M.mean()
        loss.backward()
        grads.append([loss.item(), *scores.policy_logps_M.grad.tolist()])
        grads[-1] += scores.policy_negative_logps_MB.grad[:, 0].tolist()
    assert grads[0] == pytest.approx(grads[1], abs=1e-12)


def test_reference_of_zero_changes_nothing_and_the_fresh_adapter_starts_uniform():
    """With ref = policy every h is 0, so contrast = log(1 + B) / beta and every omega is 1 / (1 + B)."""
    scores = scores_of([-7.0], [[-6.0, -1.0, -30.0]], [5.0], [[3.0, 1.0, 9.0]])
    scores.ref_logps_M, scores.ref_negative_logps_MB = torch.zeros(1), torch.zeros(1, 3)
    settings = {"beta": 2.0, "nll_weight": 1.0, "per_token": False}
    plain, zero = (objectives.get(n).compute(scores, **settings) for n in ("listwise", "listwise_ref"))
    assert plain.value_M.item() == pytest.approx(zero.value_M.item(), abs=1e-12)
    scores.ref_logps_M = scores.policy_logps_M.detach()
    scores.ref_negative_logps_MB = scores.policy_negative_logps_MB.detach()
    fresh = objectives.get("listwise_ref").compute(scores, beta=2.0, nll_weight=0.0, per_token=False)
    assert fresh.value_M.item() == pytest.approx(math.log(4) / 2, abs=1e-12)
    assert fresh.weights_MB.tolist() == [pytest.approx([0.25] * 3, abs=1e-12)]
