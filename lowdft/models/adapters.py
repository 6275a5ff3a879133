"""Adapters: new, trained or half frozen, and the model that training starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    ShiraConfig,
    VeraConfig,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from lowdft.config.sections import AdapterSection
from lowdft.config.training import DFTConfig
from lowdft.errors import UserError
from lowdft.files import read_json
from lowdft.logprobs import Group
from lowdft.models.adapter_fields import check_types, new_adapter
from lowdft.models.base import set_up_cuda
from lowdft.models.sparse import GRADIENT, ROWS, gradient_mask
from lowdft.text import did_you_mean

# for each type: peft's configuration class, and peft's names for the recipe's short keys
TYPES: dict[str, tuple[type[PeftConfig], dict[str, str]]] = {
    "lora": (LoraConfig, {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}),
    "ia3": (IA3Config, {}),
    "oft": (OFTConfig, {"dropout": "module_dropout"}),
    "loha": (LoHaConfig, {"r": "r", "alpha": "alpha", "dropout": "module_dropout"}),
    "lokr": (LoKrConfig, {"r": "r", "alpha": "alpha", "dropout": "module_dropout"}),
    "vera": (VeraConfig, {"r": "r", "dropout": "vera_dropout"}),
    "shira": (ShiraConfig, {"r": "r"}),
}
# On a 4-bit base, peft has no layers for these, and IA3's return float32 states, which a bfloat16 head does not take.
DENSE = ("ia3", "loha", "lokr", "shira")
NOT_OF_RECIPES = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
                  "inference_mode", "runtime_config", "target_modules")  # fmt: skip
CHANGE_THE_BASE = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga")
REFERENCE = "reference"  # the name of a second, frozen adapter, if the reference is base + adapter


def make_policy(model: nn.Module | str, args: DFTConfig, peft_config=None) -> nn.Module:
    """The model to train: loaded if it is a name, with a new adapter or a copy of the reference's adapter."""
    set_up_cuda()
    if isinstance(model, str):
        model = by_name(AutoModelForCausalLM, model, dtype="auto")
    if REFERENCE in getattr(model, "peft_config", {}):
        raise UserError(
            f'the model has an adapter named "{REFERENCE}", a name that lowdft uses itself. Give it another name; for '
            "a frozen adapter as the reference, set reference_model: adapter:PATH, which also starts training from it."
        )
    if args.reference_adapter:
        model = start_from_adapter(model, args.reference_adapter)
    for config in [peft_config] if peft_config is not None else getattr(model, "peft_config", {}).values():
        check_config(config)
    if peft_config is not None:
        set_seed(args.seed)
        model = new_adapter(model, peft_config)
    if args.freeze_half:
        freeze_half(model, args.seed)
    return model


def by_name(loader, name: str, **options):
    """`loader.from_pretrained(name)` of transformers; raises UserError if there is nothing of that name."""
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model is {name!r}, which cannot be loaded ({str(error).splitlines()[0]}). Pass a model's folder, its "
            "name on the Hub, or the model itself."
        ) from error


