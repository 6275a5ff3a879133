"""What was tried at the edges through `DFTTrainer` alone; a case's id begins with the defect it stands for.

Numbers are those of the list of defects seen in an earlier version ("small": its unnumbered ones, "memory": those of
memory and scale). Cases elsewhere have theirs in their names (`pytest -k test_12_`) or, in logprobs/test_check (5, 14),
in their ids. Through the command line: pipeline/test_edges. 17 is an option that was left off
(docs/what-did-not-work.md), 22 a part of pipeline/stages/test_export.
"""

from __future__ import annotations

import datasets
import numpy as np
import pandas
import pytest
import torch
from helpers import lora, losses, make_llama, make_rows, make_tokenizer, make_trainer

from lowdft import DFTConfig, DFTTrainer
from lowdft.errors import UserError

ASKED, SAID, WRONG = ({"role": r, "content": c} for r, c in (("user", "1+1?"), ("assistant", "2"), ("assistant", "3")))
CHAT = ("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", "2<|im_end|>")
IDS = make_rows(4)
END = "<|im_end|>"


def trainer_of(folder, rows, objective="sft", model=None, evaluation=None, **settings) -> DFTTrainer:
    """A trainer of rows as a user has them, with a tokenizer of bytes."""
    defaults = dict(negatives_per_step=1, num_train_epochs=1, per_device_train_batch_size=2, save_strategy="no")
    args = DFTConfig(
        str(folder), objective=objective, use_cpu=True, disable_tqdm=True, report_to="none", **(defaults | settings)
    )
    model = model or make_llama(300)
    return DFTTrainer(model, args, rows, evaluation, processing_class=make_tokenizer(), peft_config=lora())


