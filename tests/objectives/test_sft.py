"""SFT and its relatives against recorded float64 numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowdft import objectives
from lowdft.objectives import Scores
from lowdft.objectives.sft import own_probability

CASES = json.loads((Path(__file__).parents[1] / "golden" / "sft_variants.json").read_text())["cases"]
DIVERGENCES = {
    "tv": "total_variation",
    "pearson": "pearson",
    "sq_hellinger_linear_ext_below_minus_half": "squared_hellinger",
    "reverse_kl_scaled_e": "reverse_kl",
    "js": "jensen_shannon",
}


def tokens(case: dict, name: str = "token_logp") -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.float64).requires_grad_() for row in case[name]]


def scores_of(rows: list[torch.Tensor], weight=None, **more) -> Scores:
    logps_M = torch.stack([(row if weight is None else weight(row) * row).sum() for row in rows])
    lengths_M = torch.tensor([len(row) for row in rows])
    return Scores(logps_M, lengths_M, tokens_per_prompt=lengths_M.sum().item() / len(rows), **more)


def loss_of(name: str, scores: Scores, **settings) -> torch.Tensor:
    objective = objectives.get(name)
    return objective.compute(scores, **{**objective.defaults, **settings}).surrogate_M.mean()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(case):
    """SFT, Dynamic Fine-Tuning, PoFT and every divergence: losses and gradients within 1e-9."""
    assert loss_of("sft", scores_of(tokens(case))).item() == pytest.approx(case["sft_token_mean"], abs=1e-9)

    rows = tokens(case)
    loss = loss_of("dynamic_ft", scores_of(rows, objectives.get("dynamic_ft").token_weight))
    loss.backward()
    assert loss.item() == pytest.approx(case["dynamic_ft_token_mean"], abs=1e-9)
    for row, wanted in zip(rows, case["dynamic_ft_grad_token"], strict=True):
        assert row.grad.tolist() == pytest.approx(wanted, abs=1e-9)

    aligned_M = torch.tensor(case["poft"]["aligned_avg_logp"], dtype=torch.float64).mean(1)
    scores = scores_of(tokens(case), aligned_logps_M=aligned_M)
    assert loss_of("poft", scores).item() == pytest.approx(case["poft"]["loss"], abs=1e-9)

    ref_M = torch.stack([row.sum() for row in tokens(case, "ref_token_logp")]).detach()
    wanted = case["fsft_derived"]
    for key, divergence in DIVERGENCES.items():
        scores = scores_of(tokens(case), ref_logps_M=ref_M)
        loss = loss_of("f_sft", scores, divergence=divergence, beta=wanted["beta"])
        assert loss.item() == pytest.approx(wanted[key], abs=1e-9), divergence
        (slope_M,) = torch.autograd.grad(loss * len(ref_M), scores.policy_logps_M)
        for name in ("pearson", "hellinger"):
            if divergence.endswith(name) and f"grad_logp_{name}" in wanted:
                assert (slope_M / len(ref_M)).tolist() == pytest.approx(wanted[f"grad_logp_{name}"], abs=1e-9)


def test_sft_is_the_token_mean():
    """Two prompts with 2 and 4 tokens: (3 + 9) / 6, whatever the mean over prompts is taken of."""
    scores = Scores(torch.tensor([-3.0, -9.0]), torch.tensor([2, 4]), tokens_per_prompt=3.0)
    assert loss_of("sft", scores).item() == pytest.approx(2.0)


@pytest.mark.parametrize("divergence", DIVERGENCES.values())
def test_divergences_begin_as_sft(divergence):
    """At D = 0 every weight is 1 and every value 0; just around -0.5 the continued ones have no jump."""
    here = Scores(torch.zeros(1, dtype=torch.float64, requires_grad=True), torch.ones(1), ref_logps_M=torch.zeros(1))
    loss = loss_of("f_sft", here, divergence=divergence)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, here.policy_logps_M)[0].item() == pytest.approx(-1.0)
    values = [
        loss_of(
            "f_sft",
            Scores(torch.tensor([d * 10.0], dtype=torch.float64), torch.ones(1), ref_logps_M=torch.zeros(1)),
            divergence=divergence,
        ).item()
        for d in (-0.5 - 1e-7, -0.5 + 1e-7)
    ]
    assert values[0] == pytest.approx(values[1], abs=2e-5)


def test_own_probability_is_a_constant():
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert not own_probability(logps).requires_grad


def test_unknown_divergence_is_told():
    scores = Scores(torch.zeros(1), torch.ones(1), ref_logps_M=torch.zeros(1))
    with pytest.raises(ValueError, match="total_variation"):
        loss_of("f_sft", scores, divergence="kl")
