"""How much memory a training needs, from the model's configuration alone: no weights are loaded.

What a layer keeps for the backward pass is not a formula but counted, on one and on two layers of the model's own code
with empty weights; everything else follows from shapes.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lowdft.config.sections import AdapterSection, ModelSection
from lowdft.config.training import DFTConfig
from lowdft.logprobs import Group, score
from lowdft.models.adapters import adapter_config

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight: 4 bits, an 8-bit scale for 64, a float32 scale for 256 of those
OPTIMIZER_BYTES = {"8bit": 2, "adafactor": 0.1, "sgd": 0}  # a trainable weight; others keep two float32
PROBE_TOKENS = 256
OVERHEAD = 1.15  # of an allocator over what a pass asks for; measured on a CPU, peaks at 1024 to 4096 tokens a pass
GATHERED = 1e9  # weights that a GPU holds whole at once: the default of DeepSpeed's stage3_max_live_parameters
LIBRARIES = 0.1e9  # bytes that the first step's libraries add to a process on a CPU; measured


@dataclass(frozen=True)
class Memory:
    """Bytes by what takes them. `per_token` is that of one more token in a pass, `fixed` all that does not grow.

    `offloaded` are bytes that a GPU's training keeps in CPU memory; no part of the others.
    """

    parts: dict[str, float]
    per_token: float
    offloaded: float = 0.0

    @property
    def total(self) -> float:
        """Peak bytes."""
        return sum(self.parts.values())

    @property
    def fixed(self) -> float:
        """Bytes that no number of tokens changes."""
        return sum(value for name, value in self.parts.items() if not name.startswith("a pass"))


def estimate(
    config: PreTrainedConfig,
    model: ModelSection,
    adapter: AdapterSection | None,
    args: DFTConfig,
    tokens: int,
    on_gpu: bool = False,
) -> Memory:
    """Memory of training with passes of `tokens` tokens; on a CPU `offload_checkpoints` moves nothing."""
    text = config.get_text_config()
    dtype = getattr(torch, model.dtype)
    size = dtype.itemsize
    one, two = (_skeleton(config, n, dtype, adapter) for n in (1, 2))
    layers = text.num_hidden_layers
    linear, other, trainable = (
        _over_layers(one, two, layers, count) for count in (_linear_weights, _other_weights, _trainable_weights)
    )
    kept_one, kept_two = (_kept_bytes(m) / PROBE_TOKENS for m in (one, two))
    layer, rest = kept_two - kept_one, max(0.0, 2 * kept_one - kept_two)
    checkpoints = layers * text.hidden_size * size + rest
    offloaded = checkpoints if args.offload_checkpoints and on_gpu else 0.0
    per_token = checkpoints - offloaded + layer if args.gradient_checkpointing else layers * layer + rest
    largest = max(m.weight.numel() for m in one.modules() if type(m) is nn.Linear and m is not _head(one))
    working = 6 * max(text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size) * size
    optimizer = next((v for k, v in OPTIMIZER_BYTES.items() if k in getattr(args.optim, "value", args.optim)), 8)
    parts = {
        "weights": linear * (NF4_BYTES if model.load_in_4bit else size) + other * size,
        "adapter" if adapter else "trainable copy": trainable * 4 if adapter else 0,
        "gradients": trainable * (4 if adapter else size),
        "optimizer": trainable * optimizer,
        "dequantized weight": 2 * largest * size if model.load_in_4bit else 0,
        "logits of a chunk": args.logits_chunk_size * text.vocab_size * (8 + 2 * size),
        "a pass: kept for backward": OVERHEAD * per_token * tokens,
        "a pass: at work": OVERHEAD * working * tokens,
    }
    return Memory({k: v for k, v in parts.items() if v}, OVERHEAD * (per_token + working), offloaded * tokens)


def sharded(memory: Memory, gpus: int, dtype: str) -> Memory:
    """What each of `gpus` GPUs takes when all parameters are trained under ZeRO-3.

    It has its part of weights, gradients and optimizer and of a float32 copy of half-precision weights, and gathers
    the layers at work whole.
    """
    size = getattr(torch, dtype).itemsize
    weights = memory.parts["weights"] / size
    parts = {n: v / gpus if n in ("weights", "gradients", "optimizer") else v for n, v in memory.parts.items()}
    if size < 4:
        parts["float32 copy of the weights"] = 4 * weights / gpus
    parts["layers gathered whole"] = size * min(GATHERED, weights * (1 - 1 / gpus))
    return dataclasses.replace(memory, parts=parts)


def _over_layers(one: nn.Module, two: nn.Module, layers: int, count) -> float:
    """A count over the whole model, from its skeletons of one and two layers."""
    first, second = count(one), count(two)
    return first + (layers - 1) * (second - first)


def _skeleton(config: PreTrainedConfig, layers: int, dtype: torch.dtype, adapter: AdapterSection | None) -> nn.Module:
    """The model's own code with `layers` layers and weights that were never filled."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    if adapter is None:
        return model
    return get_peft_model(model, adapter_config(adapter))


def _head(model: nn.Module) -> nn.Module:
    return model.get_output_embeddings()


def _linear_weights(model: nn.Module) -> int:
    """Weights that 4-bit loading quantizes: of linear layers but the head and the adapter."""
    return sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if type(m) is nn.Linear and m is not _head(model) and "lora_" not in name
    )


def _other_weights(model: nn.Module) -> int:
    own = {id(p): p.numel() for name, p in model.named_parameters() if "lora_" not in name}
    return sum(own.values()) - _linear_weights(model)


def _trainable_weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _kept_bytes(model: nn.Module) -> float:
    """Bytes that autograd keeps for one pass of PROBE_TOKENS tokens, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = PROBE_TOKENS // 2
    groups = [Group([0] * half, [[0] * half])]
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = score(model, groups, chunk_size=PROBE_TOKENS)
    del out
    return float(sum(kept.values()))
