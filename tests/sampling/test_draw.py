"""Drawing a token: the target distribution, its cuts, and uniform numbers by seed."""

from __future__ import annotations

import pytest
import torch
from helpers import VOCABULARY

from lowdft.logprobs import truncate
from lowdft.sampling import SamplingSettings
from lowdft.sampling.draw import draw, uniforms


def target(logits, settings):
    return truncate(logits / settings.temperature, settings.top_p, settings.top_k).softmax(1)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (10, 1.0), (0, 0.8), (10, 0.8), (60, 1.0)])
def test_draw_splits_the_unit_interval_into_the_target_probabilities(top_k, top_p):
    settings = SamplingSettings(temperature=0.7, top_p=top_p, top_k=top_k)
    logits = 2 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    n = 20_000
    ids = draw(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, settings)
    torch.testing.assert_close(
        torch.bincount(ids, minlength=VOCABULARY) / n, target(logits, settings)[0], rtol=0, atol=1.5 / n
    )


def test_draws_of_many_seeds_follow_the_target_distribution():
    settings = SamplingSettings(temperature=0.7, top_k=10)
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3))
    u = torch.stack([uniforms(seed, 1)[0] for seed in range(5000)])
    counts = torch.bincount(draw(logits.expand(5000, -1), u, settings), minlength=VOCABULARY).double()
    expected = 5000 * target(logits, settings)[0].double()
    kept = expected > 0
    assert kept.sum() == 10 and counts[~kept].sum() == 0
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 27.9  # 9 degrees of freedom: once in 1000


def test_draw_keeps_the_tokens_that_tie_with_the_last_of_top_k():
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 50:54] = torch.tensor([3.0, 2.0, 1.0, 1.0])
    ids = draw(logits.expand(1000, -1), (torch.arange(1000) + 0.5) / 1000, SamplingSettings(temperature=1.0, top_k=3))
    assert set(ids.tolist()) == {50, 51, 52, 53}


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_outermost_uniform_numbers_draw_tokens_that_were_not_cut(u):
    logits, settings = torch.randn(512, VOCABULARY), SamplingSettings(temperature=1.0, top_p=0.5, top_k=20)
    ids = draw(logits, torch.full((512,), u), settings)
    assert (target(logits, settings).gather(1, ids[:, None]) > 0).all()


def test_uniform_numbers_hang_on_the_seed():
    assert torch.equal(uniforms(3, 5), uniforms(3, 9)[:5])
    assert not torch.equal(uniforms(3, 5), uniforms(4, 5))
