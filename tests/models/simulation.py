"""A training pass simulated without memory: tensors without values, and the bytes that live at every moment."""

from __future__ import annotations

import contextlib
import weakref
from types import SimpleNamespace

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from lowdft.logprobs import Group, bare, packed_attention, score
from lowdft.models.fused_lora import fused_lora

LLAMA = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
SHAPES = {
    "llama-8b": ("llama", dict(LLAMA, vocab_size=128256)),
    "mistral-7b": ("mistral", dict(LLAMA, vocab_size=32768, sliding_window=None)),
    "qwen2.5-0.5b": (
        "qwen2",
        dict(
            hidden_size=896,
            intermediate_size=4864,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
    ),
    "gemma-270m": (
        "gemma3_text",
        dict(
            hidden_size=640,
            intermediate_size=2048,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            vocab_size=262144,
            sliding_window=512,
            tie_word_embeddings=True,
        ),
    ),
}


class Bytes(TorchDispatchMode):
    """Bytes of the storages that operations make, rounded up to 512 as CUDA's allocator does: `now` and `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known:
                    size = -(-storage.nbytes() // 512) * 512
                    self.known.add(storage)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, size)
        return out


def config_of(name: str, layers: int):
    """The shape's configuration with so many layers."""
    family, settings = SHAPES[name]
    return AutoConfig.for_model(family, num_hidden_layers=layers, **settings)


class _Product(torch.autograd.Function):
    """bitsandbytes' 4-bit product of many rows on a GPU: the whole weight is dequantized, there and back."""

    @staticmethod
    def forward(ctx, x, rows, columns):
        ctx.shape = rows, columns
        return x @ x.new_empty(rows, columns).T

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.shape), None, None


@contextlib.contextmanager
def quantized(model: nn.Module):
    """The model's linear layers but the head as 4-bit ones without values."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            layer = bnb.nn.Linear4bit(2, 2, bias=False, compute_dtype=torch.bfloat16)
            layer.in_features, layer.out_features = module.in_features, module.out_features
            layer.bias = module.bias
            weight = nn.Parameter(torch.empty(module.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
            weight.compress_statistics, weight.quant_type = True, "nf4"
            weight.quant_state = SimpleNamespace(shape=module.weight.shape, dtype=torch.bfloat16)
            layer.weight = weight
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)
    model.is_loaded_in_4bit = True

    def product(x, weight, quant_state=None, bias=None):
        out = _Product.apply(x, *quant_state.shape)
        return out if bias is None else out + bias

    with contextlib.ExitStack() as stack:
        from unittest.mock import patch

        stack.enter_context(patch("bitsandbytes.matmul_4bit", product))
        stack.enter_context(
            patch("bitsandbytes.functional.dequantize_4bit", lambda w, s: torch.empty(s.shape, dtype=s.dtype))
        )
        yield


def simulate(name: str, load_in_4bit: bool, checkpointing: bool, groups: list[Group], layers: int = 4) -> float:
    """Peak bytes of a pass and its gradients, without weights: LoRA r16 on all linear layers of a bfloat16 base."""
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        model = AutoModelForCausalLM.from_config(config_of(name, layers), dtype=torch.bfloat16)
        if load_in_4bit:
            stack.enter_context(quantized(model))
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        for context in (packed_attention(bare(model)), fused_lora(model), disable_input_dtype_casting(model)):
            stack.enter_context(context)
        with Bytes() as counted:
            score(model, groups).logps_C.sum().backward()
        return counted.peak
