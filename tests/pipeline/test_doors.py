"""Nothing leaves, and no code of others runs, without a flag on the command line; secrets enter no product."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_rows, make_trainer

from lowdft.cli import main
from lowdft.config.recipe import load_recipe, save_recipe
from lowdft.errors import UserError
from lowdft.files.packages import package_file
from lowdft.training.metrics import check_gap

CANARY = "canary-5f2b9c1e77aa"


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """A recipe of two steps on rows with negatives, whose system prompt stands in the environment."""
    rows = [{"prompt": f"{a}+{a}?", "completion": str(2 * a), "negatives": ["no", "0"]} for a in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"output_dir: {tmp_path}/run\n"
        f"model: {{name_or_path: {tiny_folder}, hub_id: someone/tiny, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl, eval_rows: 2}}\n"
        "adapter: {r: 2}\n"
        'negatives: {system_prompt: "${oc.env:LOWDFT_CANARY}"}\n'
        "training: {per_device_train_batch_size: 4, negatives_per_step: 1, num_train_epochs: 2, use_cpu: true, "
        'run_name: "run ${oc.env:LOWDFT_CANARY}"}\n'
        "evaluation: {answer: none}\n"
    )
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "override, words",
    [
        ("training.push_to_hub=true", "training.push_to_hub is not allowed"),
        ("training.hub_model_id=someone/x", "training.hub_model_id is not allowed"),
        ("training.hub_token=hf_x", "Hub token from HF_TOKEN"),
        ("model.trust_remote_code=true", "add --trust-remote-code"),
        ("evaluation.compare.after=elsewhere", "evaluation.compare.after: this name is reserved"),
        ("evaluation.compare.base=elsewhere", "evaluation.compare.base"),
    ],
)
def test_a_recipe_cannot_open_doors(recipe, override, words, capsys, monkeypatch):
    monkeypatch.setenv("LOWDFT_CANARY", CANARY)
    assert main(["train", recipe, override]) == 1
    assert words in capsys.readouterr().err


HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\u202e<script>alert(1)</script><img src=x onerror=alert(2)>![x](https://evil.invalid/x)"
)


def test_hostile_data_reach_neither_terminal_nor_page(tmp_path, tiny_folder, capsys):
    """Rows, a file name and columns with escapes, HTML and Markdown, on every stage and in `inspect`."""
    data = tmp_path / "rows \x1b[31m<b>.jsonl"
    rows = [{"prompt": f"{a} {HOSTILE}", "completion": f"{a} {HOSTILE}", "negatives": [HOSTILE]} for a in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    values = {
        "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(tiny_folder), "load_in_4bit": False, "dtype": "float32"},
        "data": {"train": str(data), "eval_rows": 2},
        "adapter": {"r": 2},
        "negatives": {"system_prompt": HOSTILE},
        "training": {"objective": "dft2", "per_device_train_batch_size": 4, "negatives_per_step": 1, "max_steps": 1,
                     "use_cpu": True, "max_length": 256, "max_prompt_length": 128, "run_name": HOSTILE},
        "evaluation": {"answer": "none"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["inspect", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["export", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
    values["evaluation"]["compare"] = {HOSTILE: "elsewhere"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 1
    seen = capsys.readouterr()
    assert "printable characters only" in seen.err
    for text in (seen.out, seen.err):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    for name in ("report.html", "adapter/README.md"):
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert "<script>alert" not in text and "<img src=x" not in text


def test_secrets_of_the_environment_enter_no_file(recipe, monkeypatch, tmp_path):
    """The whole way: every byte of every file of the run folder; the recipe there still refers to the environment."""
    monkeypatch.setenv("LOWDFT_CANARY", CANARY)
    assert main(["run", recipe]) == 0
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) > 15
    assert [p for p in files if CANARY.encode() in p.read_bytes()] == []
    assert "${oc.env:LOWDFT_CANARY}" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert load_recipe(tmp_path / "run" / "recipe.yaml").negatives.system_prompt == CANARY
    assert main(["run", recipe]) == 0


def test_saved_recipe_keeps_references_that_still_hold(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("LOWDFT_CANARY", CANARY)
    loaded = load_recipe(recipe, ["evaluation.max_new_tokens=${negatives.max_new_tokens}"])
    loaded.negatives.system_prompt = "another"
    save_recipe(loaded, tmp_path / "saved.yaml")
    text = (tmp_path / "saved.yaml").read_text()
    assert "max_new_tokens: ${negatives.max_new_tokens}" in text and "system_prompt: another" in text


def test_packages_are_found_without_importing_them(tmp_path, monkeypatch):
    """Neither the package, nor its parent, nor one of this name in the current folder."""
    site = tmp_path / "site"
    (site / "outer" / "inner").mkdir(parents=True)
    for folder in (site / "outer", site / "outer" / "inner"):
        (folder / "__init__.py").write_text("raise SystemExit('was imported')")
    (site / "outer" / "inner" / "x.gguf").write_text("")
    here = tmp_path / "here" / "planted"
    here.mkdir(parents=True)
    (here / "__init__.py").write_text("")
    (here / "x.gguf").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "here"), str(site), *sys.path])
    assert package_file("package:outer.inner/x.gguf") == site / "outer" / "inner" / "x.gguf"
    assert not {"outer", "outer.inner"} & sys.modules.keys()
    for name in ("package:planted/x.gguf", "package:outer.missing/x.gguf"):
        with pytest.raises(UserError, match="is not installed"):
            package_file(name)


def test_a_reference_of_other_negatives_stops_before_the_first_step(tmp_path):
    """One row's reference shifted by a nat per token; the right one passes."""
    probe = make_trainer(tmp_path / "probe", objective="dft", reference="online")
    seen = []
    import lowdft.training.engine as module

    original = module.check_gap
    try:
        module.check_gap = lambda scores, batch, dtype: (seen.append((scores, batch)), original(scores, batch, dtype))
        probe.train()
    finally:
        module.check_gap = original
    scores, batch = seen[0]
    scores.ref_negative_logps_MB = scores.ref_negative_logps_MB.clone()
    scores.ref_negative_logps_MB[1] -= scores.negative_tokens_MB[1]
    with pytest.raises(UserError, match="are not those of the model.*1 nats per token"):
        check_gap(scores, batch, scores.policy_logps_M.dtype)
    right = scores.policy_negative_logps_MB.detach()
    per_row = torch.zeros(len(batch))[:, None]
    per_row[0] = 0.15
    scores.ref_negative_logps_MB = right - per_row * scores.negative_tokens_MB
    check_gap(scores, batch, torch.bfloat16)  # one row by chance
    for shift in (torch.full_like(per_row, 0.3), 10 * per_row):  # every row, or one by far
        scores.ref_negative_logps_MB = right - shift * scores.negative_tokens_MB
        with pytest.raises(UserError, match="are not those of the model"):
            check_gap(scores, batch, torch.bfloat16)


def test_edited_rows_stop_the_training(tmp_path):
    """Rows that bring reference log-probabilities of other answers: nothing is trained and no checkpoint saved."""
    rows = [row | {"ref_negative_logps": [-50.0] * 4} for row in make_rows()]
    trainer = make_trainer(tmp_path, rows, objective="dft", save_strategy="steps", save_steps=1)
    with pytest.raises(UserError, match="reference log-probabilities are not those"):
        trainer.train()
    assert not list(Path(tmp_path).glob("checkpoint-*"))
