"""SHiRA on the weights with the largest gradients: the sparse increment of SIFT (arXiv 2312.11875)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.logprobs import Group, score

GRADIENT = "gradient"  # a value of the recipe's `adapter.mask_type`; of its own, peft knows only "random"
ROWS = 32  # how many training rows choose


def gradient_mask(base: nn.Module, groups: Sequence[Group], r: int) -> Callable[..., Tensor]:
    """peft's mask function: it selects the r (m + n) entries of an (m, n) weight with the largest gradient of the NLL.

    This takes one forward and one backward pass. Each weight's gradient is freed as soon as its entries are selected.

    Args:
        base: a dense causal language model, without adapter.
        groups: prompts with their good completions, whose summed NLL it is.

    Raises:
        UserError: this process holds only a part of the weights.
    """
    linear = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    names = {module.weight: name for name, module in linear.items() if module is not base.get_output_embeddings()}
    if not all(weight.numel() for weight in names):
        raise UserError(
            "adapter.mask_type: gradient needs whole weights on every process; use --launch ddp, or mask_type: random"
        )
    places = {}

    def keep(weight: Tensor) -> None:
        gradient_N = weight.grad.abs().flatten()
        places[names[weight]] = gradient_N.topk(min(r * sum(weight.shape), len(gradient_N))).indices.cpu()
        weight.grad = None

    base.requires_grad_(False)
    hooks = [weight.requires_grad_(True).register_post_accumulate_grad_hook(keep) for weight in names]
    try:
        with torch.enable_grad():
            score(base, groups).logps_C.sum().backward()
    finally:
        base.requires_grad_(False)
        for hook in hooks:
            hook.remove()
    places = collectives.from_all(places)[0]  # near-ties may fall differently on other ranks

    def mask(layer: nn.Module, r: int, **_) -> Tensor:
        chosen = torch.zeros(layer.weight.numel(), device=layer.weight.device)
        return chosen.index_fill_(0, places[names[layer.weight]].to(chosen.device), 1.0).view_as(layer.weight)

    return mask
