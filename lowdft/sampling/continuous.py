"""Sampling by transformers' continuous batching."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.utils import is_flash_attn_2_available

from lowdft.compat import takes_other_attention
from lowdft.errors import UserError, is_out_of_memory
from lowdft.sampling.draw import (
    Request,
    Sample,
    SamplingSettings,
    cache_bytes,
    draw,
    fewer,
    finish,
    fitting,
    generating,
    only,
    uniforms,
)


class ContinuousSampler:
    """transformers' continuous batching: when a sample ends, the next one starts at once.

    The cache has room for `batch_size` samples (fewer if there are fewer requests) of the longest prompt and
    `max_new_tokens` each. On a GPU it takes at most half of the free memory, and other requests wait. A forward pass
    has up to 512 tokens, or one per sample if `batch_size` is larger. During a run, eager attention is paged. On a GPU
    flash attention is used if it is installed. If memory runs out, the rest runs with half as many samples.
    """

    def __init__(self, model, end_ids: list[int], settings: SamplingSettings, batch_size: int | None):
        self.model, self.end_ids, self.settings, self.batch_size = model, end_ids, settings, batch_size

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Sampler`.

        Raises:
            UserError: transformers cannot batch this model continuously, or memory does not hold one request.
        """
        if not requests:
            return []
        samples: dict[int, Sample] = {}
        with generating(self.model, self.end_ids, self.settings) as model:
            if not takes_other_attention(model):
                raise UserError(
                    f"negatives.backend is continuous, which writes wrong tokens for {model.config.model_type}: its "
                    "attention is its own code (for example for ALiBi), which transformers cannot replace by a paged "
                    "one. Set negatives.backend=padded."
                )
            attention = model.config._attn_implementation
            batch_size = self.batch_size or fitting(model, requests, self.settings)
            while len(samples) < len(requests):
                try:
                    self._run(model, requests, batch_size, samples)
                except (ValueError, MemoryError, RuntimeError) as error:
                    if is_out_of_memory(error) and batch_size > 1:
                        batch_size = self.batch_size = fewer(min(batch_size, len(requests) - len(samples)), error)
                        continue
                    raise UserError(
                        f"continuous batching failed ({error}). A smaller negatives.batch_size takes less memory; "
                        "negatives.backend=padded works for every model."
                    ) from error
                finally:
                    if model.config._attn_implementation != attention:
                        model.set_attn_implementation(attention)
        return [samples[number] for number in range(len(requests))]

    def _run(self, model, requests: Sequence[Request], batch_size: int, samples: dict[int, Sample]) -> None:
        """Adds the missing samples to `samples`, by number of the request; longest prompts first."""
        left = [number for number in range(len(requests)) if number not in samples]
        left.sort(key=lambda number: -len(requests[number].prompt_ids))
        config = self._cache(model, [requests[number] for number in left], batch_size)
        manager = model.init_continuous_batching(model.generation_config, config)
        drawing = LogitsProcessorList([_ContinuousDraw(requests, self.settings)])
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(drawing)
        manager.logit_processor.tensors_required = 1
        try:
            manager.warmup()
            manager.start()
            for number in left:
                manager.add_request(list(requests[number].prompt_ids), str(number))
            while len(samples) < len(requests):
                output = manager.get_result(timeout=1)
                if output is None and not manager.is_running():
                    raise RuntimeError("its thread ended before its work")
                if output is not None and output.error:
                    raise RuntimeError(output.error)
                if output is not None:
                    samples[int(output.request_id)] = finish(output.generated_tokens, self.end_ids)
        finally:
            manager.stop(hard_stop=True)  # after an error or Ctrl-C, nobody waits for the requests that are left

    def _cache(self, model, requests: Sequence[Request], batch_size: int) -> ContinuousBatchingConfig:
        on_gpu = model.device.type == "cuda"
        flash = "flash" in model.config._attn_implementation or (on_gpu and is_flash_attn_2_available())
        page = 256 if flash else 32  # flash-attn reads pages of 256 tokens
        longest = max(len(request.prompt_ids) for request in requests) + self.settings.max_new_tokens
        at_once, pages = min(batch_size, len(requests)), math.ceil(longest / page) + 1
        blocks = at_once * pages
        if on_gpu:
            torch.cuda.empty_cache()
            blocks = min(
                blocks,
                torch.cuda.mem_get_info(model.device)[0]
                // 2
                // (page * cache_bytes(model.config, model.dtype.itemsize)),
            )
        if blocks < pages:
            raise MemoryError(f"a request of {longest} tokens takes {pages} blocks of the cache, and {blocks} fit")
        return ContinuousBatchingConfig(
            page_size=page,
            num_blocks=blocks,
            max_batch_tokens=max(512, at_once),
            max_requests_per_batch=at_once,
            auto_switch_to_flash=flash,
        )


class _ContinuousDraw(ContinuousBatchingLogitsProcessor):
    """Passes every request's uniform number (float32) through the library's int32 tensor; its id is its index."""

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
            # Tokens in the cache. generated_tokens lag in asynchronous batches and restart after an eviction.
            step = state.position_offset - self.prompt_lengths[row]
            rows.append(row)
            steps.append(min(max(step, 0), self.settings.max_new_tokens - 1))
        return self.u_RT[rows, steps].view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        u_R = tensor_arg[: scores.shape[0]].view(torch.float32)
        return only(draw(scores, u_R, self.settings), scores)
