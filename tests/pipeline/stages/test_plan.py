"""What plan prints before anything is loaded."""

from __future__ import annotations

from helpers import folder

from lowdft.cli import main


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