@pytest.mark.parametrize(
    "row, wanted, negatives",
    [
        ({"messages": [ASKED, SAID]}, CHAT, []),
        ({"messages": [ASKED, SAID], "negatives": ["3", "5"]}, CHAT, ["3", "5"]),
        ({"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}, CHAT, []),
        ({"prompt": [ASKED], "completion": [SAID], "negatives": [[WRONG]]}, CHAT, ["3"]),
        ({"prompt": "1+1?", "completion": [SAID]}, CHAT, []),
        ({"chosen": [ASKED, SAID], "rejected": [ASKED, WRONG]}, CHAT, ["3"]),
        ({"prompt": [ASKED], "chosen": [SAID], "rejected": [WRONG]}, CHAT, ["3"]),
        ({"prompt": "1+1?", "chosen": "2", "rejected": "3"}, ("1+1?", "2" + END), ["3"]),
        ({"prompt": "1+1?", "completion": "2", "rejected": "3"}, ("1+1?", "2" + END), ["3"]),
        ({"chosen": "1+1? 2", "rejected": "1+1? 3"}, ("1+1?", " 2" + END), [" 3"]),  # TRL's implicit prompt
        ({"chosen": "A:\nyes", "rejected": "A:\nyet"}, ("A:\n", "yes" + END), ["yet"]),
        ({"prompt": "1+1?", "completion": "2", "example_id": 7}, ("1+1?", "2" + END), []),
    ],
    ids=lambda value: "small: " + "+".join(value) if isinstance(value, dict) else "",
)
def test_rows_as_users_of_trl_have_them(row, wanted, negatives, tmp_path):
    rows = trainer_of(tmp_path, [row, row]).train_dataset
    decode, first = make_tokenizer().decode, rows[0]
    assert (decode(first["prompt_ids"]), decode(first["completion_ids"])) == wanted
    assert [decode(ids) for ids in first["negative_ids"]] == [text + END for text in negatives]
    assert first["example_id"] == str(row.get("example_id", 0))


@pytest.mark.parametrize(
    "rows",
    [
        datasets.Dataset.from_list(IDS).with_format("torch"),
        datasets.Dataset.from_list(IDS).with_format("numpy"),
        datasets.Dataset.from_list(IDS).with_format("pandas"),
        datasets.Dataset.from_list(IDS).with_format("arrow"),
        datasets.Dataset.from_list(IDS).to_iterable_dataset(),
        type("Rows", (torch.utils.data.Dataset,), {"__len__": lambda self: 4, "__getitem__": lambda self, i: IDS[i]})(),
        pandas.DataFrame(IDS),
        [{k: torch.tensor(v) if k != "negative_ids" else list(map(np.array, v)) for k, v in r.items()} for r in IDS],
        [row | {"example_id": i} for i, row in enumerate(IDS)],
    ],
    ids=[
        f"small: {kind}"
        for kind in (
            "torch",
            "numpy",
            "pandas",
            "arrow",
            "stream",
            "torch dataset",
            "table",
            "tensors",
            "integer example_id",
        )
    ],
)
def test_rows_of_ids_in_any_format(rows, tmp_path):
    """They become the very rows that plain lists are."""
    found = make_trainer(tmp_path / "b", rows, num_train_epochs=1).train_dataset
    assert [*found] == [{"example_id": str(i), **row} for i, row in enumerate(IDS)]


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"text": "a b"}], "text is plain text"),
        ([{"prompt": "a", "completion": ""}], "completion is empty; an answer needs at least one token"),
        ([{"prompt": None, "completion": "b"}], "prompt is null; text is needed"),
        ([{"prompt": "a", "completion": 5}], "completion is a number"),
        (["a"], "is a string .a.; wanted a dictionary of columns"),
        ([{"prompt_ids": [4], "completion_ids": [5, -100]}], "completion_ids is a list.*token ids"),
        ([{"prompt_ids": [4]}], "completion_ids is missing"),
        ([{"prompt_ids": [4], "completion_ids": [5, 300]}], "token id 300, but the model has embeddings for 0 to 299"),
        ([IDS[0] | {"ref_negative_logps": [-1.0]}], "ref_negative_logps is a list.*4 numbers, one per negative"),
        ({"train": IDS}, r"train_dataset is a dict of train; .*train_dataset\['train'\]"),
        (None, "train_dataset is null"),
        ("rows.parquet", "train_dataset is a string .rows.parquet.; wanted a data set"),
    ],
    ids=["small: " + s for s in "text empty null number string id-below missing id-above logps dict none name".split()],
)
def test_rows_that_cannot_be_trained_on_are_named(rows, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        trainer_of(tmp_path, rows)
    assert "skip-invalid" not in str(error.value) and "data.columns" not in str(error.value)


def test_small_all_row_errors_in_one_go(tmp_path):
    """Of training rows and of every set for evaluation, those of too few negatives included."""
    rows = [{"prompt": "a", "completion": "b", "negatives": ["c"]}, {"prompt": "a", "completion": "b"}]
    bad = [{"prompt": "a", "completion": " "}, {"prompt": 5, "completion": "b"}]
    with pytest.raises(UserError) as error:
        trainer_of(tmp_path, [*rows, *bad], "dft", evaluation={"a": rows, "b": [*rows[:1], bad[0]]})
    lines = str(error.value).splitlines()
    for where in ("train_dataset[2]", "train_dataset[3]", "eval_dataset['b'][1]"):
        assert any(line.startswith(where) for line in lines)
    assert "1 of 2 rows (1) have too few negatives" in lines[-1]


def test_small_evaluation_sets_by_name_raw_rows_and_prefixes(tmp_path):
    """`evaluate(rows)` takes what the trainer takes; another prefix has metrics of its own alone."""
    a, b = ([{"prompt": "1+1?", "chosen": good, "rejected": "9"}] * 2 for good in ("2", "three"))
    trainer = trainer_of(tmp_path, a, "dpo", evaluation={"a": a, "b": b}, eval_strategy="epoch")
    trainer.train()
    named = [line for line in trainer.state.log_history if "eval_b_logps/positive" in line]
    test = trainer.evaluate(datasets.Dataset.from_list(b).with_format("torch"), metric_key_prefix="test")
    again = trainer.evaluate()
    assert test["test_logps/positive"] == pytest.approx(named[-1]["eval_b_logps/positive"], rel=1e-5)
    assert again["eval_a_margin"] != pytest.approx(again["eval_b_margin"])
    assert not any(key.startswith("test") for key in again)
    with pytest.raises(UserError, match=r"evaluate\('c'\): there is no such evaluation set \(known: a, b\)"):
        trainer.evaluate("c")
    with pytest.raises(UserError, match="does not support predict"):
        trainer.predict(b)


# ---- 11: resume with other rows -------------------------------------------------------------------------------------

EVERY_STEP = dict(save_strategy="steps", save_steps=1, max_steps=2)


def test_11_resume_with_another_evaluation_set(tmp_path):
    """Each row gets its own reference: those at hand are found by content, new ones scored by the base."""
    old, new = make_rows(3, seed=5), make_rows(4, seed=6)
    make_trainer(tmp_path / "a", eval_rows=old, **(EVERY_STEP | {"max_steps": 1})).train()
    resumed = make_trainer(tmp_path / "a", eval_rows=[new[0], *old[::-1], *new[1:]], **EVERY_STEP)
    resumed.train(resume_from_checkpoint=True)
    fresh = make_trainer(tmp_path / "b", eval_rows=resumed.eval_dataset, **(EVERY_STEP | {"save_strategy": "no"}))
    fresh.train()
    for found, wanted in ((resumed.eval_dataset, fresh.eval_dataset), (resumed.train_dataset, fresh.train_dataset)):
        for a, b in zip(found, wanted, strict=True):
            assert a["ref_negative_logps"] == pytest.approx(b["ref_negative_logps"], abs=1e-4)
    assert losses(resumed)[-1] == pytest.approx(losses(fresh)[-1], rel=1e-5)


def test_11_full_parameters_cannot_score_new_rows(tmp_path):
    old = make_rows(3, seed=5)
    full = dict(peft=False, **EVERY_STEP)
    make_trainer(tmp_path, eval_rows=old, **(full | {"max_steps": 1})).train()
    make_trainer(tmp_path, eval_rows=old[:2], **full).train(resume_from_checkpoint=True)  # fewer rows are all known
    more = make_trainer(tmp_path, eval_rows=make_rows(2, seed=6), **(full | {"max_steps": 3}))
    with pytest.raises(UserError, match=r"2 rows \(example_id 0, 1\) are new to this run.*train from the start"):
        more.train(resume_from_checkpoint=True)


def test_9_settings_win_over_those_stored_in_a_checkpoint(tmp_path):
    """Of saving, logging, evaluation and passes; transformers alone keeps to the checkpoint's steps."""
    rows = make_rows(2, seed=5)
    make_trainer(tmp_path, eval_rows=rows, save_strategy="steps", save_steps=1, max_steps=1).train()
    changed = dict(save_strategy="steps", save_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=3)
    resumed = make_trainer(tmp_path, eval_rows=rows, max_steps=4, tokens_per_pass=40, **changed)
    resumed.train(resume_from_checkpoint=True)
    lines = resumed.state.log_history
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 4] and resumed.engine.passes.budget == 40


