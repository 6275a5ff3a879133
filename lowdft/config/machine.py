"""What this machine computes fast; torch is imported when asked."""

from __future__ import annotations


def computes_bfloat16() -> bool:
    """Whether this machine has bfloat16 instructions. A CPU without them emulates bfloat16, ten times slower."""
    import torch

    from lowdft.logprobs.cpu_attention import cpu_computes_bfloat16

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_computes_bfloat16()


def has_flash_attention() -> bool:
    """Whether there is a GPU with flash-attn installed.

    Without flash-attn, transformers' continuous batching computes attention over the keys of all samples with one mask.
    On CPUs padded batches are 1.7 to 4.3 times as fast (SmolLM2-135M in bfloat16, 16 to 96 samples).
    """
    import torch

    if not torch.cuda.is_available():
        return False
    from transformers.utils import is_flash_attn_2_available

    return is_flash_attn_2_available()
