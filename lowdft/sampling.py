"""Samples from a causal language model, each from its own seed: padded batches, continuous batching or vLLM.

With the transformers backends, token t of a sample is the inverse-CDF draw with the t-th uniform number of its seed.
A sample depends on the model, its prompt, the settings and its seed alone, not on its neighbours in a batch or on the
order of requests, up to floating-point noise between batches: none to be seen in float32, but in bfloat16 it moves
draws (SmolLM2-135M: 21 of 64 samples differ between batches of 32 and of 64). Whoever wants the very same samples after
an interruption keeps the composition of batches, as `generate` does.

Dimension suffixes: R requests, V vocabulary, T new tokens, P prompt tokens, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from lowdft.errors import UserError
from lowdft.logps import truncate


@dataclass(frozen=True)
class SamplingSettings:
    """Temperature (0: greedy), then top-k (0: off), then top-p (1: off); at most `max_new_tokens` tokens a sample."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 320


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
        """One sample a request, in the order of the requests."""
        ...


def get_sampler(
    backend: str, model, end_ids: Sequence[int], settings: SamplingSettings, batch_size: int
) -> Sampler:  # fmt: skip
    """The sampler of a backend.

    Args:
        backend: "padded" or "continuous" (transformers), or "vllm".
        model: a transformers model, under an adapter or not, left as it was found; for vllm a `lowdft.model.Source`.
        end_ids: every token that ends an answer, one or more.
        batch_size: samples at work at once.

    Raises:
        UserError: vLLM is asked for and not installed.
    """
    samplers = {"padded": PaddedSampler, "continuous": ContinuousSampler, "vllm": VllmSampler}
    return samplers[backend](model, list(end_ids), settings, batch_size)


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


