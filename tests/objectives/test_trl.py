"""Preference objectives against TRL's own functions, on random log-probabilities.

TRL's DPO and KTO trainers compute their loss inside `_compute_loss`; it is called here as it stands, on a stand-in for
the trainer whose model returns the random log-probabilities.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lowdft import objectives
from lowdft.objectives import Scores


def random_pair(seed: int = 0) -> Scores:
    torch.manual_seed(seed)
    chosen, rejected, ref_chosen, ref_rejected = (-10 * torch.rand(6) for _ in range(4))
    lengths = torch.randint(3, 9, (2, 6)).float()
    return Scores(
        chosen,
        lengths[0],
        policy_negative_logps_MB=rejected[:, None],
        negative_tokens_MB=lengths[1][:, None],
        ref_logps_M=ref_chosen,
        ref_negative_logps_MB=ref_rejected[:, None],
    )


def test_cpo_and_simpo_equal_trl():
    """CPOTrainer.cpo_loss on summed log-probabilities, and with loss_type simpo on means a token."""
    trl = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    scores = random_pair()
    pair = scores.policy_logps_M, scores.policy_negative_logps_MB[:, 0]
    mean = pair[0] / scores.completion_tokens_M, pair[1] / scores.negative_tokens_MB[:, 0]
    theirs = SimpleNamespace(
        alpha=0.0, beta=2.0, simpo_gamma=0.5, label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu")
    )
    for loss_type, name, inputs, settings in [
        ("sigmoid", "cpo", pair, {"beta": 2.0, "nll_weight": 0.0, "summed_nll": False}),
        ("simpo", "simpo", mean, {"beta": 2.0, "rho": 0.25, "nll_weight": 0.0}),
    ]:
        theirs.loss_type = loss_type
        wanted = trl.CPOTrainer.cpo_loss(theirs, *inputs)[0]
        torch.testing.assert_close(objectives.get(name).compute(scores, **settings).value_M, wanted)


def test_orpo_equals_trl():
    """ORPOTrainer.odds_ratio_loss, to which TRL adds the NLL."""
    trl = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    scores = random_pair()
    means = scores.policy_logps_M / scores.completion_tokens_M
    others = scores.policy_negative_logps_MB[:, 0] / scores.negative_tokens_MB[:, 0]
    theirs = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    wanted = -trl.ORPOTrainer.odds_ratio_loss(theirs, means, others)[0]
    found = objectives.get("orpo").compute(scores, beta=0.1, nll_weight=0.0).value_M
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


class Outputs(defaultdict):
    """What TRL's patched models return: log-probabilities [rows, tokens], and statistics that it only logs."""

    def __init__(self, log_probs: Tensor):
        super().__init__(lambda: torch.zeros_like(log_probs), log_probs=log_probs)
        self["is_top1"] = torch.zeros_like(log_probs, dtype=torch.bool)

    __getattr__ = defaultdict.__getitem__


def stand_in(**settings) -> SimpleNamespace:
    """What `_compute_loss` reads of a TRL trainer."""
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu")
    metrics = defaultdict(lambda: defaultdict(list))
    common = dict(accelerator=same, model=torch.nn.Module(), _metrics=metrics, _total_train_tokens=0, _tp_size=1)
    return SimpleNamespace(**common, aux_loss_enabled=False, precompute_ref_logps=True, **settings)


