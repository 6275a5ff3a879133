"""What the sections share: the model of random weights, groups of random ids, clocks."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from unittest import mock

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowdft.logprobs import Group, varlen
from lowdft.models.base import set_up_cuda
from lowdft.training.token_budget import Passes


class Skip(Exception):
    """A section's question has no answer on this device."""


class Setting:
    """The device, the sizes, and a 4-bit model under LoRA that is made once."""

    def __init__(self, device: torch.device, tiny: bool):
        set_up_cuda()
        self.device, self.tiny = device, tiny
        on_gpu = device.type == "cuda"
        self.name = torch.cuda.get_device_name() if on_gpu else f"CPU with {torch.get_num_threads()} threads"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        self.tokens = (64, 128) if tiny else (1472, 2944, 5888, 7360)
        self.rate = None  # products per second, from the first section
        self._model = None

    def config(self, layers: int | None = None) -> LlamaConfig:
        """Mistral-7B's shape, or a tiny one."""
        sizes = dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)  # fmt: skip
        if self.tiny:
            sizes |= dict(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)  # fmt: skip
        config = LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        config.num_hidden_layers = layers or config.num_hidden_layers
        return config

    def base(self, layers: int | None = None) -> LlamaForCausalLM:
        """A base of random weights in NF4, quantized layer by layer."""
        with torch.device("meta"):
            model = LlamaForCausalLM(self.config(layers)).to(self.dtype)
        torch.manual_seed(0)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not model.lm_head:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, self._linear(module))
        for module in model.modules():
            for key, tensor in module._parameters.items():
                if tensor is not None and tensor.is_meta:
                    data = torch.randn(tensor.shape, dtype=self.dtype, device=self.device) * 0.02
                    module._parameters[key] = nn.Parameter(data + (tensor.dim() == 1), requires_grad=False)
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(self.device)
        model.is_loaded_in_4bit = True
        return model.requires_grad_(False)

    def _linear(self, like: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            like.in_features, like.out_features, bias=False, compute_dtype=self.dtype, quant_type="nf4", device="meta"
        )
        data = torch.randn(like.weight.shape, dtype=self.dtype, device=self.device) * 0.02
        weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        layer.weight = weight.to(self.device)
        layer.support_avx512bf16_for_cpu = False
        return layer

    def policy(self):
        """The base under LoRA r16 whose B is not zero, in training mode."""
        if self._model is None:
            config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            self._model = get_peft_model(self.base(), config)
            for name, parameter in self._model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.01)
        self._model.zero_grad(set_to_none=True)
        return self._model.train()

    def forget(self) -> None:
        """Frees what a section left behind; the policy stays."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def groups(self, tokens: int, seed: int = 0) -> list[Group]:
        """Prompts with two negatives and a completion, `tokens` in all; a group has 1472, or 64 if tiny."""
        rng, size = random.Random(seed), 64 if self.tiny else 1472
        prompt, answer = size // 4, size // 4

        def ids(n: int) -> list[int]:
            return [rng.randrange(3, self.config().vocab_size) for _ in range(n)]

        return [Group(ids(prompt), [ids(answer) for _ in range(3)]) for _ in range(max(1, tokens // size))]

    def passes(self, tokens: int = 10**6, chunk: int | None = None) -> Passes:
        """Packed passes."""
        return Passes("packed", chunk, tokens, device=self.device)

    def gradient(self, model, passes: Passes, groups: list[Group]):
        """A gradient as one vector on the CPU, of a loss in which completions pull against one another."""
        model.zero_grad(set_to_none=True)
        loss = lambda numbers, logps: -nn.functional.logsigmoid(0.01 * (logps[:, -1:] - logps[:, :-1])).sum()  # noqa: E731
        passes.backpropagate(model, groups, loss, lambda share, last: share.backward())
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.cat([p.grad.flatten().float().cpu() for p in trained])

    def seconds(self, work, times: int = 3) -> list[float]:
        """Seconds of every call of `work`."""
        found = []
        for _ in range(times):
            start = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        return found


def require_cuda(setting: Setting, question: str) -> None:
    """Skips a section on a CPU."""
    if setting.device.type != "cuda":
        raise Skip(f"{question} is a question for a GPU")


def sdpa_alone() -> contextlib.AbstractContextManager:
    """While this lasts attention is SDPA's by batches of like length, also where `varlen_attn` runs."""
    return mock.patch.object(varlen, "varlen_is_right", lambda *_: False)
