"""Sampling by transformers' `generate` on left-padded batches."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowdft.compat import takes_other_attention
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

WORTH_SHARING = 16  # tokens; another forward pass for fewer is no faster


class PaddedSampler:
    """transformers' `generate` on left-padded batches of prompts of similar length.

    A prompt with several samples in a batch is computed once, and its keys and values are copied. The tokens that all
    prompts of a batch begin with, such as a system message, are computed once for the batch. If memory runs out,
    batches get half as many samples.
    """

    def __init__(self, model, end_ids: list[int], settings: SamplingSettings, batch_size: int | None, tokenizer=None):
        self.model, self.end_ids, self.settings, self.batch_size = model, end_ids, settings, batch_size
        self.tokenizer = tokenizer

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
        rows = {tuple(request.prompt_ids): None for request in batch}
        rows = {prompt: row for row, prompt in enumerate(rows)}
        row_R = torch.tensor([rows[tuple(request.prompt_ids)] for request in batch], device=model.device)
        shared = _shared(model, list(rows))
        ids_UP, mask_UP = (x.to(model.device) for x in _pad(list(rows), shared, self.end_ids[0]))
        width = ids_UP.shape[1]
        cache = _prefilled(model, ids_UP, mask_UP, row_R, shared) if shared or len(rows) < len(batch) else None
        u_RT = torch.stack([uniforms(request.seed, self.settings.max_new_tokens) for request in batch])
        written = model.generate(
            input_ids=ids_UP[row_R],
            attention_mask=mask_UP[row_R],
            generation_config=model.generation_config,
            logits_processor=LogitsProcessorList([_PaddedDraw(u_RT.to(model.device), width, self.settings)]),
            stopping_criteria=[_StopTexts(self.tokenizer, self.settings.stop, width)] if self.settings.stop else [],
            **({} if cache is None else {"past_key_values": cache}),
        )
        rows = [[*row, self.end_ids[0]] for row in written[:, width:].tolist()]  # the last one to reach a stop text
        return [finish(row[: self.settings.max_new_tokens], self.end_ids) for row in rows]


def _new_cache(model) -> DynamicCache | None:
    """An empty cache; None for models with another kind (recurrent states)."""
    if model._is_stateful or not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return cache if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers) else None


def _shared(model, prompts: list[tuple[int, ...]]) -> int:
    """How many first tokens of all prompts are computed once; 0 if few are equal.

    Padding then follows these tokens, which is right where positions come from the mask: in full attention, and without
    ALiBi.
    """
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 2)
    if len(prompts) == 1 or shared < WORTH_SHARING or not takes_other_attention(model):
        return 0
    cache = _new_cache(model)
    return shared if cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers) else 0


def _pad(prompts: list[tuple[int, ...]], shared: int, filler: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask [U, P]: the `shared` first tokens, padding, the rest."""
    width = max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    ids = [[*p[:shared], *[filler] * gap, *p[shared:]] for p, gap in zip(prompts, gaps, strict=True)]
    mask = [[1] * shared + [0] * gap + [1] * (width - shared - gap) for gap in gaps]
    return torch.tensor(ids), torch.tensor(mask)


def _prefilled(model, ids_UP: Tensor, mask_UP: Tensor, row_R: Tensor, shared: int) -> DynamicCache | None:
    """Keys and values of all prompt tokens except the last, for rows `row_R`; the `shared` first ones computed once.

    None for models with another kind of cache, and for prompts of one token.
    """
    cache = _new_cache(model)
    if cache is None or ids_UP.shape[1] == 1:
        return None
    one_token = copy.copy(model.generation_config)
    one_token.max_new_tokens = 1  # to be thrown away
    for rows, end in [(1, shared)] * bool(shared) + [(len(ids_UP), -1)]:
        if cache.get_seq_length():
            cache.batch_repeat_interleave(rows)
        model.generate(
            input_ids=ids_UP[:rows, :end],
            attention_mask=mask_UP[:rows, :end],
            generation_config=one_token,
            past_key_values=cache,
        )
    cache.batch_select_indices(row_R)
    return cache


class _StopTexts(StoppingCriteria):
    """Samples that contain a stop text are done."""

    def __init__(self, tokenizer, stop: Sequence[str], width: int):
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        return torch.tensor([any(one in text for one in self.stop) for text in texts], device=input_ids.device)


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
