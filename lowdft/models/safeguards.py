"""Prepares a model for correct training: dropout, 4-bit layers, and trained weights in float32."""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig

from lowdft import compat
from lowdft.errors import UserError

EXPERT_NOISE = ("jitter_noise", "input_jitter_noise")  # not router_jitter_noise, which PhiMoE also routes by


def switch_off_dropout(model: nn.Module) -> float:
    """Switches off the base's dropout, as TRL's DPO does, but not the adapter's. Returns the largest rate that was on.

    With dropout, policy and reference would differ at the first step, and so would the two passes of a long
    micro-batch. Many models store the probability as a number in their layers and not in a Dropout module, and some
    (Falcon) read it from their configuration in every pass. The noise on the inputs of experts counts as dropout.
    """
    of_adapters = {id(inner) for layer in model.modules() if isinstance(layer, BaseTunerLayer) for inner in _own(layer)}
    of_base = [m for m in model.modules() if id(m) not in of_adapters and not isinstance(m, BaseTunerLayer)]
    configurations = {id(c): c for m in of_base if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    largest = 0.0
    for owner in (*of_base, *configurations.values()):
        in_dropout = "Dropout" in type(owner).__name__
        for name, value in list(vars(owner).items()):
            is_rate = in_dropout and name == "p" or "drop" in name or name in EXPERT_NOISE
            if is_rate and isinstance(value, float) and value > 0:
                largest = max(largest, value)
                setattr(owner, name, 0.0)
    return largest


def _own(layer: BaseTunerLayer) -> list[nn.Module]:
    """The adapter's modules in a layer, without the base's layer."""
    base = {id(module) for module in layer.get_base_layer().modules()}
    return [module for module in layer.modules() if id(module) not in base]


def train_in_float32(model: nn.Module) -> int:
    """Converts trained bfloat16 weights to float32, because bfloat16 loses updates below 1/256 of a weight.

    Returns how many numbers were converted. Their layers should still compute in bfloat16 (`logprobs.layers_in`).
    """
    lifted = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    for parameter in lifted:
        parameter.data = parameter.data.float()
    return sum(parameter.numel() for parameter in lifted)


def guard_four_bit(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit layers for inference, undoes it, and checks a gradient through one.

    On CPUs with AVX512-BF16, a forward pass without gradient in eval mode repacks a layer, and from then on gradients
    through it are silently wrong.

    Raises:
        UserError: a layer's gradient differs from that of its dequantized weight.
    """
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    repacked = 0
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        repacked += _unpack(layer)
    if repacked:
        warnings.warn(
            f"{repacked} 4-bit layers have run before, which rounded the scales of their weights to bfloat16; load the "
            "model anew for the exact weights",
            stacklevel=3,
        )
    if layers:
        _check_gradient(layers[0])


def _unpack(layer: nn.Module) -> bool:
    """Undoes the repacking of a layer for inference. Returns whether it was repacked."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None or not getattr(state, "packing_format_for_cpu", False):
        return False
    layer.weight.data, layer.weight.quant_state = compat.unpacked_four_bit(layer.weight.data, state)
    return True


def _check_gradient(layer: nn.Module) -> None:
    import bitsandbytes as bnb

    state = getattr(layer.weight, "quant_state", None)
    if state is None or layer.weight.device.type == "meta" or layer.weight.data.is_floating_point():
        return  # not quantized yet, or sharded
    advice = "Load the model again, and pass it to the trainer before you run it."
    dtype = layer.compute_dtype or torch.float32
    generator = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randn(4, size, generator=generator).to(layer.weight.device, dtype)  # noqa: E731
    x = draw(layer.in_features).requires_grad_()
    pull = draw(layer.out_features)
    with torch.enable_grad():
        (found,) = torch.autograd.grad((layer(x) * pull).sum(), x)
    wanted = pull.float() @ bnb.functional.dequantize_4bit(layer.weight.data, state).float()
    error = ((found.float() - wanted).norm() / wanted.norm()).item()
    if not error < 0.02:
        raise UserError(
            f"a gradient through a 4-bit layer is wrong: it differs by {error:.0%} from that of the dequantized "
            f"weight. {advice} If this happens again, use another version of bitsandbytes, or "
            "load_in_4bit: false."
        )
