"""Says where a key belongs that a section of a recipe does not have."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable

from lowdft import objectives
from lowdft.config.sections import Recipe
from lowdft.text import did_you_mean

OTHER_NAMES = {  # of TRL, of peft, or of earlier versions of transformers
    "warmup_ratio": "Use training.warmup_steps; below 1 it is a share of all steps.",
    "loss_type": "Use training.objective.",
    "torch_dtype": "Use model.dtype.",
    "num_generations": "Use negatives.per_prompt.",
    "num_return_sequences": "Use negatives.per_prompt.",
    "packing": "Packed rows are built in; remove it.",
    "padding_free": "Packed rows are built in; remove it.",
    "load_in_8bit": "Use model.load_in_4bit; 8 bit is not supported.",
    "lora_r": "Use adapter.r.",
    "lora": "Use the section adapter.",
    "peft": "Use the section adapter.",
}


def where(key: str, known: Iterable[str]) -> str:
    """Sentences for the end of a message: the key's place or other name, or the nearest known key; and the docs.

    Args:
        known: the keys that the section has.
    """
    if key in OTHER_NAMES:
        hint = f" {OTHER_NAMES[key]}"
    elif places := list(_places(key)):
        hint = f" Use {' or '.join(places)}."
    else:
        hint = did_you_mean(key, known)
        hint += "" if hint.endswith("?") else "."
    return f"{hint} All keys: docs/recipe-reference.md; TRL's names: docs/from-trl.md."


def _places(key: str) -> Iterable[str]:
    from lowdft.config.training import DFTConfig

    for name, hint in typing.get_type_hints(Recipe).items():
        kinds = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        if any(key == field.name for kind in kinds for field in dataclasses.fields(kind)):
            yield f"{name}.{key}"
    if any(key == field.name for field in dataclasses.fields(DFTConfig)):
        yield f"training.{key}"
    if any(key in objectives.get(name).defaults for name in objectives.names()):
        yield f"training.objective_args: {{{key}: …}}"
