"""The part of vLLM's interface that lowdft uses. What it was called with is written into its answers or a file.

Token ids of an answer: what the prompt ends with, the seed's last digit, and whether there is an adapter.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 16
    stop_token_ids: list = field(default_factory=list)
    stop: list = field(default_factory=list)
    seed: int | None = None


@dataclass
class CompletionOutput:
    token_ids: tuple
    finish_reason: str


@dataclass
class RequestOutput:
    outputs: list


class LLM:
    def __init__(self, model: str, **arguments):
        if arguments["gpu_memory_utilization"] > 0.95:
            raise ValueError("Free memory on device is less than desired\nmore lines")
        with open(os.environ["FAKE_VLLM_LOG"], "a") as file:
            file.write(json.dumps({"pid": os.getpid(), "model": model, **arguments}) + "\n")

    def generate(self, prompts, sampling_params, lora_request=None, use_tqdm=True):
        if any(13 in prompt["prompt_token_ids"] for prompt in prompts):
            os._exit(9)  # as when the system kills it
        out = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            ids = (prompt["prompt_token_ids"][-1], params.seed % 10, int(lora_request is not None), params.top_k)
            out.append(RequestOutput([CompletionOutput(ids, "length" if params.seed % 2 else "stop")]))
        return out