class PaddedSampler:
    """transformers' `generate` on left-padded batches of prompts of like length."""

    def __init__(self, model, end_ids: list[int], settings: SamplingSettings, batch_size: int):
        self.model, self.end_ids, self.settings, self.batch_size = model, end_ids, settings, batch_size

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Sampler`."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        samples: dict[int, Sample] = {}
        with _generating(self.model, self.end_ids, self.settings) as model:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                samples |= zip(batch, self._sample_batch(model, [requests[i] for i in batch]), strict=True)
        return [samples[i] for i in range(len(requests))]

    def _sample_batch(self, model, batch: list[Request]) -> list[Sample]:
        width = max(len(request.prompt_ids) for request in batch)
        pads = [width - len(request.prompt_ids) for request in batch]
        ids = [[self.end_ids[0]] * pad + list(request.prompt_ids) for pad, request in zip(pads, batch, strict=True)]
        u_RT = torch.stack([uniforms(request.seed, self.settings.max_new_tokens) for request in batch])
        written = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=model.device),
            generation_config=model.generation_config,
            logits_processor=LogitsProcessorList([_PaddedDraw(u_RT.to(model.device), width, self.settings)]),
        )
        return [_finish(row, self.end_ids) for row in written[:, width:].tolist()]


class ContinuousSampler:
    """transformers' continuous batching: a sample that ends makes room for the next at once.

    The cache has room for `batch_size` samples (fewer if there are fewer requests) of the longest prompt and
    `max_new_tokens` each, and on a GPU takes at most half of the free memory: what does not fit waits. A forward pass
    takes up to 512 tokens, or one a sample if `batch_size` is larger. Eager attention is paged for the time of a run.
    """

    def __init__(self, model, end_ids: list[int], settings: SamplingSettings, batch_size: int):
        self.model, self.end_ids, self.settings, self.batch_size = model, end_ids, settings, batch_size

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Sampler`.

        Raises:
            UserError: transformers cannot batch this model continuously, or memory does not hold one request.
        """
        if not requests:
            return []
        with _generating(self.model, self.end_ids, self.settings) as model:
            attention = model.config._attn_implementation
            try:
                return self._run(model, requests)
            except (ValueError, MemoryError, RuntimeError) as error:
                raise UserError(
                    f"continuous batching failed ({error}). A smaller negatives.batch_size takes less memory; "
                    "negatives.backend=padded works for every model."
                ) from error
            finally:
                if model.config._attn_implementation != attention:
                    model.set_attn_implementation(attention)

    def _run(self, model, requests: Sequence[Request]) -> list[Sample]:
        manager = model.init_continuous_batching(model.generation_config, self._cache(model, requests))
        drawing = LogitsProcessorList([_ContinuousDraw(requests, self.settings)])
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(drawing)
        manager.logit_processor.tensors_required = 1
        samples: dict[int, Sample] = {}
        try:
            manager.warmup()
            manager.start()
            for number, request in enumerate(requests):
                manager.add_request(list(request.prompt_ids), str(number))
            while len(samples) < len(requests):
                output = manager.get_result(timeout=1)
                if output is None and not manager.is_running():
                    raise RuntimeError("its thread ended before its work")
                if output is not None and output.error:
                    raise RuntimeError(output.error)
                if output is not None:
                    samples[int(output.request_id)] = _finish(output.generated_tokens, self.end_ids)
        finally:
            manager.stop(hard_stop=True)  # after an error or Ctrl-C there are requests left, which no one waits for
        return [samples[number] for number in range(len(requests))]

    def _cache(self, model, requests: Sequence[Request]) -> ContinuousBatchingConfig:
        config = model.config.get_text_config()
        page = 256 if "flash" in config._attn_implementation else 32  # flash-attn reads pages of 256 tokens
        longest = max(len(request.prompt_ids) for request in requests) + self.settings.max_new_tokens
        at_once, pages = min(self.batch_size, len(requests)), math.ceil(longest / page) + 1
        blocks = at_once * pages
        if model.device.type == "cuda":
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            block_bytes = page * config.num_hidden_layers * 2 * heads * head_dim * model.dtype.itemsize
            torch.cuda.empty_cache()
            blocks = min(blocks, torch.cuda.mem_get_info(model.device)[0] // 2 // block_bytes)
        if blocks < pages:
            raise MemoryError(f"a request of {longest} tokens takes {pages} blocks of the cache, and {blocks} fit")
        return ContinuousBatchingConfig(
            page_size=page,
            num_blocks=blocks,
            max_batch_tokens=max(512, at_once),
            max_requests_per_batch=at_once,
            auto_switch_to_flash=False,
        )


class VllmSampler:
    """vLLM, offline. Its samples follow its own random numbers, seeded a request, and its own arithmetic: they
    differ from those of the other backends. Not run in this project's tests."""

    def __init__(self, source, end_ids: list[int], settings: SamplingSettings, batch_size: int):
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                'negatives.backend is vllm, which is not installed: pip install "lowdft[vllm]", '
                "or set negatives.backend=padded"
            ) from error
        self.vllm, self.end_ids, self.settings = vllm, end_ids, settings
        self.engine = vllm.LLM(model=source.path, revision=source.revision, max_num_seqs=batch_size)

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Sampler`."""
        common = {
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "top_k": self.settings.top_k or -1,
            "max_tokens": self.settings.max_new_tokens,
            "stop_token_ids": self.end_ids,
        }
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        params = [self.vllm.SamplingParams(seed=request.seed, **common) for request in requests]
        outputs = [result.outputs[0] for result in self.engine.generate(prompts, params)] if prompts else []
        # Its own word for why: it also stops at the end tokens of the model's generation settings.
        return [Sample(list(output.token_ids), output.finish_reason) for output in outputs]


class _PaddedDraw(LogitsProcessor):
    def __init__(self, u_RT: Tensor, width: int, settings: SamplingSettings):
        self.u_RT, self.width, self.settings = u_RT, width, settings

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _only(draw(scores, self.u_RT[:, input_ids.shape[1] - self.width], self.settings), scores)


class _ContinuousDraw(ContinuousBatchingLogitsProcessor):
    """Hands every request its uniform number (float32 in the library's int32 tensor); a request's id is its number."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, requests: Sequence[Request], settings: SamplingSettings):
        self.u_RT = torch.stack([uniforms(request.seed, settings.max_new_tokens) for request in requests])
        self.prompt_lengths, self.settings = [len(request.prompt_ids) for request in requests], settings

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token) -> Tensor:
        rows, steps = [], []
        for state in (request.state for request in requests_with_new_token):
            row = int(state.request_id) if state.request_id.isdigit() else 0  # not a number: a warm-up request
            # Tokens in the cache, not generated_tokens: those lag in asynchronous batches, restart after an eviction.
            step = state.position_offset - self.prompt_lengths[row]
            rows.append(row)
            steps.append(min(max(step, 0), self.settings.max_new_tokens - 1))
        return self.u_RT[rows, steps].view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        u_R = tensor_arg[: scores.shape[0]].view(torch.float32)
        return _only(draw(scores, u_R, self.settings), scores)


def _only(ids_R: Tensor, scores_RV: Tensor) -> Tensor:
    """Scores under which the greedy choice is `ids_R`."""
    return torch.full_like(scores_RV, float("-inf")).scatter_(1, ids_R[:, None], 0.0)


def _finish(ids: list[int], end_ids: list[int]) -> Sample:
    end = next((i for i, token in enumerate(ids) if token in end_ids), None)
    return Sample(ids, "length") if end is None else Sample(ids[: end + 1], "stop")


@contextmanager
def _generating(model, end_ids: list[int], settings: SamplingSettings) -> Iterator:
    """The model without its peft wrapper (adapter layers stay), in eval mode and with generation settings of ours:
    transformers fills up what `generate` is given with the model's own, such as a repetition penalty."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, own = [module for module in model.modules() if module.training], plain.generation_config
    plain.generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=end_ids,
        pad_token_id=end_ids[0],
    )
    model.eval()
    try:
        with torch.no_grad():
            yield plain
    finally:
        plain.generation_config = own
        for module in training:
            module.training = True
