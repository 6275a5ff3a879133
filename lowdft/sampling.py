"""Drawing answers from a model: a seed a sample, so that order, batches and interruptions change nothing.

Token t of a sample is the inverse-CDF draw at its own uniform number u[t] from the truncated distribution. All uniform
numbers of a sample come from its seed, and both transformers backends share one `draw`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from lowdft.errors import UserError
from lowdft.logps import truncate

PAGE_TOKENS = 32  # tokens of one page of the continuous backend's cache


@dataclass(frozen=True)
class SamplingSettings:
    """Temperature (0: greedy), then top-k (0: off), then top-p (1: off); at most `max_new_tokens` a sample."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 320


@dataclass(frozen=True)
class Request:
    """One sample to draw."""

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Sample:
    """`finish_reason` "stop": the ids end with the end token that the model wrote; "length": none is invented."""

    token_ids: list[int]
    finish_reason: str


class Sampler(Protocol):
    """A backend."""

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample a request, in the order of the requests."""
        ...


def get_sampler(backend: str, model, end_ids: list[int], settings: SamplingSettings, batch_size: int) -> Sampler:
    """The sampler of a backend.

    Args:
        backend: "padded" or "continuous" (transformers), or "vllm".
        model: a transformers model, under an adapter or not; for vllm a `lowdft.model.Source`.
        end_ids: every token id that ends an answer.
        batch_size: samples at work at once.

    Raises:
        UserError: the backend's package is not installed.
    """
    samplers = {"padded": PaddedSampler, "continuous": ContinuousSampler, "vllm": VllmSampler}
    return samplers[backend](model, end_ids, settings, batch_size)


def draw(logits_RV: Tensor, u_R: Tensor, settings: SamplingSettings) -> Tensor:
    """Token ids [R] at the uniform numbers [R] of the truncated distributions; likelier tokens first."""
    if settings.temperature == 0:
        return logits_RV.argmax(-1)
    logits_RV = logits_RV.float() / settings.temperature
    k = settings.top_k if 0 < settings.top_k < logits_RV.shape[1] else logits_RV.shape[1]
    ordered, order = logits_RV.topk(k, dim=1)
    cumulative = truncate(ordered, settings.top_p, 0).softmax(1).cumsum(1)
    at_R = torch.searchsorted(cumulative, u_R.to(cumulative)[:, None] * cumulative[:, -1:], right=True)
    return order.gather(1, at_R.clamp_max(k - 1))[:, 0]


def uniforms(seed: int, n: int) -> Tensor:
    """The n uniform numbers of a sample."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def _finish(token_ids: list[int], end_ids: list[int]) -> Sample:
    for i, token in enumerate(token_ids):
        if token in end_ids:
            return Sample(token_ids[: i + 1], "stop")
    return Sample(token_ids, "length")


def _only(scores_RV: Tensor, ids_R: Tensor) -> Tensor:
    """Scores under which the greedy choice is `ids_R`."""
    return torch.full_like(scores_RV, float("-inf")).scatter_(1, ids_R[:, None], 0.0)


