"""The trainer: gradients, log_u, visits, accumulation, evaluation, and the reference."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import GOLDEN, lora, losses, make_llama, make_rows, make_trainer

from lowdft import DFTConfig, DFTTrainer
from lowdft.data.batch import Batch
from lowdft.errors import UserError
from lowdft.logprobs import CompletionLogps, Group, score
from lowdft.training.metrics import Faded

CASES = json.loads((GOLDEN / "dft.json").read_text())


def golden_step_row(step: dict, m: int) -> dict:
    """One row of a golden step: its lengths and reference may differ from step to step."""
    count = len(step["logp_neg"][m])
    row = {
        "completion_ids": [count] * step["len_pos"][m],
        "negative_ids": [[j] * length for j, length in enumerate(step["len_neg"][m])],
    }
    return row if step["ref_logp_neg"] is None else row | {"ref_negative_logps": step["ref_logp_neg"][m]}


def golden_rows(case) -> list[dict]:
    """One row a prompt; a completion's token says which of its prompt's it is."""
    first = {i: golden_step_row(step, m) for step in reversed(case["steps"]) for m, i in enumerate(step["ids"])}
    some = next(iter(first.values()))
    return [{"prompt_ids": [i]} | first.get(i, some) for i in range(case["n_prompts"])]


@pytest.mark.parametrize("way", ["at once", "in pieces"])
@pytest.mark.parametrize("case", [c for k in ("hand_cases", "random_cases") for c in CASES[k]], ids=lambda c: c["name"])
def test_golden_gradients(case, way, tmp_path, monkeypatch):
    """The trainer's own step on the golden log-probabilities: value, log_u, and gradients within 1e-6."""
    rows = golden_rows(case)
    settings = {name: case[name] for name in ("tau", "gamma", "log_u_init")} | {"objective": case["variant"]}
    trainer = make_trainer(
        tmp_path,
        rows,
        negatives_per_step=len(rows[0]["negative_ids"]),
        num_train_epochs=1,
        tokens_per_pass=1 if way == "in pieces" else 8192,
        **settings,
    )
    for step in case["steps"]:
        index = torch.tensor(step["ids"])
        leaf = torch.tensor(
            [[*n, p] for n, p in zip(step["logp_neg"], step["logp_pos"], strict=True)], dtype=torch.float64
        ).requires_grad_()

        def lookup(model, groups, *_, ids=step["ids"], leaf=leaf, **__):
            found = [leaf[ids.index(g.prompt_ids[0]), c[0]] for g in groups for c in g.completions]
            return CompletionLogps(torch.empty(0), torch.stack(found), torch.empty(0), 0)

        monkeypatch.setattr("lowdft.training.token_budget.score", lookup)
        batch = Batch(index, [trainer.train_dataset[i] | golden_step_row(step, m) for m, i in enumerate(step["ids"])])
        trainer.engine.begin([batch])
        loss = trainer.training_step(trainer.model, {"batch": batch})
        wanted = torch.tensor(
            [[*n, p] for n, p in zip(step["grad_logp_neg"], step["grad_logp_pos"], strict=True)], dtype=torch.float64
        )
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-6, atol=1e-6)
        value = sum(step["monitor_objective_per_prompt"]) / len(index)
        assert loss.item() == pytest.approx(value, rel=1e-6, abs=1e-6)
        assert trainer.log_u[index].tolist() == pytest.approx(step["log_u_after"], rel=1e-6, abs=1e-6)


def test_first_step_by_hand(tmp_path):
    """At step 0 with a fresh adapter w = 1: the loss is the mean NLL of the completions, the gap 0, log_u stays 0."""
    trainer = make_trainer(tmp_path, max_steps=1, gradient_accumulation_steps=5)
    rows = trainer.train_dataset
    out = score(make_llama(), [Group(r["prompt_ids"], [r["completion_ids"]]) for r in rows])
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(-out.logps_C.mean().item(), rel=1e-5)
    assert entry["reference/gap"] < 1e-5
    assert entry["weights/mean"] == pytest.approx(1.0, abs=1e-5)
    assert trainer.log_u.abs().max() < 1e-5


@pytest.mark.parametrize("objective", ["dft", "dft2", "sft", "ift"])
def test_accumulation_changes_nothing(objective, tmp_path):
    """A step of 4 prompts is the same in one micro-batch, in two and in four: losses and log_u."""
    runs = [
        make_trainer(
            tmp_path / str(size),
            make_rows(8),
            objective=objective,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            data_seed=3,
        )
        for size in (4, 2, 1)
    ]
    for run in runs:
        run.train()
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=1e-4)
        torch.testing.assert_close(run.log_u, runs[0].log_u, rtol=1e-3, atol=1e-4)
    assert len(losses(runs[0])) == 4


def test_visits_are_counted_per_example(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(5))
    trainer.train()
    assert trainer.engine.log_u.visits.tolist() == [2] * 5


def test_evaluation_leaves_log_u_alone(tmp_path):
    trainer = make_trainer(tmp_path, eval_rows=make_rows(3, seed=9), log_u_init=0.25)
    before = (trainer.log_u.clone(), trainer.engine.log_u.visits.clone())
    metrics = trainer.evaluate()
    assert torch.equal(trainer.log_u, before[0]) and torch.equal(trainer.engine.log_u.visits, before[1])
    assert metrics["eval_loss"] > 0


