"""Sampling by transformers' `generate` on left-padded batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lowdft.sampling.draw import Request, Sample, SamplingSettings, draw, finish, generating, only, uniforms


class PaddedSampler:
    """transformers' `generate` on left-padded batches of prompts of like length."""

    def __init__(self, model, end_ids: list[int], settings: SamplingSettings, batch_size: int):
        self.model, self.end_ids, self.settings, self.batch_size = model, end_ids, settings, batch_size

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """See `Sampler`."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        samples: dict[int, Sample] = {}
        with generating(self.model, self.end_ids, self.settings) as model:
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
        return [finish(row, self.end_ids) for row in written[:, width:].tolist()]


class _PaddedDraw(LogitsProcessor):
    def __init__(self, u_RT: Tensor, width: int, settings: SamplingSettings):
        self.u_RT, self.width, self.settings = u_RT, width, settings

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return only(draw(scores, self.u_RT[:, input_ids.shape[1] - self.width], self.settings), scores)
