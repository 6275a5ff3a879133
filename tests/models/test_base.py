"""A 4-bit base that is dequantized as it is loaded: the numbers of the 4-bit one, in plain layers."""

from __future__ import annotations

import dataclasses

import bitsandbytes as bnb
import pytest
import torch
from helpers import make_rows, needs_bfloat16

from lowdft import models
from lowdft.config.sections import AdapterSection, ModelSection
from lowdft.logprobs import Group, score
from lowdft.models.fused_lora import fused_lora
from lowdft.sampling import Request, SamplingSettings, get_sampler


def numbers(folder: str, dtype: str, dequantize: bool) -> tuple:
    """Log-probabilities and their gradient under LoRA; eight answers of the base, eight under LoRA; a linear layer."""
    section = ModelSection(name_or_path=str(folder), load_in_4bit=True, dequantize=dequantize, dtype=dtype)
    model = models.add_adapter(models.load_base(models.locate(section), section), AdapterSection(r=2), seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    groups = [Group(r["prompt_ids"], [*r["negative_ids"], r["completion_ids"]]) for r in make_rows(2)]
    with fused_lora(model):
        logps = score(model, groups).logps_C
        gradient = torch.autograd.grad(logps.sum(), [p for p in model.parameters() if p.requires_grad])
    requests = [Request([5 + i, 6, 7], i) for i in range(8)]
    sampler = get_sampler("padded", model, [2], SamplingSettings(max_new_tokens=6), 4)
    adapted = sampler.sample(requests)
    with model.disable_adapter():
        answers = sampler.sample(requests)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer()
    return (logps, *gradient), answers, adapted, layer


def check_same(base: str, dtype: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same bits, forward, backward and in the base's sampling; returns a layer of both.

    Outside of training peft rounds once more where it adds an adapter to a 4-bit layer in bfloat16, so there answers
    under an adapter may differ.
    """
    tensors, answers, adapted, layer = numbers(base, dtype, True)
    wanted, base_answers, base_adapted, packed = numbers(base, dtype, False)
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True)) and len(tensors) > 14
    assert answers == base_answers
    assert adapted == base_adapted or dtype == "bfloat16"
    return layer, packed


DTYPES = pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])


@DTYPES
def test_a_dequantized_base_has_the_numbers_of_its_4bit_form(dtype, tiny_folder):
    """On a CPU both multiply with the same dense weights."""
    layer, packed = check_same(tiny_folder, dtype)
    assert type(layer) is torch.nn.Linear and layer.weight.dtype == getattr(torch, dtype)
    assert isinstance(packed, bnb.nn.Linear4bit) and not layer.weight.requires_grad


@pytest.mark.slow
@DTYPES
def test_the_real_model_too(dtype, smollm2):
    layer, packed = check_same(smollm2, dtype)
    weight = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    assert torch.equal(layer.weight, weight.to(layer.weight.dtype))


def test_it_is_another_base_than_the_dense_one(tiny_folder):
    section = ModelSection(name_or_path=str(tiny_folder), load_in_4bit=True, dequantize=True, dtype="float32")
    rounded, dense = (
        models.load_base(models.locate(section), some).model.layers[0].mlp.up_proj.weight
        for some in (section, dataclasses.replace(section, load_in_4bit=False, dequantize=False))
    )
    assert 0.01 < ((rounded - dense).norm() / dense.norm()).item() < 0.3
