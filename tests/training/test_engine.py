"""The step engine: any loop may drive it; what is not finite stops a step; the budget's place in a resume."""

from __future__ import annotations

import pytest
import torch
from helpers import losses, make_llama, make_rows, make_trainer
from transformers import TrainerCallback

from lowdft import objectives
from lowdft.cli import main
from lowdft.data.batch import collate
from lowdft.errors import UserError
from lowdft.training import finite
from lowdft.training.engine import StepEngine
from lowdft.training.log_u import LogU
from lowdft.training.token_budget import Passes


def make_engine(model, rows, objective="dft2", **settings) -> StepEngine:
    passes = Passes("packed", 64, settings.pop("tokens_per_pass", 8192))
    found = objectives.get(objective)
    return StepEngine(model, found, dict(found.defaults), LogU(len(rows)), passes, negatives_per_step=2)


def batch_of(rows, numbers):
    return collate([(i, rows[i]) for i in numbers])["batch"]


def test_a_plain_loop_trains_as_the_trainer_does(tmp_path):
    """Two steps of two micro-batches, by hand: the trainer's losses, log_u and weights."""
    rows, taken = make_rows(8), []
    settings = dict(objective="dft2", peft=False, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1e9)
    trainer = make_trainer(tmp_path, rows, num_train_epochs=1, weight_decay=0.0, learning_rate=1e-3, **settings)

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, train_dataloader=None, **kwargs):
            step = trainer.training_step
            trainer.training_step = lambda model, inputs, *rest: (
                taken.append(inputs["batch"].index_M.tolist()) or step(model, inputs, *rest)
            )

    trainer.add_callback(Watch())
    trainer.train()
    model = make_llama().train()
    engine = make_engine(model, rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    found = []
    for step in range(2):
        batches = [batch_of(rows, numbers) for numbers in taken[2 * step : 2 * step + 2]]
        assert engine.begin(batches, step + 1) == 4
        found.append(sum(engine.accumulate(batch).item() for batch in batches))
        optimizer.step()
        optimizer.zero_grad()
    assert found == pytest.approx(losses(trainer), rel=1e-5)
    torch.testing.assert_close(engine.log_u.values, trainer.log_u, rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_13_evaluation_keeps_to_the_budget():
    """It sees the loss of one pass, in passes of at most 16 tokens or one completion; and leaves the table alone."""
    rows, model, seen = make_rows(4), make_llama().eval(), []
    whole = make_engine(model, rows).evaluate(batch_of(rows, range(4)))
    engine = make_engine(model, rows, tokens_per_pass=16)
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    assert engine.evaluate(batch_of(rows, range(4))).item() == pytest.approx(whole.item(), rel=1e-5)
    assert len(seen) > 4 and max(seen) <= 16
    assert not engine.log_u.visits.any() and not engine.log_u.values.any()


def test_evaluation_out_of_memory_is_tried_again(monkeypatch):
    from lowdft.training import token_budget

    rows, calls, score = make_rows(4), [], token_budget.score
    engine = make_engine(make_llama().eval(), rows)
    whole = engine.evaluate(batch_of(rows, range(4)))

    def once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("simulated")
        return score(*args)

    monkeypatch.setattr("lowdft.training.token_budget.score", once)
    with pytest.warns(UserWarning, match="a pass takes at most"):
        again = engine.evaluate(batch_of(rows, range(4)))
    assert again.item() == pytest.approx(whole.item(), rel=1e-5) and engine.passes.budget < 8192


@pytest.mark.parametrize(
    "setting, budget", [(8192, 100), (500, 500)], ids=["the same setting: as it had become", "another: as it says"]
)
def test_9_an_explicit_budget_wins_over_a_stored_one(setting, budget):
    rows = make_rows(2)
    before, after = make_engine(None, rows), make_engine(None, rows, tokens_per_pass=setting)
    before.passes.budget = 100
    before.log_u.values[1] = -3.0
    after.load_state_dict(before.state_dict())
    assert after.passes.budget == budget and after.log_u.values.tolist() == [0.0, -3.0]


# ---- numbers that are not finite ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_1_a_step_that_is_not_finite_is_not_taken(tmp_path):
    """A learning rate of 1e5: it stops with the step and its rows; no checkpoint, table or weight is touched by it.

    Either a number overflows, or a norm divides by an infinite variance and no gradient is left, as the CPU has it.
    """
    rows = [row | {"example_id": f"row-{i}"} for i, row in enumerate(make_rows(4))]
    settings = dict(learning_rate=1e5, warmup_steps=0, save_strategy="steps", save_steps=1, num_train_epochs=4)
    trainer = make_trainer(tmp_path, rows, **(settings | {"negatives_per_step": 1}))
    with pytest.raises(UserError, match=r"step \d: the (log-probabilities|losses|gradient).*row-\d") as found:
        trainer.train()
    assert "learning_rate" in str(found.value)
    step = int(str(found.value).split("step ")[1][0])
    assert trainer.state.global_step == step - 1
    assert trainer.log_u.isfinite().all() and torch.tensor(losses(trainer)).isfinite().all()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in range(1, step)}


def test_1_only_a_zero_gradient_that_should_not_be_one_stops(tmp_path):
    """Weights that pass no gradient on stop the training; certain completions and losses without a slope do not."""
    trainer = make_trainer(tmp_path, make_rows(4), objective="sft", max_steps=1)
    norms = [m for name, m in trainer.model.named_modules() if name.endswith("norm")]
    norms[-1].register_forward_hook(lambda module, args, hidden: 0 * hidden)  # as when its variance is infinite
    with pytest.raises(UserError, match=r"step 1: the gradient is zero, although .* \(example_id .*learning_rate"):
        trainer.train()
    logps_MK = torch.tensor([[-5.0, -1e-6]], dtype=torch.float64)
    assert finite.acts(logps_MK, lambda logps_MK: -logps_MK.sum())
    assert not finite.acts(logps_MK, lambda logps_MK: -logps_MK[:, 1].sum() + 0 * logps_MK[:, 0].sum())


def test_1_a_gradient_that_is_not_finite_stops(tmp_path):
    """Finite losses, an infinite gradient: weights stay as they were."""
    trainer = make_trainer(tmp_path, make_rows(4))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(UserError, match="step 1: the gradient's norm is (nan|inf)"):
        trainer.train()
    for a, b in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_1_reference_scores_that_are_not_finite_stop(value, tmp_path):
    rows = [row | {"example_id": f"row-{i}", "ref_negative_logps": [-5.0] * 4} for i, row in enumerate(make_rows(4))]
    rows[2]["ref_negative_logps"] = [value, -1.0, -1.0, -1.0]
    with pytest.raises(UserError, match=r"step 1: the reference's .* \(example_id row-2; the largest"):
        make_trainer(tmp_path, rows).train()


def test_1_evaluation_that_is_not_finite_stops(tmp_path):
    trainer = make_trainer(tmp_path, eval_rows=make_rows(3))
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(UserError, match="are not finite"):
        trainer.evaluate()


@pytest.mark.filterwarnings("ignore")
def test_1_a_command_that_is_not_finite_fails(recipe, tmp_path, capsys):
    """Exit status 1 and a sentence; no adapter is written, and what follows training does not run."""
    assert main(["run", recipe, "training.learning_rate=1e30", "training.warmup_steps=0"]) == 1
    err = capsys.readouterr().err
    assert "finite" in err and "example_id" in err and "Traceback" not in err
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "evaluation.json").exists()