@pytest.mark.parametrize("objective", ["dft", "ift"])
def test_gradient_checkpointing_updates_once_and_changes_nothing(objective, tmp_path):
    plain, checkpointed = (
        make_trainer(
            tmp_path / str(flag),
            objective=objective,
            gradient_checkpointing=flag,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        for flag in (False, True)
    )
    plain.train(), checkpointed.train()
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)
    torch.testing.assert_close(checkpointed.log_u, plain.log_u, rtol=1e-4, atol=1e-5)
    assert torch.equal(checkpointed.engine.log_u.visits, plain.engine.log_u.visits)


def test_a_frozen_half_stays_frozen_under_an_online_reference(tmp_path):
    """The adapter goes off and on in every step."""
    trainer = make_trainer(tmp_path, freeze_half=True, reference="online", max_steps=2)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("peft", [True, False])
def test_reference_is_that_of_the_initial_weights(peft, tmp_path):
    """Scored before the first step, and not touched by training: it equals a fresh copy of the model's scores."""
    trainer = make_trainer(tmp_path, peft=peft)
    trainer.train()
    fresh = make_llama()
    for row in trainer.train_dataset:
        wanted = score(fresh, [Group(row["prompt_ids"], row["negative_ids"])]).logps_C
        assert row["ref_negative_logps"] == pytest.approx(wanted.tolist(), abs=1e-3)


def test_online_and_precomputed_reference_agree(tmp_path):
    online, precomputed = (make_trainer(tmp_path / r, reference=r) for r in ("online", "precomputed"))
    online.train(), precomputed.train()
    assert losses(online) == pytest.approx(losses(precomputed), rel=1e-4)


def test_online_reference_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs an adapter to switch off"):
        make_trainer(tmp_path, peft=False, reference="online").train()


def test_online_reference_under_a_trained_adapter_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, reference="online")
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    with pytest.raises(UserError, match="already trained"):
        trainer.train()


def test_too_few_negatives_are_refused_with_the_row(tmp_path):
    """Fewer than one visit takes; every fault of every row is in the one message."""
    rows = make_rows(4)
    rows[2] = rows[2] | {"example_id": "short-one", "negative_ids": rows[2]["negative_ids"][:1]}
    rows[3] = rows[3] | {"example_id": "empty-one", "negative_ids": [[], [5]]}
    with pytest.raises(UserError, match=r"1 of 4 rows \(short-one\) have too few negatives \(the fewest: 1\)") as found:
        make_trainer(tmp_path, rows)
    assert "1 of 4 rows (empty-one) have an empty prompt, completion or negative" in str(found.value)


def test_rows_reuse_their_negatives_when_they_have_fewer_than_all_visits_take(tmp_path):
    """Three negatives, two visits of two: the second takes the third and the first again (Algorithm 1's finite set)."""
    rows = make_rows(4, negatives=3)
    with pytest.warns(UserWarning, match="4 of 4 rows have fewer than the 4 negatives"):
        trainer = make_trainer(tmp_path, rows)
    trainer.train()
    assert trainer.engine.log_u.visits.tolist() == [2] * 4
    second = Batch(torch.tensor([0]), [trainer.train_dataset[0]]).negatives([1], 2)
    assert second == [[rows[0]["negative_ids"][2], rows[0]["negative_ids"][0]]]


def test_rows_of_text(tmp_path, tokenizer):
    """Strings and message lists train through the tokenizer; the completion ends in one end token."""
    user, good, bad = "2+2?", "4", ["5", "22", "no", "hm"]
    rows = [
        {"prompt": user, "completion": good, "negatives": bad},
        {
            "prompt": [{"role": "user", "content": user}],
            "completion": [{"role": "assistant", "content": good}],
            "negatives": bad,
        },
    ]
    args = DFTConfig(output_dir=str(tmp_path), use_cpu=True, num_train_epochs=1, save_strategy="no", disable_tqdm=True)
    trainer = DFTTrainer(make_llama(len(tokenizer)), args, rows, processing_class=tokenizer, peft_config=lora())
    decoded = [tokenizer.decode(row["prompt_ids"] + row["completion_ids"]) for row in trainer.train_dataset]
    assert decoded == ["2+2?4<|im_end|>", "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"]
    trainer.train()
    assert len(losses(trainer)) == 1


def test_training_separates(tmp_path):
    """It learns: on its own rows completions gain more than 3 nats, and the margin over negatives more than 3."""
    rows = make_rows(negatives=12)
    trainer = make_trainer(tmp_path, rows, peft=False, eval_rows=rows, num_train_epochs=6, learning_rate=3e-3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_logps/positive"] > before["eval_logps/positive"] + 3
    assert after["eval_margin"] > before["eval_margin"] + 3


def test_faded_negatives_are_told_in_words():
    faded = Faded()
    for _ in range(4):
        faded.see(1e-3)
    with pytest.warns(UserWarning, match="Training now costs more than SFT for the same result"):
        faded.see(1e-3)


def test_half_of_every_type_is_frozen(tmp_path):
    """Of two layers' modules of each type one is trained, and only that one moves; another seed, another half."""
    trainer = make_trainer(tmp_path / "a", freeze_half=True, warmup_steps=0)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trainable) == len([n for n in start if "lora_" in n]) // 2
    for kind in ("q_proj", "down_proj"):
        assert len({name.split(".layers.")[1][0] for name in trainable if kind in name}) == 1
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved <= trainable and any("lora_B" in name for name in moved)
    other = make_trainer(tmp_path / "b", freeze_half=True, seed=7)
    assert {name for name, p in other.model.named_parameters() if p.requires_grad} != trainable
