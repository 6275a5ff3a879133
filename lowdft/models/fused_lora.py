"""LoRA's forward and backward pass as one autograd function, during training.

peft adds an adapter to a linear layer in four steps, each with a tensor as large as the layer's output (a copy, the
product, its scaling, the sum). Here the low-rank product is added to the base's output in place. The backward pass is
dx = dy W + s (dy B) A, dA = s (dy B)' x, dB = s dy' (x A'), with W from the base in its own form (dense or 4-bit).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


@contextlib.contextmanager
def fused_lora(model: nn.Module) -> Iterator[int]:
    """A context in which plain LoRA layers run as one function; yields how many there are.

    Plain means: on `nn.Linear` or bitsandbytes' `Linear4bit`, with one active adapter, not merged, without dropout,
    variant (such as DoRA) or bias. All other layers run peft's code, and so does a plain layer that stops being plain
    (its adapter is disabled, or another one is activated).
    """
    layers = [module for module in model.modules() if _is_plain(module) and "forward" not in vars(module)]
    for layer in layers:
        layer.forward = _Forward(layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


class _Forward:
    """A layer's forward as one function, or peft's forward if the layer is no longer plain."""

    def __init__(self, layer: LoraLinear):
        self.layer, self.own = layer, layer.forward

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        layer = self.layer
        if args or kwargs or layer.disable_adapters or not x.numel() or not _is_plain(layer):
            return self.own(x, *args, **kwargs)
        (name,) = layer.active_adapters
        a_RD, b_OR, device = layer.lora_A[name].weight, layer.lora_B[name].weight, x.device.type
        if torch.is_autocast_enabled(device):
            x, a_RD, b_OR = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (x, a_RD, b_OR))
        elif a_RD.dtype != x.dtype:
            return self.own(x)
        return _LoraLinear.apply(x, a_RD, b_OR, layer.get_base_layer(), layer.scaling[name])


class _LoraLinear(torch.autograd.Function):
    """base(x) + s x A' B', with gradients for x, A and B but not for the frozen base."""

    @staticmethod
    def forward(ctx, x, a_RD, b_OR, base, scaling):
        """[..., D] -> [..., O]."""
        out = base(x)
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a_RD.T
        if out.dtype == x.dtype and out.is_contiguous():
            out.view(-1, out.shape[-1]).addmm_(low, b_OR.T, alpha=scaling)
        else:
            out = out + (scaling * (low @ b_OR.T)).view_as(out).to(out.dtype)
        ctx.save_for_backward(flat, a_RD, b_OR, low)
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
        return out

    @staticmethod
    def backward(ctx, grad):
        """See the module's docstring; `ctx.base` provides its product with dy."""
        flat, a_RD, b_OR, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).to(flat.dtype)
        low_grad = grad @ b_OR
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _through_base(ctx.base, grad)
            x_grad = x_grad.addmm_(low_grad, a_RD, alpha=ctx.scaling).view(ctx.shape)
        a_grad = (low_grad.T @ flat).mul_(ctx.scaling) if ctx.needs_input_grad[1] else None
        b_grad = (grad.T @ low).mul_(ctx.scaling) if ctx.needs_input_grad[2] else None
        return x_grad, a_grad, b_grad, None, None


def _through_base(base: nn.Module, grad: Tensor) -> Tensor:
    """dy W, [N, D], as a new tensor."""
    if type(base) is nn.Linear:
        return grad @ base.weight.to(grad.dtype)
    from bitsandbytes.functional import dequantize_4bit

    return grad @ dequantize_4bit(base.weight.data, base.weight.quant_state).to(grad.dtype)


def _is_plain(module: nn.Module) -> bool:
    if not (isinstance(module, BaseTunerLayer) and hasattr(module, "lora_A")) or not hasattr(module, "scaling"):
        return False
    names = [name for name in module.active_adapters if name in module.lora_A]
    base = module.get_base_layer()
    kinds = type(base) is nn.Linear or type(base).__name__ == "Linear4bit"
    if not kinds or len(names) != 1 or len(module.active_adapters) != 1 or module.merged:
        return False
    (name,) = names
    return (
        isinstance(module.lora_dropout[name], nn.Identity)
        and name not in module.lora_variant
        and not module.lora_bias.get(name, False)
        and not any(parameter.requires_grad for parameter in base.parameters())
        and not module._forward_hooks
        and isinstance(module.lora_A[name], nn.Linear)
    )
