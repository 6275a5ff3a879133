"""SFT and its relatives against recorded float64 numbers."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from helpers import GOLDEN

from lowdft import objectives
from lowdft.objectives import Scores
from lowdft.objectives.sft import later_loss, own_probability

CASES = json.loads((GOLDEN / "sft_variants.json").read_text())["cases"]
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
    lengths_M = torch.tensor([len(row) for row in rows])
    logps_S, prompt_S = torch.cat(rows), torch.arange(len(rows)).repeat_interleave(lengths_M)
    weighted_S = logps_S if weight is None else weight(logps_S, prompt_S) * logps_S
    logps_M = torch.zeros(len(rows), dtype=logps_S.dtype).index_add(0, prompt_S, weighted_S)
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
    assert not own_probability(logps, torch.zeros(2, dtype=torch.int64)).requires_grad


def later(rows: list[torch.Tensor], decay: float, detached: bool = False) -> torch.Tensor:
    numbers = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    return later_loss(torch.cat(rows), numbers, decay, detached, predicted_share=0.2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_ift_golden(case):
    """Weights and loss of Intuitive Fine-Tuning within 1e-9."""
    wanted, rows = case["ift_weights"], tokens(case)
    weights = later(rows, wanted["gamma"])
    assert weights.tolist() == pytest.approx(sum(wanted["weights"], []), abs=1e-9)
    weight = partial(later_loss, decay=wanted["gamma"], detached=False, predicted_share=0.2)
    assert loss_of("ift", scores_of(rows, weight)).item() == pytest.approx(wanted["loss"], abs=1e-9)


def test_ift_by_hand():
    """l = 1, 2 with decay 1/2: sums ahead 2 and 2, so W = 1, 1 and the loss is SFT's. Its slope by l_1:

    L = (l_1 W_1 + l_2 W_2) / 2, W_1 = 2 (l_1 + l_2/2) / (l_1 + 3/2 l_2): dW_1/dl_1 = 2 (4 - 2) / 16 = 1/4 = -dW_2/dl_1;
    so dL/dl_1 = (W_1 + 1/4 - 2/4) / 2 = 3/8, and 1/2 with constant weights.
    """
    for detached, slope in ((False, 3 / 8), (True, 1 / 2)):
        rows = [torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)]
        assert later(rows, 0.5).tolist() == [1.0, 1.0]
        loss = loss_of("ift", scores_of(rows, partial(later_loss, decay=0.5, detached=detached, predicted_share=0.2)))
        loss.backward()
        assert loss.item() == 1.5 and rows[0].grad[0].item() == pytest.approx(-slope)


def test_ift_of_a_certain_completion_is_zero():
    rows = [torch.zeros(3, requires_grad=True)]
    weight = partial(later_loss, decay=0.95, detached=False, predicted_share=0.2)
    loss = loss_of("ift", scores_of(rows, weight))
    loss.backward()
    assert loss.item() == 0 and rows[0].grad.isfinite().all()


def test_unknown_divergence_is_told():
    scores = Scores(torch.zeros(1), torch.ones(1), ref_logps_M=torch.zeros(1))
    with pytest.raises(ValueError, match="total_variation"):
        loss_of("f_sft", scores, divergence="kl")
