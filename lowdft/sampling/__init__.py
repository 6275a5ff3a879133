"""Samples answers from a model: one sample per request, each with its own seed, with a choice of backends."""

from __future__ import annotations

from collections.abc import Sequence

from lowdft.sampling.continuous import ContinuousSampler
from lowdft.sampling.draw import Request, Sample, Sampler, SamplingSettings
from lowdft.sampling.padded import PaddedSampler
from lowdft.sampling.vllm import VllmModel, VllmSampler

__all__ = ["Request", "Sample", "Sampler", "SamplingSettings", "VllmModel", "get_sampler"]


def get_sampler(
    backend: str, model, end_ids: Sequence[int], settings: SamplingSettings, batch_size: int | None, tokenizer=None
) -> Sampler:
    """The sampler of a backend.

    Args:
        backend: "padded" or "continuous" (transformers), or "vllm".
        model: a transformers model with or without an adapter, which is not changed; for vllm a `VllmModel`.
        end_ids: all tokens that end an answer, at least one.
        batch_size: samples generated at the same time; None means as many as fit (`draw.fitting`).
        tokenizer: turns tokens into the text in which the backend padded looks for `settings.stop`.

    Raises:
        UserError: the backend is vllm, which is not installed.
    """
    if backend == "padded":
        return PaddedSampler(model, list(end_ids), settings, batch_size, tokenizer)
    return {"continuous": ContinuousSampler, "vllm": VllmSampler}[backend](model, list(end_ids), settings, batch_size)
