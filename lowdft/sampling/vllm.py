"""Sampling by vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from lowdft.errors import UserError
from lowdft.sampling.draw import Request, Sample, SamplingSettings


class VllmSampler:
    """vLLM, offline. Its samples follow its own random numbers, seeded a request, and its own arithmetic: they
    differ from those of the other backends. Not run in this project's tests."""

    def __init__(self, source, end_ids: list[int], settings: SamplingSettings, batch_size: int | None):
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                'negatives.backend is vllm, which is not installed: pip install "lowdft[vllm]", '
                "or set negatives.backend=padded"
            ) from error
        self.vllm, self.end_ids, self.settings = vllm, end_ids, settings
        self.engine = vllm.LLM(model=source.path, revision=source.revision, max_num_seqs=batch_size or 256)

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
