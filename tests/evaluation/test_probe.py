"""The probe's measures by hand, and its verdict where the right one is known."""

from __future__ import annotations

import math
import random

import pytest
import torch
from helpers import lora, make_llama
from peft import get_peft_model

from lowdft.evaluation.probe import (
    Gain,
    Method,
    accumulate,
    coverage,
    gradient_test,
    half_weight,
    outscored,
    recommend,
    summed_logps,
    teach,
)
from lowdft.training.token_budget import Passes

PASSES = Passes("packed", 64, 4096)
METHODS = [
    Method("sft", {}, 0),
    Method("listwise", {"beta": 1.0, "nll_weight": 1.0, "per_token": True}, 1),
    Method("dft", {"tau": 1.0, "gamma": 0.85, "nll_weight": 0.0}, 1),
]


def rows(kind: str, n: int, seed: int) -> list[dict]:
    """Ids: three letters that carry nothing, then a label that depends on the prompt.

    near: the negative is the completion with the other label. junk: it is long and of letters never trained on.
    """
    rng, out = random.Random(seed), []
    for _ in range(n):
        key = rng.randrange(2)
        label = key if rng.random() < 0.8 else 1 - key  # a fifth of the labels cannot be known
        letters = [rng.randrange(20, 40) for _ in range(3)]
        junk = [rng.randrange(60, 90) for _ in range(24)]
        out.append(
            {
                "prompt_ids": [3 + key, 9],
                "completion_ids": [*letters, 10 + label, 2],
                "negative_ids": [[*letters, 11 - label, 2] if kind == "near" else junk],
            }
        )
    return out


def probed(kind: str) -> tuple[dict, dict[str, Gain]]:
    model = get_peft_model(make_llama(), lora())
    train, heldout = rows(kind, 64, 0), rows(kind, 64, 1)
    ref = summed_logps(model, train, 1, PASSES)
    teach(model, train, 15, 16, 1e-2, PASSES)
    share, lead = outscored(summed_logps(model, heldout, 1, PASSES))
    found = {"outscored_after": share, "lead_after": lead, "half_weight": half_weight(0.85)}
    found["drift"] = float((ref - summed_logps(model, train, 1, PASSES))[:, :-1].mean())
    return found, gradient_test(model, train, heldout, METHODS, 1, PASSES, ref)


def test_junk_has_nothing_to_win():
    """Long random text is never ahead of the completion."""
    found, gains = probed("junk")
    assert found["outscored_after"] == 0.0
    name, why = recommend(found, gains)
    assert name == "sft" and "nothing to gain" in why


def test_near_misses_help():
    """The other label in the same words stays ahead on a part of the rows: an objective with negatives is named."""
    found, gains = probed("near")
    assert 0.05 < found["outscored_after"] < 0.9
    assert gains["listwise"].ahead > gains["listwise"].error
    name, _ = recommend(found, gains)
    assert name != "sft"


def test_a_gradient_is_that_of_the_method():
    """SFT's on two rows, against autograd on its definition; nothing is left in the parameters afterwards."""
    model, two = make_llama(), rows("near", 2, 0)
    accumulate(model, two, METHODS[0], PASSES)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total = 0.0
    for row in two:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        logps = model(ids).logits.log_softmax(-1)[0, 1:-1]
        total = total - logps.gather(1, ids[0, 2:, None]).sum()
    (total / 10).backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-6)


def test_measures_by_hand():
    """Three rows: ahead by 1, behind by 2 and by 4. Samples a a b and c: b and c were seen once."""
    logps = torch.tensor([[-3.0, -9.0, -2.0], [-1.0, -5.0, -3.0], [-5.0, -1.0, -5.0]])
    assert outscored(logps) == (pytest.approx(2 / 3), 3.0)
    assert coverage([["a", "a", "b"], ["c"]]) == 0.5
    assert half_weight(0.85) == pytest.approx(1.7346, abs=1e-4) and half_weight(0.95, -1) == pytest.approx(
        3.9444, abs=1e-4
    )
    assert half_weight(1.0) == math.inf


def test_recommendations():
    """In the order of the rules: nothing to gain, teach first, dead DFT weights, the error, the best one."""
    found = {"outscored_after": 0.3, "lead_after": 1.0, "drift": 0.5, "half_weight": 1.7}
    gains = {"sft": Gain(10.0, 0.0, 0.0), "listwise": Gain(12.0, 2.0, 1.0), "dft": Gain(13.0, 3.0, 1.0)}
    assert recommend(found, gains) == ("dft", "its next step gains +30% compared with SFT's")
    losing = {"sft": Gain(-10.0, 0.0, 0.0), "dft": Gain(2.0, 12.0, 1.0)}
    assert recommend(found, losing) == ("dft", "its next step gains on held-out rows, while SFT's loses")
    assert recommend(found | {"drift": 5.0}, gains)[0] == "listwise"
    assert "within the error" in recommend(found, gains | {"dft": Gain(11.0, 1.0, 2.0), "listwise": gains["sft"]})[1]
    assert "as much" in recommend(found, {"sft": gains["sft"], "dft": Gain(1.0, -9.0, 1.0)})[1]
    assert "nothing to gain" in recommend(found | {"outscored_after": 0.04}, gains)[1]
    assert "teach the task with SFT" in recommend(found | {"outscored_after": 0.95, "lead_after": 6.0}, gains)[1]
