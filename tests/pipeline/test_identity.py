"""What an artifact depends on: contents and resolved settings, and nothing that moves memory or speed alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowdft.config.recipe import load_recipe
from lowdft.pipeline import identity
from lowdft.pipeline.context import Run


@pytest.fixture
def of(recipe):
    """The identity of the training of the recipe under some overrides."""

    def identify(*overrides: str) -> dict:
        return identity.training(Run(load_recipe(recipe, list(overrides))))

    return identify


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.tokens_per_pass=512"],
        ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"],
        ["training.gradient_checkpointing=true", "training.offload_checkpoints=true"],
        ["training.layout=padded", "training.logits_chunk_size=7", "training.dataloader_num_workers=1"],
        ["training.save_steps=7", "training.logging_steps=3", "training.report_to=none", "negatives.batch_size=3"],
        ["negatives.backend=padded"],  # what auto is on a CPU
        ["training.tau=1.0", "training.learning_rate=2e-4", "adapter.dropout=0.0", "adapter.use_rslora=false"],
    ],
    ids=lambda o: o[0],
)
def test_what_moves_no_number_is_no_part(of, overrides):
    assert of(*overrides) == of()


def test_a_base_that_is_dequantized_once_is_the_same_base(of):
    """Its numbers are those of the 4-bit form (`tests/models/test_base.py`)."""
    assert of("model.load_in_4bit=true", "model.dequantize=true") == of("model.load_in_4bit=true") != of()


@pytest.mark.parametrize(
    "override, key",
    [
        ("training.tau=0.5", "training.tau"),
        ("training.gradient_accumulation_steps=2", "training.prompts_per_step"),
        ("training.max_length=64", "max_length"),
        ("adapter.use_dora=true", "adapter.use_dora"),
        ("negatives.temperature=1.5", "negatives.temperature"),
        ("negatives.backend=continuous", "negatives.backend"),
        ("data.eval_rows=2", "data"),
    ],
)
def test_what_moves_numbers_is_named_by_its_key(of, override, key):
    before, after = of(), of(override)
    assert key in {k for k in before | after if before.get(k) != after.get(k)}


def test_data_is_named_by_content_not_by_path(of, recipe, tmp_path):
    shutil.copy(Path(recipe).parent / "rows.jsonl", tmp_path / "moved.jsonl")
    assert of(f"data.train={tmp_path}/moved.jsonl") == of()
