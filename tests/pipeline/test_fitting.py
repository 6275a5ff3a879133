"""The fastest setting that fits: which one is chosen as memory shrinks, and how large its passes are."""

from __future__ import annotations

import pytest

from lowdft import DFTConfig
from lowdft.config.sections import ModelSection, Recipe
from lowdft.logprobs import Group
from lowdft.models.memory import Memory
from lowdft.pipeline import fitting
from lowdft.training.token_budget import num_tokens

GROUPS = [Group([1] * 100, [[2] * 100] * 3)] * 8  # 400 tokens each, 200 the longest sequence


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Settings that fit so many bytes, where a token takes 10 bytes, 6 with half of the checkpoints, 2 with all."""

    def estimate(config, model, adapter, args, groups, on_gpu, gpus):
        tokens = sum(num_tokens(group, "packed") for group in groups)
        every = (args.gradient_checkpointing_kwargs or {}).get("every_n_layers", 1)
        each = 1 if args.offload_checkpoints else 2 * every**1.6 if args.gradient_checkpointing else 10
        return Memory({"a pass": each * tokens})

    monkeypatch.setattr(fitting, "estimate", estimate)
    args = DFTConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4, objective="dft2")
    recipe = Recipe(model=ModelSection(name_or_path="-", load_in_4bit=True, dtype="bfloat16"))
    return lambda room: fitting.fits(recipe, args, None, GROUPS, room)


def test_with_room_for_all_nothing_is_checkpointed(find):
    """Four settings, and all four prompts of a micro-batch in one pass."""
    found = find(16_000)
    assert found[0].settings == {"gradient_checkpointing": False}
    assert [fit.tokens for fit in found] == [1600] * 4
    assert found[0].work < found[1].work < found[2].work < found[3].work


def test_a_setting_as_it_is_printed_checkpoints_without_reentrant_autograd(find, tmp_path):
    """torch warns of the other kind, under which adapters on a frozen base get no gradient."""
    for fit in find(16_000):
        args = DFTConfig(output_dir=str(tmp_path), use_cpu=True, **fit.settings)
        assert args.gradient_checkpointing_kwargs is None or not args.gradient_checkpointing_kwargs["use_reentrant"]
        assert fitting.with_settings(args, fit.settings).gradient_checkpointing_kwargs["use_reentrant"] is False


def test_passes_shrink_until_they_fit(find):
    """A pass of one group of 400 tokens: 4,000 bytes without checkpoints."""
    fits = {str(fit.settings): fit for fit in find(4_500)}
    plain = fits[str({"gradient_checkpointing": False})]
    assert 400 <= plain.tokens < 800 and plain.bytes <= 4_500
    assert all(fit.bytes <= 4_500 for fit in fits.values())


def test_a_group_that_is_scored_first_costs_more_than_checkpoints(find):
    """With room for 250 tokens plain, a group goes in pieces, twice: checkpointing every second layer is faster."""
    found = find(2_500)
    assert found[0].settings["gradient_checkpointing"]
    assert {"gradient_checkpointing": False} in [fit.settings for fit in found]


def test_nothing_fits(find):
    assert find(100) == []
