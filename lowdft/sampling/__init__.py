"""Drawing answers from a model: one sample per request, with a seed of its own, by a choice of backends."""

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
        model: a transformers model, under an adapter or not, left as it was found; for vllm a `VllmModel`.
        end_ids: every token that ends an answer, one or more.
        batch_size: samples at work at once; None: as many as fit (`draw.fitting`).

    Raises:
        UserError: vLLM is asked for and not installed.
    """
    samplers = {"padded": PaddedSampler, "continuous": ContinuousSampler, "vllm": VllmSampler}
    return samplers[backend](model, list(end_ids), settings, batch_size)
