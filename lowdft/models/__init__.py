"""The base, its tokenizer and adapters, reference scores, and memory estimates."""

from lowdft.models.adapter_fields import try_adapter
from lowdft.models.adapters import adapter_config, add_adapter, load_adapter, make_policy, require_adapter
from lowdft.models.base import (
    Source,
    configuration,
    context_length,
    end_ids,
    generation_end_ids,
    load_base,
    load_tokenizer,
    locate,
    made_from,
    public_name,
    release_memory,
    set_up_cuda,
    whole_weights,
)

__all__ = [
    "Source",
    "adapter_config",
    "add_adapter",
    "configuration",
    "context_length",
    "end_ids",
    "generation_end_ids",
    "load_adapter",
    "load_base",
    "load_tokenizer",
    "locate",
    "made_from",
    "make_policy",
    "public_name",
    "release_memory",
    "require_adapter",
    "set_up_cuda",
    "try_adapter",
    "whole_weights",
]