def one_a_token(logps_C: Tensor, tokens_C: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums as log-probabilities a token [C, tokens], and TRL's inputs for rows of one prompt token and these."""
    mask = torch.arange(int(tokens_C.max()) + 1) <= tokens_C[:, None]
    mask[:, 0] = False
    inputs = dict(input_ids=mask.long(), attention_mask=torch.ones_like(mask), completion_mask=mask.long())
    return (logps_C / tokens_C)[:, None] * mask[:, 1:], inputs


@pytest.mark.parametrize(
    "loss_type, name, settings",
    [
        ("sigmoid", "dpo", {"beta": 0.3, "label_smoothing": 0.0}),
        ("sigmoid", "spin", {"beta": 0.3, "label_smoothing": 0.0}),
        ("robust", "robust_dpo", {"beta": 0.3, "label_smoothing": 0.2}),
        ("ipo", "ipo", {"beta": 0.3, "length_normalized": True}),
    ],
)
def test_dpo_and_its_kin_equal_trl(loss_type, name, settings):
    """DPOTrainer._compute_loss: the loss, and its gradient by the completions' log-probabilities."""
    pytest.importorskip("trl", "1.16", reason="older trainers of TRL look different inside")
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    scores = random_pair()
    policy = torch.cat([scores.policy_logps_M, scores.policy_negative_logps_MB[:, 0]]).requires_grad_()
    per_token, inputs = one_a_token(policy, torch.cat([scores.completion_tokens_M, scores.negative_tokens_MB[:, 0]]))
    inputs |= dict(ref_chosen_logps=scores.ref_logps_M, ref_rejected_logps=scores.ref_negative_logps_MB[:, 0])
    theirs = stand_in(
        beta=settings["beta"],
        label_smoothing=settings.get("label_smoothing", 0.0),
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
    )
    wanted = trl.DPOTrainer._compute_loss(theirs, lambda **_: Outputs(per_token), inputs, return_outputs=False)
    (wanted_slope,) = torch.autograd.grad(wanted, policy)
    scores.policy_logps_M, negative = policy.chunk(2)
    scores.policy_negative_logps_MB = negative[:, None]
    found = objectives.get(name).compute(scores, **settings).surrogate_M.mean()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, policy)[0], wanted_slope)


def test_cdpo_equals_trl():
    """CPOTrainer.cpo_loss with label smoothing, which TRL's DPO has no more, on gains over the reference."""
    trl = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    scores = random_pair()
    gain = scores.policy_logps_M - scores.ref_logps_M
    other = (scores.policy_negative_logps_MB - scores.ref_negative_logps_MB)[:, 0]
    theirs = SimpleNamespace(alpha=0.0, beta=0.3, label_smoothing=0.2, loss_type="sigmoid")
    theirs.accelerator = SimpleNamespace(device="cpu")
    wanted = trl.CPOTrainer.cpo_loss(theirs, gain, other)[0]
    found = objectives.get("cdpo").compute(scores, beta=0.3, label_smoothing=0.2).value_M
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shift", [2.0, -2.0])
def test_kto_equals_trl(shift):
    """KTOTrainer._compute_loss on wanted and unwanted rows, with a mean over mismatched ones above and below 0."""
    pytest.importorskip("trl", "1.16", reason="older trainers of TRL look different inside")
    trl = pytest.importorskip("trl.trainer.kto_trainer")
    scores = random_pair()
    policy = torch.cat([scores.policy_logps_M, scores.policy_negative_logps_MB[:, 0]]).requires_grad_()
    tokens = torch.cat([scores.completion_tokens_M, scores.negative_tokens_MB[:, 0]])
    per_token, inputs = one_a_token(policy, tokens)
    mismatched, kl_inputs = one_a_token(policy.detach().flip(0), tokens.flip(0))
    inputs |= {f"KL_{key}": value for key, value in kl_inputs.items()}
    inputs |= dict(label=torch.arange(12) < 6, ref_KL_logps=mismatched.sum(1) - shift - torch.arange(12) / 12)
    inputs["ref_logps"] = torch.cat([scores.ref_logps_M, scores.ref_negative_logps_MB[:, 0]])
    theirs = stand_in(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7, calculate_KL=True, loss_type="kto")
    theirs._compute_kl_logps = lambda model, batch: trl.KTOTrainer._compute_kl_logps(theirs, model, batch)
    calls = iter([mismatched, per_token])
    wanted = trl.KTOTrainer._compute_loss(theirs, lambda **_: Outputs(next(calls)), inputs, return_outputs=False)
    scores.policy_logps_M, negative = policy.chunk(2)
    scores.policy_negative_logps_MB = negative[:, None]
    scores.mismatched_gain_M = (mismatched.sum(1) - inputs["ref_KL_logps"]).mean().expand(6)
    settings = {"beta": 0.3, "weight_wanted": 1.5, "weight_unwanted": 0.7}
    found = objectives.get("kto").compute(scores, **settings).surrogate_M.mean()
    torch.testing.assert_close(found, wanted)
    slopes = (torch.autograd.grad(loss, policy)[0] for loss in (found, wanted))
    torch.testing.assert_close(*slopes)
