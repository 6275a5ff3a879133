"""Sampling by transformers' `generate` on left-padded batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowdft.errors import InvalidRequests, is_out_of_memory
from lowdft.sampling.draw import (
    Request,
    Sample,
    SamplingSettings,
    draw,
    fewer,
    finish,
    fitting,
    generating,
    only,
    uniforms,
)


class PaddedSampler:
    """transformers' `generate` on left-padded batches of prompts of similar length.

    A prompt with several samples in a batch is computed once, and its keys and values are copied. If memory runs out,
    batches get half as many samples.
    """

    def __init__(self, model, end_ids: list[int], settings: SamplingSettings, batch_size: int | None):
        self.model, self.end_ids, self.settings, self.batch_size = model, end_ids, settings, batch_size

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Sampler`."""
        waiting = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), requests[i].prompt_ids))
        samples: dict[int, Sample] = {}
        with generating(self.model, self.end_ids, self.settings) as model:
            batch_size = self.batch_size or (fitting(model, requests, self.settings) if requests else 0)
            while waiting:
                batch = waiting[:batch_size]
                try:
                    samples |= zip(batch, self._sample_batch(model, [requests[i] for i in batch]), strict=True)
                    waiting = waiting[batch_size:]
                except InvalidRequests as error:
                    raise InvalidRequests(str(error), [batch[i] for i in error.numbers]) from error
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    batch_size = self.batch_size = fewer(len(batch), error)
        return [samples[i] for i in range(len(requests))]

    def _sample_batch(self, model, batch: list[Request]) -> list[Sample]:
        width = max(len(request.prompt_ids) for request in batch)
        rows = {tuple(request.prompt_ids): None for request in batch}
        rows = {prompt: row for row, prompt in enumerate(rows)}
        ids_UP = torch.tensor([[self.end_ids[0]] * (width - len(p)) + list(p) for p in rows], device=model.device)
        mask_UP = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows], device=model.device)
        row_R = torch.tensor([rows[tuple(request.prompt_ids)] for request in batch], device=model.device)
        u_RT = torch.stack([uniforms(request.seed, self.settings.max_new_tokens) for request in batch])
        cache = _prefilled(model, ids_UP, mask_UP, row_R) if len(rows) < len(batch) else None
        written = model.generate(
            input_ids=ids_UP[row_R],
            attention_mask=mask_UP[row_R],
            generation_config=model.generation_config,
            logits_processor=LogitsProcessorList([_PaddedDraw(u_RT.to(model.device), width, self.settings)]),
            **({} if cache is None else {"past_key_values": cache}),
        )
        return [finish(row, self.end_ids) for row in written[:, width:].tolist()]


def _prefilled(model, ids_UP: Tensor, mask_UP: Tensor, row_R: Tensor) -> DynamicCache | None:
    """Keys and values of all prompt tokens except the last, computed once per prompt, for rows `row_R`.

    None for models with another kind of cache (recurrent states), and for prompts of one token.
    """
    if ids_UP.shape[1] == 1 or model._is_stateful or not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    one_token = copy.copy(model.generation_config)
    one_token.max_new_tokens = 1  # to be thrown away
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    model.generate(
        input_ids=ids_UP[:, :-1],
        attention_mask=mask_UP[:, :-1],
        generation_config=one_token,
        past_key_values=cache,
    )
    cache.batch_select_indices(row_R)
    return cache


class _PaddedDraw(LogitsProcessor):
    def __init__(self, u_RT: Tensor, width: int, settings: SamplingSettings):
        self.u_RT, self.width, self.settings = u_RT, width, settings

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not (finite_R := scores.amax(1).isfinite()).all():  # NaN is the largest of all
            raise InvalidRequests(
                "the model's logits are not finite: its weights contain NaN or infinity, or its dtype overflows. Check "
                "the weights (and the adapter), or set model.dtype=bfloat16 or float32.",
                (~finite_R).nonzero()[:, 0].tolist(),
            )
        return only(draw(scores, self.u_RT[:, input_ids.shape[1] - self.width], self.settings), scores)