# ---- 3 and 4: lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [(40, 512), (512, 512), (None, 64)], ids=["3: below", "3: context", "3: no limit"])
def test_answers_keep_room_beside_long_prompts(limits, tmp_path):
    """No answer is left with one token for a long prompt; the note names the limit that applied."""
    row = {"prompt": "x" * 900, "completion": "a long answer", "negatives": ["another one"]}
    with pytest.warns(UserWarning, match="prompts .*(max_length|context|max_prompt_length)"):
        rows = trainer_of(tmp_path, [row] * 2, "dft", max_length=limits[0], max_prompt_length=limits[1]).train_dataset
    assert len(rows[0]["completion_ids"]) >= 10 and len(rows[0]["negative_ids"][0]) >= 10
    assert len(rows[0]["prompt_ids"]) + len(rows[0]["completion_ids"]) <= (limits[0] or 512)


def test_4_limits_apply_to_rows_of_ids(tmp_path):
    """Without a tokenizer too; log-probabilities of what is cut are dropped."""
    ids = list(range(3, 40))
    row = {"prompt_ids": ids, "completion_ids": ids, "negative_ids": [ids, [5]], "ref_negative_logps": [-9.0, -1.0]}
    with pytest.warns(UserWarning, match="the reference log-probabilities of 2 rows were dropped"):
        trainer = make_trainer(tmp_path, [row] * 2, max_length=32, max_prompt_length=10, num_train_epochs=1)
    first = trainer.train_dataset[0]
    assert first["prompt_ids"] == ids[-10:] and [len(n) for n in first["negative_ids"]] == [22, 1]
    assert "ref_negative_logps" not in first


# ---- 1: numbers that are not finite, of the reference and of evaluation ---------------------------------------------


def test_1_a_reference_that_is_not_finite_names_its_rows(tmp_path):
    """Only some rows meet the weight that is not finite; those are named, and no step is taken."""
    rows = [row | {"example_id": f"row-{i}"} for i, row in enumerate(make_rows(3))]
    rows[1]["negative_ids"][0] = [90, 91]
    model = make_llama(120)
    model.get_input_embeddings().weight.data[90] = float("inf")
    args = DFTConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", layout="padded", max_steps=1)
    for row in rows:
        for ids in (row["prompt_ids"], row["completion_ids"], *row["negative_ids"]):
            ids[:] = [token if token < 90 or row is rows[1] and ids is row["negative_ids"][0] else 5 for token in ids]
    trainer = DFTTrainer(model, args, rows, peft_config=lora())
    with pytest.raises(UserError, match=r"reference's log-probabilities of 1 of 3 rows .*\(example_id row-1\)"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("saving", ["steps", "no"], ids=["1: saved every step", "1: saved at the end"])
def test_weights_that_the_last_step_made_worthless_are_not_saved(saving, tmp_path):
    """No later step would find them: their gradient was finite, the update is not."""
    wild = dict(learning_rate=1e39, warmup_steps=0, max_steps=1, lr_scheduler_type="constant")
    trainer = make_trainer(tmp_path, save_strategy=saving, save_steps=1, **wild)
    words = r"step 1: after this update the weights give no finite log-probability \(example_id 0; before it the lowest"
    with pytest.raises(UserError, match=words):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_1_an_evaluation_that_is_not_finite_says_so(tmp_path):
    """Not as a step of the training, whose learning rate is not at fault."""
    model, rows = make_llama(), make_rows(3)
    for row in (row for row in rows[1:2]):
        row["completion_ids"][0] = 96
    model.get_input_embeddings().weight.data[96] = float("nan")
    args = DFTConfig(str(tmp_path), use_cpu=True, report_to="none", layout="padded", disable_tqdm=True, objective="sft")
    with pytest.raises(UserError, match=r"evaluation after step 0: the log-probabilities of 1 of 3 rows .*dtype"):
        DFTTrainer(model, args, rows[:1]).evaluate(rows)
