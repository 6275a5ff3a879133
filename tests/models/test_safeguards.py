"""4-bit layers: the guard reaches a model wherever it comes from, and a wrong gradient is found."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from helpers import lora, make_llama, make_rows
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    FalconForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lowdft import DFTConfig, DFTTrainer
from lowdft.errors import UserError
from lowdft.models.safeguards import guard_four_bit, switch_off_dropout


@pytest.fixture
def four_bit(tmp_path):
    """A tiny model, loaded in 4 bit by transformers alone, as QLoRA scripts do."""
    make_llama().save_pretrained(tmp_path / "base")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how, dtype=torch.float32)


def test_15_dropout_that_a_model_reads_from_its_configuration_is_off():
    """Falcon's between its layers stands in no module."""
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = FalconForCausalLM(FalconConfig(hidden_dropout=0.3, attention_dropout=0.1, **sizes)).train()
    ids = torch.arange(9)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert switch_off_dropout(model) == 0.3
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_15_noise_on_the_inputs_of_experts_is_off():
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    config = MixtralConfig(router_jitter_noise=0.1, num_key_value_heads=2, num_local_experts=2, **sizes)
    model = MixtralForCausalLM(config).train()
    ids = torch.arange(9)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert switch_off_dropout(model) == 0.1
    assert torch.equal(model(ids).logits, model(ids).logits)


def layers(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]


def test_21_the_trainer_guards_what_it_is_given(four_bit, tmp_path):
    for layer in layers(four_bit):
        layer.support_avx512bf16_for_cpu = True  # as on a CPU that has it
    args = DFTConfig(output_dir=str(tmp_path), use_cpu=True, num_train_epochs=2, report_to="none", disable_tqdm=True)
    DFTTrainer(four_bit, args, make_rows(), peft_config=lora())
    assert len(layers(four_bit)) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers(four_bit))


def test_21_a_wrong_gradient_is_found(four_bit, monkeypatch):
    guard_four_bit(four_bit)
    layer = layers(four_bit)[0]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: forward(x) + 0.5 * x @ torch.ones(x.shape[1], layer.out_features))
    with pytest.raises(UserError, match="a gradient through a 4-bit layer is wrong: it differs by"):
        guard_four_bit(four_bit)


@pytest.mark.parametrize("twice", [True, False], ids=["double quantization", "plain scales"])
def test_21_repacked_layers_are_unpacked(twice):
    """A layer as a forward pass without gradient leaves it on CPUs with AVX512-BF16: its weight is as before."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    torch.manual_seed(0)
    settings = dict(bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=twice)
    layer = bnb.nn.Linear4bit(256, 96, **settings)
    layer.weight.data *= torch.logspace(-2, 2, 256)  # blocks of very different scales
    layer = layer.to("cpu")
    before, weight = dequantized(layer), layer.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert weight.quant_state.packing_format_for_cpu
    with pytest.warns(UserWarning, match="1 4-bit layers have run before"):
        guard_four_bit(torch.nn.Sequential(layer))
    error = (dequantized(layer) - before).norm() / before.norm()
    assert error < 1e-2  # its scales were rounded to bfloat16, and with double quantization again to 8 bits


def dequantized(layer: torch.nn.Module) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
