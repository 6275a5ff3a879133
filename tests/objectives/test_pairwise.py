"""Preference objectives against recorded float64 numbers."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import GOLDEN

from lowdft import objectives
from lowdft.objectives import Scores

CASES = json.loads((GOLDEN / "pairwise.json").read_text())["cases"]
OURS = {
    "robust": ("robust_dpo", {}),
    "ipo_sum": ("ipo", {}),
    "ipo_avg_trl": ("ipo", {"length_normalized": True}),
    "cpo_paper": ("cpo", {"summed_nll": True}),
    "rrhf_sumnll": ("rrhf", {"summed_nll": True}),
}
HYPERPARAMETERS = {
    "beta": "beta",
    "label_smoothing": "label_smoothing",
    "alpha": "alpha",
    "gamma_beta_ratio": "rho",
    "nll_weight": "nll_weight",
    "lambda_D": "weight_wanted",
    "lambda_U": "weight_unwanted",
}
LAM = {"dpop": "penalty", "cpo_paper": "nll_weight", "orpo": "beta", "rrhf": "nll_weight", "rrhf_sumnll": "nll_weight"}


def scores_of(case: dict, z: float = 0.0) -> Scores:
    numbers = {
        k: torch.tensor(v, dtype=torch.float64) for k, v in case.items() if isinstance(v, list) and k != "expected"
    }
    positive = numbers["logp_pos"].clone().requires_grad_()
    negative = numbers["logp_neg"].clone().requires_grad_()
    return Scores(
        policy_logps_M=positive,
        completion_tokens_M=numbers["len_pos"],
        tokens_per_prompt=numbers["len_pos"].sum() / len(positive),
        policy_negative_logps_MB=negative,
        negative_tokens_MB=numbers["len_neg"],
        ref_logps_M=numbers["ref_logp_pos"],
        ref_negative_logps_MB=numbers["ref_logp_neg"],
        mismatched_gain_M=torch.full_like(positive, z),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(case):
    """Losses and gradients of every method within 1e-9."""
    for wanted in case["expected"]:
        method = wanted["method"]
        name, extra = OURS.get(method, (method, {}))
        given = {
            LAM[method] if k == "lam" else HYPERPARAMETERS[k]: v for k, v in wanted["hparams"].items() if k != "z0"
        }
        objective = objectives.get(name)
        scores = scores_of(case, case["kl_raw_mean"])
        losses = objective.compute(scores, **{**objective.defaults, **extra, **given})
        loss = losses.surrogate_M.mean()
        loss.backward()
        assert loss.item() == pytest.approx(wanted["loss"], abs=1e-9), method
        assert scores.policy_logps_M.grad.tolist() == pytest.approx(wanted["grad_logp_pos"], abs=1e-9), method
        torch.testing.assert_close(
            scores.policy_negative_logps_MB.grad,
            torch.tensor(wanted["grad_logp_neg"], dtype=torch.float64),
            rtol=0,
            atol=1e-9,
            msg=method,
        )
        assert losses.value_M.mean().item() == pytest.approx(wanted["loss"], abs=1e-9)


def test_every_method_is_covered():
    covered = {OURS.get(e["method"], (e["method"], {}))[0] for case in CASES for e in case["expected"]}
    pairwise = {name for name in objectives.names() if objectives.get(name).compute.__module__.endswith("pairwise")}
    assert pairwise == covered


def test_dpop_penalty_has_no_slope_at_the_kink():
    case = CASES[0] | {"logp_pos": [-5.0], "ref_logp_pos": [-5.0]}
    scores = scores_of(case)
    objective = objectives.get("dpop")
    objective.compute(scores, **objective.defaults).surrogate_M.sum().backward()
    h = 0.3 * ((-5 + 5) - (-6 + 5))
    assert scores.policy_logps_M.grad.item() == pytest.approx(-0.3 / (1 + torch.tensor(h).exp().item()))


def test_orpo_is_finite_when_the_completion_is_certain():
    scores = scores_of(CASES[0] | {"logp_pos": [0.0]})
    objective = objectives.get("orpo")
    loss = objective.compute(scores, **objective.defaults).surrogate_M.sum()
    loss.backward()
    assert loss.isfinite() and scores.policy_logps_M.grad.isfinite().all()
