"""What was tried at the edges through the command line alone; a case's id begins with the defect it stands for.

The list and the rest of the cases: `tests/training/test_edges.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import CHAT_TEMPLATE, ROWS, folder
from safetensors.torch import load_file, save_file

from lowdft.cli import main
from lowdft.pipeline.context import Run


def write(recipe: str, rows: list[dict], name: str = "rows.jsonl") -> str:
    path = Path(recipe).parent / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def broken(tmp_path, tiny_folder) -> str:
    """The tiny base, whose embedding of the byte "~" is not a number."""
    base = tmp_path / "broken"
    shutil.copytree(tiny_folder, base)
    weights = load_file(base / "model.safetensors")
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    weights["model.embed_tokens.weight"][vocabulary["~"]] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return f"model.name_or_path={base}"


def test_small_all_row_errors_in_one_go(recipe, capsys):
    """Of the file to train on and the one held out; with the rows that have too few negatives."""
    good = {"prompt": "a", "completion": "b", "negatives": ["c", "d"]}
    write(recipe, [good, good | {"negatives": ["c"]}, {"prompt": "a", "completion": " "}])
    held = write(recipe, [good, {"prompt": "a", "completion": 5}], "held.jsonl")
    assert main(["run", recipe, f"data.eval={held}", "data.eval_rows=null"]) == 1
    error = capsys.readouterr().err
    assert "rows.jsonl:3: completion is only whitespace" in error and "held.jsonl:2: completion is a number" in error
    assert "rows.jsonl:2) have too few negatives (the fewest: 1)" in error and "Traceback" not in error


@pytest.mark.parametrize("verb", ["run", "generate", "train"])
def test_16_rows_that_the_template_refuses_are_told_before_any_work(verb, recipe, tiny_folder, capsys, monkeypatch):
    """Training and held-out rows in one go; a later stage would meet them after hours."""
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    )
    monkeypatch.setattr(Run, "base", lambda self: pytest.fail("a model was loaded"))
    said = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]
    system = {"role": "system", "content": "Be brief."}
    write(recipe, [{"messages": [system, *said] if i in (2, 10) else said} for i in range(12)])
    assert main([verb, recipe, f"model.chat_template={json.dumps(refusing)}"]) == 1
    error = capsys.readouterr().err
    for line in (3, 11):
        assert f"rows.jsonl:{line}: the chat template rejects this row (roles: system, user): no system role" in error
    assert "rows.jsonl:4" not in error


def test_small_negatives_that_are_not_used_are_told(recipe, capsys):
    """One row without negatives of its own makes the base write those of all."""
    write(recipe, [row | {"negatives": ["x", "y"]} for row in ROWS[:8]] + ROWS[8:])
    assert main(["generate", recipe, "negatives.per_prompt=2", "negatives.max_new_tokens=2"]) == 0
    assert "8 of 9 rows have negatives, which are not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage, words",
    [
        ("generate", "lowdft: negatives of 1 rows (example_id row-2): the model's logits are not finite"),
        ("score", "lowdft: the reference's log-probabilities of 1 of"),
        ("train", "log-probabilities of 1 of"),
        (
            "evaluate",
            "lowdft: evaluation: log-probabilities under base of 1 of 3 rows are not finite (example_id row-11)",
        ),
    ],
    ids=lambda value: f"1: {value}" if value.isalpha() else "",
)
def test_what_is_not_finite_stops_and_names_its_rows(stage, words, recipe, broken, capsys):
    """Status 1 and no product; the rows that do not meet the weight are not named."""
    rows = [row | {"id": f"row-{i}", "negatives": ["7", "8"]} for i, row in enumerate(ROWS)]
    place = {"generate": (2, "prompt"), "evaluate": (11, "completion")}.get(stage, (2, "completion"))
    if stage == "generate":
        rows = [{k: v for k, v in row.items() if k != "negatives"} for row in rows]
    if stage == "score":
        rows[2]["negatives"] = ["~", "8"]
    else:
        rows[place[0]][place[1]] = "~" + rows[place[0]][place[1]]
    write(recipe, rows)
    overrides = [broken, "negatives.max_new_tokens=2", "training.layout=padded", "evaluation.answer=none"]
    overrides += ["training.objective=sft"] if stage == "train" else []
    assert main(["run", recipe, *overrides]) == 1
    error = capsys.readouterr().err
    assert words in error and "finite" in error and "Traceback" not in error
    missing = {"generate": "negatives.parquet", "score": "reference.parquet", "train": "adapter"}
    assert not (folder(recipe) / missing.get(stage, "evaluation.json")).exists()


def test_13_evaluation_keeps_to_tokens_per_pass(recipe, monkeypatch):
    """The measures of whole batches, in passes of at most 40 tokens or one completion."""
    assert main(["run", recipe, "evaluation.answer=none", "training.max_steps=1"]) == 0
    whole = json.loads((folder(recipe) / "evaluation.json").read_text())["systems"]
    for path in folder(recipe).glob("*evaluation.json*"):
        path.unlink()
    base, seen = Run.base, []

    def watched(run):
        model = base(run)
        model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        return model

    monkeypatch.setattr(Run, "base", watched)
    again = ["evaluation.answer=none", "training.max_steps=1", "training.tokens_per_pass=64"]
    assert main(["evaluate", recipe, *again]) == 0
    found = json.loads((folder(recipe) / "evaluation.json").read_text())["systems"]
    for system, measures in whole.items():
        assert found[system] == pytest.approx(measures, rel=1e-4)
    assert len(seen) > 8 and max(seen) <= 96


def test_11_and_9_settings_that_move_memory_alone_may_change(recipe, capsys):
    """Resumed with another budget and layout: what is set wins, and nothing refuses."""
    steps = ["training.objective=sft", "evaluation.answer=none"]
    assert main(["train", recipe, *steps]) == 0
    shutil.rmtree(folder(recipe) / "adapter")
    (folder(recipe) / "adapter.manifest.json").write_text(
        json.dumps(_undone(json.loads((folder(recipe) / "adapter.manifest.json").read_text())))
    )
    shutil.rmtree(max((folder(recipe) / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])))
    changed = ["training.tokens_per_pass=50", "training.layout=padded"]
    assert main(["train", recipe, *steps, *changed]) == 0
    assert "resuming from" in capsys.readouterr().out
    newest = max((folder(recipe) / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert load_file(newest / "log_u.safetensors")["tokens_per_pass"] == torch.tensor(50)


def _undone(manifest: dict) -> dict:
    """The manifest of a product that is still being made."""
    return {k: v for k, v in manifest.items() if k not in ("checksum", "contents", "facts")} | {"done": False}


@pytest.mark.parametrize("changed", ["rows", "settings"])
def test_11_an_evaluation_of_other_rows_or_settings_is_told_before_any_work(changed, recipe, capsys, monkeypatch):
    """With everything else that was made with others, in one go; after the training it would be too late."""
    sft = ["training.objective=sft", "training.max_steps=1", "evaluation.answer=none", "data.train_rows=9"]
    assert main(["run", recipe, *sft]) == 0
    for path in (folder(recipe) / "adapter", folder(recipe) / "checkpoints"):
        shutil.rmtree(path)
    (folder(recipe) / "adapter.manifest.json").unlink()
    held = write(recipe, [{"prompt": "7", "completion": "8"}], "held.jsonl")
    other = {"rows": [f"data.eval={held}", "data.eval_rows=null"], "settings": ["evaluation.max_new_tokens=3"]}[changed]
    monkeypatch.setattr(Run, "base", lambda self: pytest.fail("a model was loaded"))
    assert main(["run", recipe, *sft, *other]) == 1
    error = capsys.readouterr().err
    files = {"rows": ["heldout_negatives.parquet", "base_evaluation.json", "evaluation.json"]}
    for name in files.get(changed, ["evaluation.json"]):
        assert f"run/{name} was made with other settings" in error
    assert error.count("was made with other settings") == len(files.get(changed, "xx"))


def test_an_adapter_to_compare_with_is_looked_for_before_any_work(recipe, capsys, monkeypatch):
    monkeypatch.setattr(Run, "base", lambda self: pytest.fail("a model was loaded"))
    assert main(["run", recipe, "evaluation.compare={old: nowhere}"]) == 1
    assert "evaluation.compare.old: nowhere is not a trained adapter" in capsys.readouterr().err
