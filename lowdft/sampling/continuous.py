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

from lowdft.errors import UserError
from lowdft.sampling.draw import Request, Sample, SamplingSettings, draw, finish, generating, only, uniforms


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
        with generating(self.model, self.end_ids, self.settings) as model:
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
                    samples[int(output.request_id)] = finish(output.generated_tokens, self.end_ids)
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
        return only(draw(scores, u_R, self.settings), scores)
