"""Measures how much two models differ on the same completions, for example after merging or quantizing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Predictions:
    """A model's log-probabilities [T, V] (float32, on the CPU) at T completion tokens, and those tokens [T]."""

    logps_TV: Tensor
    ids_T: Tensor

    @property
    def nll(self) -> float:
        """Negative log-likelihood, nats per token."""
        return -self.logps_TV.gather(1, self.ids_T[:, None]).mean(dtype=torch.float64).item()


@torch.no_grad()
def predict(model: nn.Module, rows: Sequence[dict], tokens: int) -> Predictions:
    """A model's predictions at the completion tokens of the first rows, up to `tokens` tokens in total.

    Args:
        rows: rows with `prompt_ids` and `completion_ids`.
        tokens: limits memory; tokens x vocabulary x 4 bytes are kept on the CPU.
    """
    model.eval()
    logps, ids = [], []
    for row in rows:
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        completion = completion[: tokens - len(ids)]
        if not completion:
            break
        whole = torch.tensor([[*prompt, *completion]], device=model.device)
        logits_1LV = model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits
        logps.append(logits_1LV[0, len(prompt) - 1 : -1].float().log_softmax(1).cpu())
        ids += completion
    return Predictions(torch.cat(logps), torch.tensor(ids))


def kl(true: Predictions, other: Predictions) -> float:
    """KL(true || other) of the next-token distributions, nats per token."""
    gap_TV = true.logps_TV.exp().mul_(true.logps_TV - other.logps_TV)
    return gap_TV.sum(1).mean(dtype=torch.float64).item()


def agreement(true: Predictions, other: Predictions) -> float:
    """The share of positions at which both have the same most likely token."""
    return (true.logps_TV.argmax(1) == other.logps_TV.argmax(1)).float().mean().item()