def freeze_half(model: nn.Module, seed: int) -> None:
    """Freezes half (rounded down) of an adapter's modules of each type, which is the last part of a module's name."""
    by_type: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            by_type.setdefault(name.rsplit(".", 1)[-1], []).append(module)
    rng = random.Random(seed)
    for modules in by_type.values():
        for module in rng.sample(modules, len(modules) // 2):
            module.requires_grad_(False)


def start_from_adapter(base: nn.Module, path: str) -> nn.Module:
    """A policy that starts as a copy of the trained adapter at `path`; the frozen original is its reference.

    Raises:
        UserError: there is no adapter at `path`.
    """
    require_adapter(path, "training.reference_model")
    model = PeftModel.from_pretrained(base, path, is_trainable=True)
    model.load_adapter(path, REFERENCE, is_trainable=False)
    return model


def add_adapter(base, section: AdapterSection, seed: int, rows: Sequence[Mapping] = ()):
    """A new adapter on the base, which does not change its output yet.

    Args:
        rows: training rows (`prompt_ids`, `completion_ids`). The first of them choose which weights SHiRA trains with
            `mask_type: gradient`; without rows that choice is random.
    """
    config = adapter_config(section)
    if rows and mask_type(section) == GRADIENT:
        some = [rows[i] for i in range(min(ROWS, len(rows)))]
        config.mask_fn = gradient_mask(base, [Group(r["prompt_ids"], [r["completion_ids"]]) for r in some], section.r)
    set_seed(seed)
    return new_adapter(base, config)


def mask_type(section: AdapterSection) -> str | None:
    """How the weights that SHiRA trains are chosen: "random" or "gradient". None for other adapters."""
    return section.options.get("mask_type", "random") if section.type == "shira" else None


def without_input_casts(model: nn.Module) -> contextlib.AbstractContextManager:
    """A context in which adapter layers do not cast their inputs to float32: autocast casts instead, without copies.

    peft's layers of IA3, OFT, VeRA and SHiRA have no such switch and are left alone.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    have_it = all(hasattr(layer, "cast_input_dtype_enabled") for layer in layers)
    return disable_input_dtype_casting(model, active=have_it)


def adapter_config(section: AdapterSection, in_4bit: bool = False) -> PeftConfig:
    """peft's configuration of a recipe's adapter.

    Args:
        in_4bit: the base is loaded in 4 bit.

    Raises:
        UserError: an unknown type or field, or an adapter with which lowdft's log-probabilities would be wrong.
    """
    if section.type not in TYPES:
        hint = did_you_mean(section.type, TYPES)
        reason = " (prompt tuning adds tokens, which packed rows do not have)" if "prompt" in section.type else ""
        raise UserError(f"adapter.type is {section.type!r}{reason}; wanted one of {', '.join(TYPES)}.{hint}")
    kind, short = TYPES[section.type]
    if in_4bit and section.type in DENSE:
        raise UserError(f"adapter.type: {section.type} needs dense weights; set model.load_in_4bit: false")
    given = {"target_modules": section.target_modules}
    given |= {name: getattr(section, ours) for ours, name in short.items()}
    if section.dropout and "dropout" not in short:
        raise UserError(f"adapter.dropout is {section.dropout}, but {section.type} has no dropout; remove the key")
    options = dict(section.options)
    if section.type == "shira":
        chosen_by = options.pop("mask_type", "random")
        if chosen_by not in ("random", GRADIENT):
            raise UserError(f"adapter.mask_type is {chosen_by!r}; wanted random or {GRADIENT}")
    known = [f.name for f in dataclasses.fields(kind) if f.init and f.name not in NOT_OF_RECIPES]
    for key in options:
        if key in NOT_OF_RECIPES:
            raise UserError(f"adapter.{key} is set by lowdft; remove it")
        if key not in known:
            hint = did_you_mean(key, [*known, *short])
            see = f"See docs/recipe-reference.md, and peft's documentation of {kind.__name__}"
            raise UserError(f"adapter.{key} is not a field of peft's {kind.__name__}.{hint} {see}")
    if section.type == "ia3":
        given["feedforward_modules"] = []  # modules that scale their input; none unless the recipe names some
    check_types(kind, given | options)
    try:
        config = kind(**given | options, task_type="CAUSAL_LM")
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"adapter: {error}") from error
    check_config(config)
    if getattr(config, "bias", "none") != "none":
        raise UserError(
            f"adapter.bias is {config.bias}, which trains biases of the base itself: with the adapter off they stay "
            "changed, and the base that a run scores and measures would not be the base. Leave it out."
        )
    return config


def check_config(config: PeftConfig) -> None:
    """Raises UserError for an adapter with which lowdft's log-probabilities or its reference would be wrong."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or kind in ("ADAPTION_PROMPT", "XLORA"):
        raise UserError(f"adapter: {kind} adds tokens or runs the model twice, which packed rows do not support")
    if kind == "ADALORA":
        raise UserError(
            "adapter: ADALORA needs its own loss and a call after every step, which lowdft does not support"
        )
    for name in ("target_modules", "modules_to_save"):
        value = getattr(config, name, None) or ()
        value = [value] if isinstance(value, str) else value
        if any(one.rsplit(".", 1)[-1] == "lm_head" for one in value):
            raise UserError(
                f"adapter.{name} has lm_head, but log-probabilities are computed in chunks from a plain linear head. "
                "Remove it."
            )
    _refuse_megatron(vars(config), "adapter")
    if getattr(config, "alora_invocation_tokens", None):
        raise UserError("adapter.alora_invocation_tokens is not supported with packed rows; remove it")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.startswith(CHANGE_THE_BASE):
        raise UserError(
            f"adapter.init_lora_weights: {start} changes the base's weights, or needs a pass over data first, but the "
            "base with the adapter off must stay the reference. Use true, gaussian or orthogonal."
        )


def _refuse_megatron(config: dict, key: str) -> None:
    """Raises UserError for `megatron_config`: with it, peft imports any module that `megatron_core` names."""
    if config.get("megatron_config"):
        raise UserError(
            f"{key}.megatron_config: peft would import the Python module {config.get('megatron_core')!r} that "
            "megatron_core names, and Megatron's layers are not supported. Remove both."
        )


def adapter_identity(section: AdapterSection) -> dict:
    """The type, and the fields in which an adapter's configuration differs from peft's default for its type."""
    by = {"mask_type": GRADIENT} if mask_type(section) == GRADIENT else {}
    return {"type": section.type} | by | config_identity(adapter_config(section))


def config_identity(config: PeftConfig) -> dict:
    """The fields in which a configuration differs from peft's default for its type."""
    default = type(config)().to_dict()
    found = {k: v for k, v in config.to_dict().items() if v != default.get(k)}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in found.items()}


def identity_of(model: nn.Module) -> dict | None:
    """Identifies the configuration of a model's adapter, in plain JSON values; None without an adapter."""
    if not isinstance(model, PeftModel):
        return None
    config = model.active_peft_config
    found = {k: v for k, v in config_identity(config).items() if k == "target_modules" or k not in NOT_OF_RECIPES}
    return json.loads(json.dumps({"type": config.peft_type, **found}, default=lambda v: type(v).__name__))


def trained_beside(model: nn.Module) -> list[str]:
    """Names of the base's parameters that train next to an adapter; switching it off does not undo their changes."""
    if not isinstance(model, PeftModel):
        return []
    adapters = set(model.active_adapters)
    return [name for name, p in model.named_parameters() if p.requires_grad and not adapters & set(name.split("."))]


def load_adapter(base, path: str | Path):
    """A trained adapter on the base, frozen.

    Raises:
        UserError: there is no adapter at `path`.
    """
    require_adapter(path)
    return PeftModel.from_pretrained(base, str(path))


def adapter_digest(path: str | Path, key: str = "training.reference_model") -> str:
    """Identifies a trained adapter by its content; raises UserError (naming `key`) if there is none at `path`."""
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
        UserError: there is none, or loading it would import code; the message names `key`.
    """
    config, weights = (Path(path) / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    for file in (config, weights):
        if not file.is_file():
            raise UserError(f"{key}: {path} is not a trained adapter (it has no {file.name})")
    _refuse_megatron(read_json(config), str(config))
    return weights
