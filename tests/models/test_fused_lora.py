"""The fused LoRA function against peft's own forward and backward, and when it leaves a layer to peft."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from helpers import losses, make_llama, make_rows, make_trainer, needs_bfloat16
from peft import LoraConfig, get_peft_model
from torch import nn

from lowdft.logprobs import Group, score
from lowdft.models.fused_lora import fused_lora


def adapted(seed: int = 0, **settings):
    """A float64 model under an adapter whose B is not zero."""
    config = LoraConfig(**(dict(r=4, lora_alpha=12, target_modules="all-linear") | settings))
    model = get_peft_model(make_llama(seed=seed).double(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.1
    return model


def groups() -> list[Group]:
    return [Group(r["prompt_ids"], [*r["negative_ids"], r["completion_ids"]]) for r in make_rows(2)]


def gradients(model) -> list:
    out = score(model, groups()).logps_C
    pull = torch.linspace(-1, 1, len(out), dtype=out.dtype)
    return [out, *torch.autograd.grad(out @ pull, [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}], ids=str)
def test_equals_peft_in_float64(settings):
    model = adapted(**settings)
    wanted = gradients(model)
    with fused_lora(model) as number:
        assert number == 2 * len(settings.get("target_modules", range(7)))
        found = gradients(model)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all("forward" not in vars(module) for module in model.modules())


def test_equals_peft_on_a_4_bit_layer():
    torch.manual_seed(0)
    plain = nn.Sequential(bnb.nn.Linear4bit(64, 128, bias=True, compute_dtype=torch.float32, quant_type="nf4"))
    plain.is_loaded_in_4bit = True
    model = get_peft_model(plain.to("cpu"), LoraConfig(r=4, target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    x = torch.randn(3, 5, 64, requires_grad=True)
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]

    def run():
        out = model(x)
        return [out, *torch.autograd.grad(out.square().sum(), parameters)]

    wanted = run()
    with fused_lora(model) as number:
        assert number == 1
        found = run()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@needs_bfloat16
def test_half_precision_under_autocast_rounds_no_more_than_peft():
    """bfloat16 base, float32 adapter: both against float32."""
    ours, theirs = [], []
    for seed in range(8):  # one model's rounding errors are too few to compare
        exact = whole(gradients(adapted(seed).float()))
        model = adapted(seed).bfloat16()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        theirs.append((whole(gradients(model)) - exact).norm() / exact.norm())
        with fused_lora(model):
            found = whole(gradients(model))
        assert found.dtype == torch.float32
        ours.append((found - exact).norm() / exact.norm())
    assert sum(ours) < 1.25 * sum(theirs) < 8 * 0.1


def whole(found: list) -> torch.Tensor:
    """All gradients as one vector."""
    return torch.cat([gradient.flatten() for gradient in found[1:]])


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_adapters_stay_with_peft(settings):
    with fused_lora(adapted(**settings)) as number:
        assert number == 0


def test_an_adapter_that_is_switched_off_counts_no_more():
    model = adapted()
    with model.disable_adapter():
        base = score(model, groups()).logps_C
    with fused_lora(model):
        assert (score(model, groups()).logps_C - base).abs().max() > 1e-3
        with model.disable_adapter():
            assert torch.equal(score(model, groups()).logps_C, base)


def test_it_may_be_entered_twice():
    model = adapted()
    with fused_lora(model) as outer, fused_lora(model) as inner:
        assert (outer, inner) == (14, 0)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_the_same(checkpointing, tmp_path, monkeypatch):
    from contextlib import nullcontext

    settings = dict(max_steps=3, gradient_checkpointing=checkpointing, logging_steps=1)
    fused = make_trainer(tmp_path / "a", **settings)
    fused.train()
    monkeypatch.setattr("lowdft.training.trainer.fused_lora", lambda model: nullcontext())
    plain = make_trainer(tmp_path / "b", **settings)
    plain.train()
    assert losses(fused) == pytest.approx(losses(plain), rel=1e-4)
    assert all("forward" not in vars(module) for module in fused.model.modules())
