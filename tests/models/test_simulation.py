"""Memory counted on fake tensors: the counting itself, real models' shapes, and that few layers stand for all."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from lowdft import DFTConfig
from lowdft.config.sections import AdapterSection, ModelSection
from lowdft.logprobs import Group
from lowdft.models.memory import estimate
from lowdft.models.simulation import LiveBytes, pass_memory, simulate

SHAPES = {
    "llama-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "mistral-7b": MistralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, sliding_window=None,
    ),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "gemma-270m": Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512,
    ),
}  # fmt: skip
GROUP = [Group([5] * 512, [[6] * 512] * 3)]


def shortened(shape: str, layers: int):
    """The shape with that many layers."""
    config = SHAPES[shape]
    return type(config)(**config.to_dict() | {"num_hidden_layers": layers, "layer_types": None})


def settings(tmp_path, in_4bit: bool, checkpointing: bool, **more):
    section = ModelSection(name_or_path="-", load_in_4bit=in_4bit, dtype="bfloat16")
    args = DFTConfig(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=checkpointing, **more)
    return section, AdapterSection(), args


def test_storages_are_counted_while_they_live():
    """Two products of 1000 float32 numbers, one of which is given up; views count nothing; 512 bytes at least."""
    with LiveBytes() as count:
        a = torch.ones(1000)
        b = (a * 2).view(10, 100)
        assert count.live == 2 * 4096
        del b
        small = torch.ones(1)
        assert (count.live, count.peak) == (4096 + 512, 2 * 4096)
    assert len(a) == 1000 and len(small) == 1


@pytest.mark.parametrize(
    "shape, in_4bit, checkpointing, layers",
    [
        ("llama-8b", True, True, 5),
        ("gemma-270m", False, False, 7),
        *(pytest.param(s, q, c, None, marks=pytest.mark.slow) for s in SHAPES for q in (True, False) for c in (1, 0)),
    ],
)
def test_few_layers_stand_for_all(shape, in_4bit, checkpointing, layers, tmp_path):
    """Within 2% of the simulation of every layer."""
    layers = layers or SHAPES[shape].num_hidden_layers
    part = shortened(shape, layers)
    how = settings(tmp_path, in_4bit, bool(checkpointing))
    few, whole = pass_memory(part, *how, GROUP), simulate(part, *how, GROUP, layers)
    for name, value in vars(whole).items():
        assert getattr(few, name) == pytest.approx(value, rel=0.02), name


def test_a_dequantized_base_takes_the_memory_of_a_dense_one(tmp_path):
    """And no more at work than the 4-bit one, whose every product makes a dense weight."""
    config, (section, adapter, args) = shortened("llama-8b", 2), settings(tmp_path, True, True)
    section.dequantize = True
    found = simulate(config, section, adapter, args, GROUP, 2)
    assert found.weights == simulate(config, *settings(tmp_path, False, True), GROUP, 2).weights
    assert found.peak < simulate(config, *settings(tmp_path, True, True), GROUP, 2).peak


def test_every_second_layer_is_between(tmp_path):
    """Of 7 layers: few stand for all, and it takes more than when every layer has a checkpoint."""
    config = shortened("qwen2.5-0.5b", 7)
    every = dict(gradient_checkpointing_kwargs={"use_reentrant": False, "every_n_layers": 2})
    half = simulate(config, *settings(tmp_path, False, True, **every), GROUP, 7).peak
    assert pass_memory(config, *settings(tmp_path, False, True, **every), GROUP).peak == pytest.approx(half, rel=0.05)
    assert 1.2 * pass_memory(config, *settings(tmp_path, False, True), GROUP).peak < half


def test_a_7b_group_of_three_completions_fits_a_small_gpu(tmp_path):
    """QLoRA of a Mistral-7B shape, 3 sequences of 1024 tokens with 512 in common: under 6.5 GB, CUDA's own included.

    A token keeps 205 kB per layer without checkpointing (computed by hand from the saved tensors: 206).
    """
    config = SHAPES["mistral-7b"]
    section, adapter, args = settings(tmp_path, True, True, optim="paged_adamw_8bit")
    found = estimate(config, section, adapter, args, GROUP, on_gpu=True)
    print({name: f"{value / 1e9:.2f} GB" for name, value in found.parts.items()})
    assert 0.6e9 + found.total < 6.5e9
    assert found.parts["weights"] == pytest.approx(4.13e9, rel=0.01)  # 3.49 + 0.11 of NF4, 0.52 of embedding and head
    section, adapter, args = settings(tmp_path, True, False)
    two, three = (simulate(config, section, adapter, args, GROUP, n).peak for n in (2, 3))
    assert (three - two) / 2048 == pytest.approx(206e3, rel=0.03)


def test_many_short_completions_pay_for_their_copies_of_the_prompt(tmp_path):
    """32 completions of 16 after a prompt of 1024: keys and values are gathered for each, 151 MB a layer."""
    group = [Group([5] * 1024, [[6] * 16] * 32)]
    how = settings(tmp_path, True, False)
    two, three = (simulate(SHAPES["mistral-7b"], *how, group, n).peak for n in (2, 3))
    plain = 206e3 * 1536
    assert three - two - plain == pytest.approx(2 * 32 * 1152 * 8 * 128 * 2, rel=0.15)
