"""Every objective through the trainer: each learns, each with what it needs, and is refused in words without it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import losses, make_llama, make_rows, make_tokenizer, make_trainer

from lowdft import DFTConfig, DFTTrainer, objectives
from lowdft.errors import UserError
from lowdft.logprobs import Group, score


def test_sft_is_transformers_own_loss(tmp_path):
    """The first step's loss equals transformers' cross-entropy over the step's completion tokens."""
    trainer = make_trainer(tmp_path, objective="sft", max_steps=1, gradient_accumulation_steps=5)
    model, rows = make_llama(), trainer.train_dataset
    total = tokens = 0.0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        labels = torch.tensor([[-100] * len(row["prompt_ids"]) + row["completion_ids"]])
        total += model(ids, labels=labels).loss.item() * len(row["completion_ids"])
        tokens += len(row["completion_ids"])
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("name", objectives.names())
def test_every_objective_trains(name, tmp_path):
    """Each name learns on a tiny model: its loss falls on the rows trained on. (That of dynamic_ft, the sum of
    -p log p, first rises as p does; there completions must become likelier.)"""
    rows = [row | {"aligned_logps": -1.0} for row in make_rows(8)]
    trainer = make_trainer(
        tmp_path,
        rows,
        objective=name,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        num_train_epochs=2,
        learning_rate=2e-2,
        warmup_steps=0,
        lr_scheduler_type="constant",
    )

    def loss() -> float:
        if name != "dynamic_ft":
            return trainer.evaluate(trainer.train_dataset)["eval_loss"]
        groups = [Group(row["prompt_ids"], [row["completion_ids"]]) for row in trainer.train_dataset]
        with torch.no_grad():
            return -score(trainer.model, groups).logps_C.mean().item()

    before = loss()
    trainer.train()
    after = loss()
    weighted = objectives.get(name).token_weight is not None  # such a sum of log-probabilities has a name of its own
    assert ("logps/positive_weighted" if weighted else "logps/positive") in trainer.state.log_history[0]
    assert torch.tensor(losses(trainer)).isfinite().all()
    assert after < before


def test_full_parameters_with_a_completion_reference(tmp_path):
    """Without an adapter the initial weights score completions too, once: at the first step DPO's loss is log 2."""
    trainer = make_trainer(tmp_path, objective="dpo", peft=False, max_steps=2, learning_rate=1e-3)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)


def test_full_parameters_with_mismatched_pairs(tmp_path):
    """KTO's reference of other rows' completions is scored by the initial weights, before the first step."""
    settings = dict(objective="kto", max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4)
    full = make_trainer(tmp_path / "full", peft=False, **settings)
    full.train()
    fresh = make_llama().eval()
    for i, row in enumerate(full.train_dataset):
        other = full.train_dataset[(i + 1) % 10]["completion_ids"]
        wanted = score(fresh, [Group(row["prompt_ids"], [other])]).logps_C.item()
        assert row["ref_mismatched_logps"] == pytest.approx(wanted, abs=1e-3)
    gains = [line["reference/mismatched_gain"] for line in full.state.log_history if "loss" in line]
    assert losses(full)[0] == pytest.approx(2 / 3, abs=1e-4)  # (2 * 1/2 + 2 * 1/2) / (1 + 2), where z = 0
    assert abs(gains[0]) < 1e-4 < abs(gains[2])


BARE = [{key: row[key] for key in ("prompt_ids", "completion_ids")} for row in make_rows()]
UNMET = {
    "negatives": (BARE, {}, "too few negatives"),
    "aligned": (None, {}, "aligned_logps"),
    "mismatched": (None, {"per_device_train_batch_size": 1}, "2 or more"),
    "reference": (None, {"reference": "online"}, "needs an adapter to switch off"),
    "completion_reference": (None, {"reference_prompt": "sampling"}, "reference_prompt"),
}  # rows, settings and words; log_u and predictions are always at hand


