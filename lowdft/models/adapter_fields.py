"""Checks of an adapter's fields: their types, and whether they name modules of the model."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Mapping

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lowdft.config.values import check_type
from lowdft.errors import UserError

PEFT_FAILS = (ValueError, TypeError, AttributeError, KeyError, IndexError)  # on fields that do not suit the model


def check_types(kind: type[PeftConfig], given: Mapping[str, object]) -> None:
    """Raises UserError for a field whose value has another type than peft says: it would fail, or pass for true."""
    wanted = typing.get_type_hints(kind)
    for name, value in given.items():
        check_type(f"adapter.{name}", value, wanted[name])


def new_adapter(model: nn.Module, config: PeftConfig) -> PeftModel:
    """A new adapter on the model; warns of names that no module of the model has.

    Raises:
        UserError: peft cannot add it.
    """
    modules = [name for name, _ in model.named_modules()]
    for field in ("target_modules", "modules_to_save", "exclude_modules"):
        names = getattr(config, field, None) or ()
        unknown = [] if isinstance(names, str) else [name for name in names if not _matches(name, modules)]
        if unknown and field != "target_modules" or unknown and len(unknown) < len(names):
            warnings.warn(f"adapter.{field} has {', '.join(unknown)}, but no module has that name", stacklevel=2)
    try:
        return get_peft_model(model, config)
    except PEFT_FAILS as error:
        linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        hint = f" The model's linear layers: {', '.join(sorted(linear))}." if "not found" in str(error) else ""
        raise UserError(f"adapter: peft cannot add it to this model: {error}{hint}") from error


def _matches(name: str, modules: list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in modules)


def try_adapter(config: PeftConfig, model: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Adds an adapter to a model without weights.

    Raises:
        UserError: peft cannot add it.
    """
    with torch.device("meta"):
        new_adapter(AutoModelForCausalLM.from_config(model, trust_remote_code=trust_remote_code), config)
