"""Merges an adapter into its base: into the original weights, or into the dequantized weights of the 4-bit base.

It never merges into 4-bit layers themselves, because rounding would erase the adapter.
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import torch

from lowdft.config.sections import ModelSection
from lowdft.errors import UserError
from lowdft.models.adapters import load_adapter
from lowdft.models.base import Source, load_base

WAYS = ("bf16", "dequantized")


def merged(source: Source, section: ModelSection, adapter: Path, way: str):
    """The merged model in bfloat16.

    Args:
        way: "bf16" merges into the base's original weights, as published; "dequantized" merges into the dequantized NF4
            weights, which the adapter was trained on.

    Raises:
        UserError: a merged weight is not finite.
    """
    if way == "dequantized":
        base = load_base(source, dataclasses.replace(section, dequantize=True))
    else:
        base = load_base(source, dataclasses.replace(section, load_in_4bit=False, dequantize=False, dtype="bfloat16"))
    try:
        model = load_adapter(base, adapter).merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"{adapter}: could not be merged ({error})") from error
    gc.collect()
    model.config.dtype = torch.bfloat16
    return model.to(torch.bfloat16)