@pytest.mark.parametrize(
    "name, need",
    [(name, need) for name in objectives.names() for need in sorted(objectives.get(name).needs & set(UNMET))],
)
def test_unmet_needs_are_refused_before_the_model_loads(name, need, tmp_path, monkeypatch):
    """Every need of every objective, with a model given by name that must not be loaded."""
    never = SimpleNamespace(from_pretrained=lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("lowdft.models.adapters.AutoModelForCausalLM", never)
    rows, settings, words = UNMET[need]
    rows = rows or [row | {"aligned_logps": -1.0} if need != "aligned" else row for row in make_rows()]
    with pytest.raises((UserError, ValueError), match=words):
        args = DFTConfig(output_dir=str(tmp_path), objective=name, use_cpu=True, **({"num_train_epochs": 2} | settings))
        DFTTrainer("some/name", args, rows, processing_class=make_tokenizer())


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(objective="sft", freeze_half=True), "freezes half of an adapter"),
        (dict(objective="dft", reference="online"), "needs an adapter to switch off"),
        (dict(objective="dft", reference="online", reference_prompt="proposal"), "proposal is scored before training"),
        (dict(objective="dft", reference_prompt="proposal"), "requires rows with ref_negative_logps"),
    ],
)
def test_what_full_parameters_cannot_have_is_told(settings, words, tmp_path):
    with pytest.raises((UserError, ValueError), match=words):
        make_trainer(tmp_path, peft=False, **settings)


@pytest.mark.parametrize("settings", [dict(reference="online"), dict(reference_prompt="proposal")])
def test_held_out_rows_must_bring_what_training_rows_bring(settings, tmp_path):
    """A reference that cannot be scored in training cannot be scored for the held-out rows either."""
    scored = [row | {"ref_negative_logps": [-5.0] * 4} for row in make_rows()]
    make_trainer(tmp_path / "a", scored, peft=False, eval_rows=scored[:2], **settings)
    with pytest.raises(UserError, match="needs an adapter|requires rows"):
        make_trainer(tmp_path / "b", scored, peft=False, eval_rows=make_rows(2), **settings)


@pytest.mark.parametrize(
    "name, values, words",
    [
        ("f_sft", {"divergence": "kl"}, "wanted total_variation"),
        ("robust_dpo", {"label_smoothing": 0.5}, "robust_dpo"),
        ("dpo", {"beta": "5e-5"}, "dpo cannot be computed with"),
        ("ift", {"decay": "high"}, "ift cannot be computed with"),
        ("simpo", {"bta": 1.0}, "hyper-parameters of simpo"),
        ("dft", {"gamma": 0.9}, "gamma are training.tau and training.gamma"),
    ],
)
def test_bad_hyperparameters_are_refused(name, values, words, tmp_path):
    """When the settings are made: 5e-5 is text in YAML 1.1, and 0.5 divides by zero."""
    with pytest.raises(ValueError, match=words):
        DFTConfig(output_dir=str(tmp_path), objective=name, objective_args=values, use_cpu=True)


def test_pairs_may_be_seen_again(tmp_path):
    """One negative per row and three epochs: Algorithm 1 samples from a finite set, and says that rows reuse theirs."""
    rows = [row | {"negative_ids": row["negative_ids"][:1]} for row in make_rows(4)]
    settings = dict(negatives_per_step=1, num_train_epochs=3)
    make_trainer(tmp_path / "dpo", rows, objective="dpo", **settings)
    with pytest.warns(UserWarning, match="4 .*rows"):
        trainer = make_trainer(tmp_path / "dft", rows, objective="dft", **settings)
    trainer.train()
    assert trainer.engine.log_u.visits.tolist() == [3] * 4


def test_held_out_rows_keep_the_initial_reference_without_an_adapter(tmp_path):
    """With full parameters no base is left after the first step: DPO's loss on held-out rows must leave log 2."""
    trainer = make_trainer(tmp_path, peft=False, objective="dpo", eval_rows=make_rows(4, seed=5), learning_rate=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    trainer.train()
    assert abs(trainer.evaluate()["eval_loss"] - 0.6931) > 1e-3
