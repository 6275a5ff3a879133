"""What plan prints before anything is loaded."""

from __future__ import annotations

import pytest
import torch
from helpers import folder

from lowdft.cli import main
from lowdft.training.token_budget import Passes


def test_plan_before_and_after_negatives_are_written(recipe, capsys):
    """Steps, tokens and memory from the recipe alone; of the run folder only the prepared rows are written."""
    assert main(["plan", recipe, "--gpu", "1", "--probe"]) == 0
    out = capsys.readouterr().out
    assert "6 steps" in out and "tokens/s" in out and "h to generate negatives" in out
    assert "fits into 1 GB, fastest with training.gradient_checkpointing=false training.tokens_per_pass=" in out
    assert not (folder(recipe) / "recipe.yaml").exists()
    assert main(["plan", recipe, "--gpu", "0.6"]) == 0
    assert "does not fit into 0.6 GB" in capsys.readouterr().out


def test_a_plan_for_a_gpu_is_of_its_arithmetic(recipe, monkeypatch):
    """dtype auto: what this machine computes in, but bfloat16 with --gpu."""
    from lowdft.pipeline.stages import plan

    found = []
    monkeypatch.setattr("lowdft.config.recipe.computes_bfloat16", lambda: False)
    monkeypatch.setattr(plan, "main", lambda run, **settings: found.append(run.recipe.model.dtype))
    for more in ([], ["--gpu", "24"]):
        assert main(["plan", recipe, "model.dtype=auto", *more]) == 0
    assert found == ["float32", "bfloat16"]


@pytest.fixture
def passes(monkeypatch) -> list:
    """(checkpointed, budget) of every timed pass; those numbered in `passes.fail` run out of memory."""

    class Seen(list):
        fail = range(0)

    seen, original = Seen(), Passes.backpropagate

    def backpropagate(self, model, *rest):
        seen.append((model.is_gradient_checkpointing, self.budget))
        if len(seen) in seen.fail:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, model, *rest)

    monkeypatch.setattr(Passes, "backpropagate", backpropagate)
    return seen


@pytest.mark.parametrize("on", [True, False])
def test_memory_the_probe_checkpoints_as_the_training_does(on, recipe, passes):
    assert main(["plan", recipe, "--probe", f"training.gradient_checkpointing={on}".lower()]) == 0
    assert [checkpointed for checkpointed, _ in passes] == [on, on]


def test_memory_the_probe_of_a_gpu_times_the_setting_that_fits_it(recipe, passes, capsys):
    """And nothing where none does, since it would run out of memory."""
    assert main(["plan", recipe, "--probe", "--gpu", "1", "training.gradient_checkpointing=true"]) == 0
    out = capsys.readouterr().out
    assert {checkpointed for checkpointed, _ in passes} == {False} and f"tokens_per_pass={passes[0][1]}" in out
    passes.clear()
    assert main(["plan", recipe, "--probe", "--gpu", "0.6"]) == 0
    assert not passes and "tokens/s" not in capsys.readouterr().out


def test_memory_a_probe_that_runs_out_of_it_takes_smaller_passes(recipe, passes, capsys):
    passes.fail = range(1, 2)
    assert main(["plan", recipe, "--probe", "training.tokens_per_pass=2000"]) == 0
    assert passes[1][1] < passes[0][1] and "tokens/s" in capsys.readouterr().out
    passes.fail = range(1000)
    assert main(["plan", recipe, "--probe"]) == 1
    assert "lowdft: out of memory in a pass of at most" in capsys.readouterr().err
