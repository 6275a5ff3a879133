"""Every objective through the trainer: each learns, each with what it needs, and is refused in words without it."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama, make_rows
from test_trainer import losses, make_trainer

from lowdft import objectives
from lowdft.errors import UserError
from lowdft.logps import Group, score


def test_sft_is_transformers_own_loss(tmp_path):
    """The first step's loss equals transformers' cross-entropy over the step's completion tokens."""
    trainer = make_trainer(tmp_path, objective="sft", max_steps=1, gradient_accumulation_steps=5)
    model, rows = make_llama(), trainer.train_dataset.rows
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
        groups = [Group(row["prompt_ids"], [row["completion_ids"]]) for row in trainer.train_dataset.rows]
        with torch.no_grad():
            return -score(trainer.model, groups).logps_C.mean().item()

    before = loss()
    trainer.train()
    after = loss()
    assert torch.tensor(losses(trainer)).isfinite().all()
    assert after < before


def test_full_parameters_with_a_completion_reference(tmp_path):
    """Without an adapter the initial weights score completions too, once: at the first step DPO's loss is log 2."""
    trainer = make_trainer(tmp_path, objective="dpo", peft=False, max_steps=2, learning_rate=1e-3)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)


def test_objective_needs_are_checked(tmp_path):
    with pytest.raises(UserError, match="aligned_logps"):
        make_trainer(tmp_path, objective="poft")
    with pytest.raises(ValueError, match="2 or more"):
        make_trainer(tmp_path, objective="kto", per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="reference_prompt"):
        make_trainer(tmp_path, objective="dpo", reference_prompt="sampling")
