"""Adapters: fresh, trained or half frozen, and what training starts from."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from lowdft.config.sections import AdapterSection
from lowdft.config.training import DFTConfig
from lowdft.errors import UserError
from lowdft.models.base import set_up_cuda

REFERENCE = "reference"  # the name of a frozen second adapter, where the reference is base + adapter


def make_policy(model: nn.Module | str, args: DFTConfig, peft_config=None) -> nn.Module:
    """The model to train: loaded where it is a name, under a fresh adapter or a copy of the reference's."""
    set_up_cuda()
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


def start_from_adapter(base: nn.Module, path: str) -> nn.Module:
    """A policy that starts as a copy of the trained adapter at `path`, and has it, frozen, as its reference.

    Raises:
        UserError: no adapter stands at `path`.
    """
    require_adapter(path, "training.reference_model")
    model = PeftModel.from_pretrained(base, path, is_trainable=True)
    model.load_adapter(path, REFERENCE, is_trainable=False)
    return model


def add_adapter(base, section: AdapterSection, seed: int):
    """A fresh LoRA adapter on the base: it changes nothing yet."""
    set_seed(seed)
    modules = section.target_modules
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        task_type="CAUSAL_LM",
        target_modules=modules if isinstance(modules, str) else list(modules),
    )
    return get_peft_model(base, config)


def load_adapter(base, path: str | Path):
    """A trained adapter on the base, frozen.

    Raises:
        UserError: no adapter stands at `path`.
    """
    require_adapter(path)
    return PeftModel.from_pretrained(base, str(path))


def adapter_digest(path: str | Path, key: str = "training.reference_model") -> str:
    """Names a trained adapter by its content; UserError when none stands at `path`, `key` being what named it."""
    weights = require_adapter(path, key)
    files = [weights, weights.with_name("adapter_config.json")]
    return _digest(*files, *(file.stat().st_mtime_ns for file in files))


@functools.lru_cache
def _digest(weights: Path, config: Path, *changed: int) -> str:
    said = json.loads(config.read_text(encoding="utf-8"))
    said = {k: v for k, v in said.items() if k not in ("base_model_name_or_path", "inference_mode", "peft_version")}
    digest = hashlib.sha256(weights.read_bytes() + json.dumps(said, sort_keys=True).encode())
    return "adapter " + digest.hexdigest()[:16]


def require_adapter(path: str | Path, key: str = "adapter") -> Path:
    """The weights of the trained adapter at `path`.

    Raises:
        UserError: none stands there; `key` is what named it.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(path) / name).is_file():
            raise UserError(f"{key}: {path} is not a trained adapter (no {name} there)")
    return Path(path) / name
