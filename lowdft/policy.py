"""What training starts from: the base under a fresh adapter or a copy of the reference's; all of it, or half."""

from __future__ import annotations

import random

from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from lowdft.config import DFTConfig
from lowdft.reference import start_from_adapter


def make_policy(model: nn.Module | str, args: DFTConfig, peft_config=None) -> nn.Module:
    """The model to train: loaded where it is a name, under a fresh adapter or a copy of the reference's."""
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if args.reference_adapter:
        model = start_from_adapter(model, args.reference_adapter)
    if peft_config is not None:
        set_seed(args.seed)
        model = get_peft_model(model, peft_config)
    if args.freeze_half:
        freeze_half(model, args.seed)
    return model


def freeze_half(model: nn.Module, seed: int) -> None:
    """Freezes half of an adapter's modules of every type (the last part of a module's name), rounded down."""
    by_type: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            by_type.setdefault(name.rsplit(".", 1)[-1], []).append(module)
    rng = random.Random(seed)
    for modules in by_type.values():
        for module in rng.sample(modules, len(modules) // 2):
            module.requires_grad_(False)
