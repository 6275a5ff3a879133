"""Samples answers from a model: one sample per request, each with its own seed, with a choice of backends."""

from __future__ import annotations

from collections.abc import Sequence

from lowdft.sampling.continuous import ContinuousSampler
from lowdft.sampling.draw import Request, Sample, Sampler, SamplingSettings
from lowdft.sampling.padded import PaddedSampler
from lowdft.sampling.vllm import VllmModel, VllmSampler

__all__ = ["Request", "Sample", "Sampler", "SamplingSettings", "VllmModel", "get_sampler"]


def get_sampler(
    backend: str, model, end_ids: Sequence[int], settings: SamplingSettings, batch_size: int | None
) -> Sampler:
    """The sampler of a backend.

    Args:
        backend: "padded" or "continuous" (transformers), or "vllm".
        model: a transformers model with or without an adapter, which is not changed; for vllm a `VllmModel`.
        end_ids: all tokens that end an answer, at least one.
        batch_size: samples generated at the same time; None means as many as fit (`draw.fitting`).

    Raises:
        UserError: the backend is vllm, which is not installed.
    """
    samplers = {"padded": PaddedSampler, "continuous": ContinuousSampler, "vllm": VllmSampler}
    return samplers[backend](model, list(end_ids), settings, batch_size)
