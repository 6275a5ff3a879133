"""Samples from a causal language model, each from its own seed: padded batches, continuous batching or vLLM.

With the transformers backends, token t of a sample is the inverse-CDF draw with the t-th uniform number of its seed.
A sample depends only on the model, its prompt, the settings and its seed, not on the rest of its batch or on the order
of requests, up to floating-point noise between batches. In float32 no difference was seen, but in bfloat16 noise
changes samples (SmolLM2-135M: 21 of 64 samples differ between batches of 32 and of 64). To get the same samples after
an interruption, keep the composition of batches, as `generate` does.

Dimension suffixes: R requests, V vocabulary, T new tokens, P prompt tokens, C candidates.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from lowdft.errors import UserError
from lowdft.logprobs import truncate
from lowdft.models.safeguards import guard_four_bit

SAMPLES_ON_A_CPU = 32


@dataclass(frozen=True)
class SamplingSettings:
    """Temperature (0: greedy), then top-k (0: off), then top-p (1: off); at most `max_new_tokens` tokens per sample.

    A sample whose text contains one of `stop` is not continued (except by the backend continuous).
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 320
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A prompt and the seed (0 to 2**63 - 1) of its one sample."""

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Sample:
    """`finish_reason` is "stop" (`token_ids` end with the end token that the model wrote) or "length" (none there)."""

    token_ids: list[int]
    finish_reason: str


class Sampler(Protocol):
    """A backend."""

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample per request, in the order of the requests.

        Raises:
            UserError: memory does not hold one of them.
        """
        ...


def uniforms(seed: int, n: int) -> Tensor:
    """The uniform numbers in [0, 1) of a sample: float32 [n] on the CPU; the first m of n are those of m."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def draw(logits_RV: Tensor, u_R: Tensor, settings: SamplingSettings) -> Tensor:
    """Token ids [R] where the cumulative distribution, in the order of the vocabulary, first exceeds u [R].

    The distribution is the softmax of `truncate(logits / temperature)`. That order is the same in every batch;
    near-equal tokens ordered by probability would swap under floating-point noise.
    """
    if settings.temperature == 0:
        return logits_RV.argmax(1)
    logits_RC, ids_RC = logits_RV.float(), None
    if 0 < 2 * settings.top_k < logits_RC.shape[1]:
        # Twice top_k: truncate also keeps the tokens that tie with the last one, as bfloat16 logits often do.
        ids_RC = logits_RC.topk(2 * settings.top_k, dim=1).indices.sort(dim=1).values
        logits_RC = logits_RC.gather(1, ids_RC)
    probs_RC = truncate(logits_RC / settings.temperature, settings.top_p, settings.top_k).softmax(1)
    # float64: rounding neither lifts u to the total nor makes room for a token of probability 0.
    cdf_RC = probs_RC.double().cumsum(1)
    at_R1 = torch.searchsorted(cdf_RC, u_R[:, None].double() * cdf_RC[:, -1:], right=True)
    return (at_R1 if ids_RC is None else ids_RC.gather(1, at_R1))[:, 0]


def only(ids_R: Tensor, scores_RV: Tensor) -> Tensor:
    """Scores under which the greedy choice is `ids_R`."""
    return torch.full_like(scores_RV, float("-inf")).scatter_(1, ids_R[:, None], 0.0)


def finish(ids: list[int], end_ids: list[int]) -> Sample:
    """New token ids up to and with their first end token."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), None)
    return Sample(ids, "length") if end is None else Sample(ids[: end + 1], "stop")


@contextmanager
def generating(model, end_ids: list[int], settings: SamplingSettings) -> Iterator:
    """A context with the model without its peft wrapper (adapter layers stay), in eval mode and with neutral generation
    settings; otherwise `generate` would add the model's own settings, such as a repetition penalty."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, own = [module for module in model.modules() if module.training], plain.generation_config
    plain.generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=end_ids,
        pad_token_id=end_ids[0],
    )
    guard_four_bit(model)
    model.eval()
    try:
        with torch.no_grad():
            yield plain
    finally:
        plain.generation_config = own
        for module in training:
            module.training = True


def fitting(model, requests: Sequence[Request], settings: SamplingSettings) -> int:
    """Samples generated at once: 32 on a CPU; on a GPU, as many of the longest as half of its free memory holds."""
    if model.device.type != "cuda":
        return SAMPLES_ON_A_CPU
    longest = max(len(request.prompt_ids) for request in requests) + settings.max_new_tokens
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(model.device)[0]
    return max(1, min(len(requests), int(free / 2 / sample_bytes(model.config, model.dtype.itemsize, longest))))


def sample_bytes(config, size: int, tokens: int) -> int:
    """Bytes of a sample with this many tokens: keys and values with `size` bytes per number, and its logits."""
    return tokens * cache_bytes(config, size) + 32 * config.get_text_config().vocab_size  # logits, and their copies


def cache_bytes(config, size: int) -> int:
    """Bytes of keys and values per token, in all layers."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * heads * head_dim * size


def fewer(batch_size: int, error: BaseException) -> int:
    """Halves the number of samples at once after memory ran out, with a warning.

    Raises:
        UserError: memory ran out with a single sample.
    """
    if batch_size == 1:
        raise UserError(
            "out of memory while sampling a single answer: lower negatives.max_new_tokens (or "
            "evaluation.max_new_tokens), load the base in 4 bit, or free memory on the device"
        ) from error
    warnings.warn(
        f"out of memory: from here {batch_size // 2} samples are drawn at once; set batch_size={batch_size // 2} to "
        "avoid the failed attempt",
        stacklevel=3,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return batch_size // 2
