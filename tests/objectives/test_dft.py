"""DFT and DFT2 against numbers worked by hand and recorded in float64, and their invariants."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import GOLDEN

from lowdft import objectives
from lowdft.objectives import Scores
from lowdft.objectives.dft import update_log_u

CASES = json.loads((GOLDEN / "dft.json").read_text())
CASES = [case for kind in ("hand_cases", "edge_cases", "random_cases") for case in CASES[kind]]


def tensor(values):
    return None if values is None else torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_numbers_and_gradients(case):
    """Three consecutive steps a case: log_u, weights, losses and gradients within 1e-9 in float64."""
    table = torch.full((case["n_prompts"],), case["log_u_init"], dtype=torch.float64)
    for step in case["steps"]:
        ids = torch.tensor(step["ids"])
        positive = tensor(step["logp_pos"]).requires_grad_()
        negative = tensor(step["logp_neg"]).requires_grad_()
        scores = Scores(
            positive,
            tensor(step["len_pos"]),
            negative,
            tensor(step["len_neg"]),
            tensor(step["ref_logp_neg"]),
            table[ids],
        )
        losses = objectives.get(case["variant"]).compute(scores, tau=case["tau"], gamma=case["gamma"])
        losses.surrogate_M.mean().backward()
        table[ids] = losses.log_u_M
        for found, wanted in [
            (losses.log_u_M, "log_u_after"),
            (losses.weights_MB, "weight_neg"),
            (losses.surrogate_M, "surrogate_loss_per_prompt"),
            (losses.value_M, "monitor_objective_per_prompt"),
            (positive.grad, "grad_logp_pos"),
            (negative.grad, "grad_logp_neg"),
        ]:
            torch.testing.assert_close(found.detach(), tensor(step[wanted]), rtol=1e-9, atol=1e-9, msg=wanted)


def test_worked_by_hand():
    """B of the derivation: w = [e^-1, 1], u' = .15 + .85 (.36788 + 1) / 2 = .731349, omega = [.503015, 1.367337],
    surrogate = 5 + (-4 * .503015 - 6 * 1.367337) / 2 = -.108040."""
    scores = Scores(
        tensor([-5.0]), tensor([4]), tensor([[-4.0, -6.0]]), tensor([[4, 5]]), tensor([[-3.0, -6.0]]), tensor([0.0])
    )
    losses = objectives.get("dft").compute(scores, tau=1.0, gamma=0.85)
    assert losses.log_u_M.item() == pytest.approx(math.log(0.15 + 0.85 * (math.exp(-1) + 1) / 2), abs=1e-12)
    assert losses.weights_MB[0].tolist() == pytest.approx([0.503015, 1.367337], abs=1e-6)
    assert losses.surrogate_M.item() == pytest.approx(-0.108040, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 0.85, 1.0])
def test_weights_are_bounded(gamma):
    """mean omega <= 1/gamma and omega <= B/gamma; with gamma = 1 mean omega = 1. Holds 800 nats from zero as well."""
    torch.manual_seed(0)
    for scale in (1.0, 30.0, 800.0):
        log_w = scale * torch.randn(50, 7, dtype=torch.float64)
        omega = torch.exp(log_w - update_log_u(log_w, scale * torch.randn(50, dtype=torch.float64), gamma)[:, None])
        assert omega.mean(1).max() <= 1 / gamma + 1e-12
        assert omega.max() <= 7 / gamma + 1e-12
        if gamma == 1:
            torch.testing.assert_close(omega.mean(1), torch.ones(50, dtype=torch.float64))


def test_first_batch_starts_at_the_first_mean():
    log_w = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    assert update_log_u(log_w, torch.tensor([float("nan")]), 0.9).item() == pytest.approx(math.log(2), abs=1e-12)


def test_gradient_is_that_of_the_objective():
    """With gamma = 1 the objective has no memory, so its own gradient (through the log-sum-exp) is the surrogate's."""
    torch.manual_seed(1)
    positive, negative = torch.randn(3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    ref, tau = torch.randn(3, 4, dtype=torch.float64), 0.7
    negative.requires_grad_()
    objective = -positive + tau * (torch.logsumexp(negative / tau - ref, 1) - math.log(4))
    (wanted,) = torch.autograd.grad(objective.sum(), negative)
    losses = objectives.get("dft").compute(Scores(positive, None, negative, None, ref, None), tau=tau, gamma=1.0)
    (found,) = torch.autograd.grad(losses.surrogate_M.sum(), negative)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(losses.value_M, objective.detach())


@pytest.mark.parametrize("name", ["dft", "dft2"])
def test_nll_weight_makes_the_good_answer_pull_harder(name):
    """Weight 1 doubles the derivative by the completion's score and leaves the negatives' and log_u alone."""
    torch.manual_seed(2)
    positive, negative = tensor([-3.0, -7.0]).requires_grad_(), torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    scores = Scores(
        positive, tensor([2, 4]), negative, torch.full((2, 3), 5), torch.zeros_like(negative), torch.zeros(2)
    )
    compute = objectives.get(name).compute
    plain, weighted = (compute(scores, tau=0.8, gamma=0.9, nll_weight=w) for w in (0.0, 1.0))
    gradients = [torch.autograd.grad(x.surrogate_M.sum(), (positive, negative)) for x in (plain, weighted)]
    torch.testing.assert_close(gradients[1][0], 2 * gradients[0][0])
    torch.testing.assert_close(gradients[1][1], gradients[0][1])
    torch.testing.assert_close(weighted.log_u_M, plain.log_u_M)
    score_M = positive.detach() / (1 if name == "dft" else tensor([2, 4]))
    torch.testing.assert_close(weighted.value_M, plain.value_M - score_M)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'dft2'"):
        objectives.get("dtf2")
