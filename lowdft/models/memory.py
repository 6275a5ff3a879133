"""Estimates the memory of training from the model's configuration, without loading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from lowdft.config.sections import AdapterSection, ModelSection
from lowdft.config.training import DFTConfig
from lowdft.logprobs import Group
from lowdft.models.simulation import pass_memory, simulate_generation

OPTIMIZER_BYTES = {"8bit": 2, "adafactor": 0.1, "sgd": 0}  # per trainable weight; others keep two float32
GATHERED = 1e9  # weights that a GPU holds whole at once: the default of DeepSpeed's stage3_max_live_parameters
LIBRARIES = 0.1e9  # bytes that the first step's libraries add to a process on a CPU; measured


@dataclass(frozen=True)
class Memory:
    """Bytes by what takes them. `offloaded` bytes are kept in CPU memory when training on a GPU, and not included."""

    parts: dict[str, float]
    offloaded: float = 0.0

    @property
    def total(self) -> float:
        """Peak bytes."""
        return sum(self.parts.values())


def estimate(
    config: PreTrainedConfig,
    model: ModelSection,
    adapter: AdapterSection | None,
    args: DFTConfig,
    groups: Sequence[Group],
    on_gpu: bool = False,
    gpus: int = 1,
) -> Memory:
    """Peak memory of training whose largest pass is over `groups`.

    With several GPUs, ZeRO-3 shards the training of all parameters; with an adapter, each GPU has a full copy of the
    base.
    """
    is_sharded = gpus > 1 and adapter is None
    found = pass_memory(config, model, adapter, args, groups, on_gpu=on_gpu, lift=not is_sharded)
    optimizer = next((v for k, v in OPTIMIZER_BYTES.items() if k in getattr(args.optim, "value", args.optim)), 8)
    parts = {
        "weights": found.weights - (found.trained if adapter else 0),
        "adapter": found.trained if adapter else 0,
        "gradients": found.trained,
        "optimizer": found.trainable * optimizer,
        "a pass": found.peak,
    }
    if is_sharded:
        parts |= _sharded(parts, gpus, getattr(torch, model.dtype).itemsize)
    return Memory({k: v for k, v in parts.items() if v}, found.offloaded)


def _sharded(parts: dict[str, float], gpus: int, size: int) -> dict[str, float]:
    """The memory of each GPU under ZeRO-3: its part of weights, gradients, optimizer and of the float32 copy of
    half-precision weights, and the layers that are gathered while they run."""
    numbers = parts["weights"] / size
    mine = {name: parts[name] / gpus for name in ("weights", "gradients", "optimizer")}
    if size < 4:
        mine["float32 copy of the weights"] = 4 * numbers / gpus
    return mine | {"layers gathered whole": size * min(GATHERED, numbers * (1 - 1 / gpus))}


def scoring_memory(
    config: PreTrainedConfig,
    model: ModelSection,
    adapter: AdapterSection | None,
    args: DFTConfig,
    groups: Sequence[Group],
    on_gpu: bool = False,
) -> float:
    """Peak bytes, including weights, of a pass without gradient over `groups`, for the reference or an evaluation."""
    found = pass_memory(config, model, adapter, args, groups, backward=False, on_gpu=on_gpu)
    return found.weights + found.peak


def generation_memory(
    config: PreTrainedConfig, model: ModelSection, prompts: int, samples: int, prompt_tokens: int, new_tokens: int
) -> float:
    """Peak bytes, including weights, of generating `samples` answers at once to `prompts` prompts of similar length."""
    layers = config.get_text_config().num_hidden_layers
    sizes = (prompts, samples, prompt_tokens, new_tokens)
    if layers <= 3:
        return max(simulate_generation(config, model, layers, *sizes))
    two, three = (simulate_generation(config, model, n, *sizes) for n in (2, 3))
    return max(b + (layers - 3) * (b - a) for a, b in zip(two, three, strict=True))
