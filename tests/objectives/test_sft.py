"""SFT is the token mean of the negative log-likelihood over the whole step."""

from __future__ import annotations

import pytest
import torch

from lowdft import objectives
from lowdft.objectives import Scores


def test_token_mean():
    """(2 + 9) nats over (1 + 4) tokens, whatever the prompts' lengths: 11 / 5."""
    scores = Scores(torch.tensor([-2.0, -9.0]), torch.tensor([1, 4]), tokens_per_prompt=5 / 2)
    assert objectives.get("sft").compute(scores).surrogate_M.mean().item() == pytest.approx(11 / 5)