class PaddedSampler:
    """transformers' `generate` on left-padded batches of prompts of like length."""

    def __init__(self, model, end_ids: list[int], settings: SamplingSettings, batch_size: int):
        self.model, self.end_ids, self.settings, self.batch_size = model, end_ids, settings, batch_size

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Sampler`; leaves the model in the mode it was in."""
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        samples: dict[int, Sample] = {}
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(by_length), self.batch_size):
                chosen = by_length[start : start + self.batch_size]
                samples |= zip(chosen, self._batch([requests[i] for i in chosen]), strict=True)
        finally:
            self.model.train(training)
        return [samples[i] for i in range(len(requests))]

    def _batch(self, requests: list[Request]) -> list[Sample]:
        width, device = max(len(r.prompt_ids) for r in requests), self.model.device
        pad = self.end_ids[0]
        ids = torch.tensor([[pad] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests], device=device)
        mask = torch.tensor(
            [[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests], device=device
        )
        length = self.settings.max_new_tokens
        u = torch.stack([uniforms(r.seed, length) for r in requests]).to(device)
        config = GenerationConfig(
            max_new_tokens=length, do_sample=False, eos_token_id=self.end_ids, pad_token_id=pad, use_cache=True
        )
        drawing = LogitsProcessorList([_PaddedDraw(u, width, self.settings)])
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=drawing
        )  # fmt: skip
        return [_finish(row, self.end_ids) for row in out[:, width:].tolist()]


class _PaddedDraw(LogitsProcessor):
    def __init__(self, u_RT: Tensor, prompt_width: int, settings: SamplingSettings):
        self.u_RT, self.prompt_width, self.settings = u_RT, prompt_width, settings

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_width
        return _only(scores, draw(scores, self.u_RT[:, step], self.settings))


class ContinuousSampler:
    """transformers' continuous batching: a sample that ends makes room for the next at once.

    The cache is sized to the work: pages for `batch_size` samples of the longest prompt and `max_new_tokens` each, and
    as many tokens a forward pass as `batch_size` samples and one prompt need; on a GPU at most 80% of the free memory.
    """

    def __init__(self, model, end_ids: list[int], settings: SamplingSettings, batch_size: int):
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.end_ids, self.settings, self.batch_size = end_ids, settings, batch_size

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Sampler`; restores the model's mode and attention.

        Raises:
            RuntimeError: the library's generation thread failed.
        """
        if not requests:
            return []
        training, attention = self.model.training, self.model.config._attn_implementation
        config = GenerationConfig(
            max_new_tokens=self.settings.max_new_tokens, do_sample=False, eos_token_id=self.end_ids
        )
        manager = self.model.init_continuous_batching(config, self._cache(requests))
        processors = ContinuousBatchingLogitsProcessorList(
            LogitsProcessorList([_ContinuousDraw(requests, self.settings)]), per_request_processors=True
        )
        processors.tensors_required = 1
        manager.logit_processor = processors
        try:
            manager.start()
            for i, request in enumerate(requests):
                manager.add_request(list(request.prompt_ids), request_id=str(i), eos_token_id=self.end_ids,
                                    max_new_tokens=self.settings.max_new_tokens)  # fmt: skip
            samples: dict[int, Sample] = {}
            while len(samples) < len(requests):
                result = manager.get_result(timeout=1)
                if result is not None and result.error:
                    raise RuntimeError(f"continuous batching failed: {result.error}")
                if result is not None and result.is_finished():
                    samples[int(result.request_id)] = _finish(list(result.generated_tokens), self.end_ids)
                elif result is None and not manager.is_running():
                    raise RuntimeError("the continuous-batching thread ended before its work")
        finally:
            manager.stop(block=True)
            self.model.set_attn_implementation(attention)
            self.model.train(training)
        return [samples[i] for i in range(len(requests))]

    def _cache(self, requests: Sequence[Request]) -> ContinuousBatchingConfig:
        longest = max(len(r.prompt_ids) for r in requests)
        at_once = min(self.batch_size, len(requests))
        pages = -(-(longest + self.settings.max_new_tokens + 1) // PAGE_TOKENS) + 1
        return ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=pages * at_once,
            max_batch_tokens=max(at_once, 64) + longest,
            max_requests_per_batch=at_once,
            max_memory_percent=0.8,
            use_async_batching=False,
            auto_switch_to_flash=False,
        )


class _ContinuousDraw(ContinuousBatchingLogitsProcessor):
    """Hands every request its next uniform number (float32 in the library's int32 tensor) and draws."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, requests: Sequence[Request], settings: SamplingSettings):
        self.settings = settings
        self.u = {str(i): iter(uniforms(r.seed, settings.max_new_tokens + 1).tolist()) for i, r in enumerate(requests)}

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing is drawn for warm-up tokens."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token) -> Tensor:
        """The next uniform number of each request that gets a token in this pass."""
        u = [next(self.u[request.state.request_id]) for request in requests_with_new_token]
        return torch.tensor(u, dtype=torch.float32).view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Leaves each row its drawn token alone."""
        u_R = tensor_arg[: scores.shape[0]].view(torch.float32)
        return _only(scores, draw(scores, u_R, self.settings))


class VllmSampler:
    """vLLM, offline. Its samples follow its own random numbers, seeded a request, and its own arithmetic (no 4-bit
    base of ours), so they differ from the other backends'. Not run in this project's tests."""

    def __init__(self, source, end_ids: list[int], settings: SamplingSettings, batch_size: int):
        try:
            import vllm
        except ImportError:
            raise UserError('negatives.backend is vllm, which is not installed: pip install "lowdft[vllm]", or set '
                            "negatives.backend: padded") from None  # fmt: skip
        self.vllm, self.end_ids, self.settings = vllm, end_ids, settings
        self.engine = vllm.LLM(model=source.path, revision=source.revision, max_num_seqs=batch_size)

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Sampler`."""
        s = self.settings
        prompts = [{"prompt_token_ids": list(r.prompt_ids)} for r in requests]
        parameters = [
            self.vllm.SamplingParams(
                temperature=s.temperature, top_p=s.top_p, top_k=s.top_k or -1, max_tokens=s.max_new_tokens, seed=r.seed,
                stop_token_ids=self.end_ids,
            )
            for r in requests
        ]  # fmt: skip
        outputs = self.engine.generate(prompts, parameters)
        return [_finish(list(o.outputs[0].token_ids), self.end_ids) for o in outputs]
