"""Settings of transformers' training loop that cannot work are refused by their key, before a model is loaded."""

from __future__ import annotations

import json
import re

import pytest
from helpers import folder, lora, make_rows, make_trainer

from lowdft import DFTConfig, DFTTrainer, objectives
from lowdft.cli import main
from lowdft.errors import UserError
from lowdft.pipeline.context import Run
from lowdft.training.metrics import names_in_evaluation

BEST = ["training.eval_strategy=epoch", "training.save_strategy=best"]
OF_THE_MACHINE = ("runtime", "per_second", "memory_gb", "reserved_gb", "preparation_time", "epoch")


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            ["training.metric_for_best_model=los"],
            "metric_for_best_model is 'los'; wanted a number that evaluation",
        ),
        ([*BEST, "training.metric_for_best_model=accuracy"], "Known are: loss, surrogate, logps/positive"),
        (BEST, "training.metric_for_best_model is None; wanted a number that evaluation logs"),
        (["training.save_strategy=best"], "training.save_strategy is best, but training.eval_strategy is no"),
        (
            ["training.load_best_model_at_end=true", "training.eval_strategy=epoch"],
            "eval_strategy is epoch and save_strategy is steps; set both to steps or both to epoch",
        ),
        (
            ["training.load_best_model_at_end=true", "training.save_strategy=no"],
            "training.load_best_model_at_end is true, but training.eval_strategy is no",
        ),
        (["training.report_to=tensorbord"], "training.report_to is 'tensorbord', .* Did you mean 'tensorboard'"),
        (["training.report_to=[none,dvclive]"], "training.report_to is 'none'"),
        (["training.report_to=dvclive"], "training.report_to has dvclive, whose package is not installed"),
        (["training.optim=galore_adamw"], "training.optim is galore_adamw, which cannot be made .*galore_torch"),
        (["training.optim_args=foo"], "training.optim is .*check optim, optim_args"),
        (["training.adam_beta1=2"], "Invalid beta parameter at index 0: 2.*adam_beta1"),
        (["training.lr_scheduler_type=cosine_with_min_lr"], "min_lr_rate should be set.*check it and lr_scheduler_kw"),
        (["training.lr_scheduler_kwargs={foo: 1}"], "unexpected keyword argument 'foo'.*lr_scheduler_kwargs"),
        (["training.lr_scheduler_type=cosin"], "training.lr_scheduler_type is 'cosin'. Did you mean 'cosine'"),
        (["training.save_strategy=bets"], "training.save_strategy is 'bets'. Did you mean 'best'"),
        (["training.log_level=loud"], "training.log_level is 'loud'. Known are: detail, debug"),
        (
            ["training.dataloader_num_workers=-1"],
            "training.dataloader_num_workers is -1; wanted a whole number of 0 or more",
        ),
        (["training.max_steps=2.5"], "training.max_steps is 2.5; wanted int"),
        (["training.weight_decay=little"], "training.weight_decay is 'little'; wanted float"),
        (["training.learning_rate=true"], "training.learning_rate is True; wanted float"),
        (["training.accelerator_config={a: 1}"], "training: .*AcceleratorConfig.*unexpected keyword argument 'a'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_recipe_is_refused_before_a_model_is_loaded(settings, words, recipe, capsys, monkeypatch):
    monkeypatch.setattr(Run, "base", lambda self: pytest.fail("a model was loaded"))
    assert main(["run", recipe, "training.objective=sft", *settings]) == 1
    error = capsys.readouterr().err
    assert re.search(words, error) and "Traceback" not in error


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(report_to="wandbb"), "training.report_to is 'wandbb', .* Did you mean 'wandb'"),
        (dict(report_to=["dvclive"]), "training.report_to has dvclive, whose package is not installed"),
        (dict(adam_epsilon=-1.0), "training.optim is .*Invalid epsilon value"),
        (
            dict(save_strategy="best", eval_strategy="steps", metric_for_best_model="marginn"),
            "Did you mean .[ab]_margin",
        ),
        (
            dict(save_strategy="steps", eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True),
            "metric_for_best_model is 'loss'.*objective dft.*Did you mean '[ab]_loss'",  # each set has its own
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_trainer_refuses_them_before_it_loads_a_model(settings, words, tmp_path):
    """A model given by a name that does not exist shows the order."""
    rows = make_rows(4)
    args = DFTConfig(str(tmp_path), **({"use_cpu": True, "disable_tqdm": True, "report_to": "none"} | settings))
    with pytest.raises(UserError, match=words):
        DFTTrainer("no/such-model", args, rows, {"a": rows, "b": rows}, peft_config=lora())


@pytest.mark.parametrize("name", ["sft", "dft", "listwise", "dpo", "kto", "ift"])
def test_the_numbers_that_can_choose_a_checkpoint_are_those_that_are_logged(name, tmp_path):
    trainer = make_trainer(tmp_path, make_rows(4), eval_rows=make_rows(3, seed=1), objective=name)
    logged = {key.removeprefix("eval_") for key in trainer.evaluate() if not key.endswith(OF_THE_MACHINE)}
    assert set(names_in_evaluation(objectives.get(name), trainer.args.hyperparameters())) == logged


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    """Chosen by a number of one of two sets: the highest margin among the evaluations."""
    rows = {"a": make_rows(3, seed=1), "b": make_rows(3, seed=2)}
    settings = dict(eval_strategy="steps", eval_steps=1, save_strategy="best", load_best_model_at_end=True, max_steps=3)
    trainer = make_trainer(tmp_path, eval_rows=rows, metric_for_best_model="b_margin", learning_rate=0.5, **settings)
    trainer.args.greater_is_better = True
    trainer.train()
    found = {line["step"]: line["eval_b_margin"] for line in trainer.state.log_history if "eval_b_margin" in line}
    assert len(found) == 3 and trainer.state.best_global_step == max(found, key=found.get)
    assert trainer.evaluate()["eval_b_margin"] == pytest.approx(max(found.values()), rel=1e-4)
    assert (tmp_path / f"checkpoint-{trainer.state.best_global_step}").is_dir()


def test_a_trained_model_needs_no_package_of_its_training(recipe):
    """It may be evaluated on another machine than that on which its progress was reported."""
    assert main(["run", recipe, "training.objective=sft", "training.max_steps=1"]) == 0
    (folder(recipe) / "evaluation.json").unlink()
    again = ["training.objective=sft", "training.max_steps=1", "training.report_to=dvclive"]
    assert main(["evaluate", recipe, *again]) == 0
    assert json.loads((folder(recipe) / "evaluation.json").read_text())["rows"] == 3


def test_held_out_rows_without_negatives_are_told_before_a_model_is_loaded(recipe, capsys, monkeypatch):
    monkeypatch.setattr(Run, "base", lambda self: pytest.fail("a model was loaded"))
    assert main(["train", recipe, "training.objective=sft", "training.eval_strategy=epoch"]) == 1
    assert "heldout_negatives.parquet is missing; run `lowdft generate RECIPE` first" in capsys.readouterr().err