# ---- what else sees the model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_8_a_callback_may_run_the_model(checkpointing, tmp_path):
    """In the midst of a step and after it, while training is packed."""
    found = []

    class Look(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                found.append(model(torch.arange(3, 20)[None]).logits.isfinite().all().item())

        on_step_end = on_substep_end

    trainer = make_trainer(tmp_path, make_rows(8), max_steps=2, gradient_checkpointing=checkpointing)
    trainer.add_callback(Look())
    trainer.train()
    assert trainer.layout == "packed" and found == [True] * 4


def test_each_evaluation_has_metrics_of_its_own(tmp_path):
    """Another prefix, other rows; several sets by name; and rows of ids handed to evaluate()."""
    a, b = make_rows(3, seed=5), make_rows(4, seed=6)
    trainer = make_trainer(tmp_path, eval_rows={"a": a, "b": b}, objective="sft")
    every = trainer.evaluate()
    alone = trainer.evaluate(b, metric_key_prefix="test")
    assert every["eval_a_logps/positive"] != pytest.approx(every["eval_b_logps/positive"])
    assert alone["test_logps/positive"] == pytest.approx(every["eval_b_logps/positive"])
    assert alone["test_loss"] == pytest.approx(every["eval_b_loss"]) and "eval_loss" not in alone


def test_new_rows_need_a_reference_that_is_still_there(tmp_path):
    """Full parameters: before the first step the model is its own reference; after it, it is not."""
    trainer = make_trainer(tmp_path, peft=False, objective="dpo", max_steps=1)
    assert trainer.evaluate(make_rows(2, seed=3))["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    trainer.train()
    with pytest.raises(UserError, match="no longer there to score them"):
        trainer.evaluate(make_rows(2, seed=3))
