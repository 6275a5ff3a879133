"""Every example runs: recipes and the script on a tiny model, the notebook's cells on the quickstart's own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file

from lowdft.cli import main

EXAMPLES = ROOT / "examples"


def trained(adapter) -> list[torch.Tensor]:
    return [value for name, value in load_file(adapter / "adapter_model.safetensors").items() if "lora_B" in name]


@pytest.mark.parametrize("name, rows", [("own_rows", 12), ("multiple_choice", 12), ("classification", 12)])
def test_recipes_train(name, rows, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = [f"model.name_or_path={tiny_folder}", f"output_dir={tmp_path}/run", "model.dtype=float32"]
    assert main(["train", f"examples/{name}.yaml", *settings, "training.use_cpu=true"]) == 0
    assert all(value.abs().max() > 0 for value in trained(tmp_path / "run" / "adapter"))
    assert len((EXAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()) == rows


def test_trainer_in_python(tmp_path, tiny_folder):
    spec = importlib.util.spec_from_file_location("trainer_example", EXAMPLES / "trainer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trainer = module.main(str(tiny_folder), str(tmp_path), learning_rate=1e-2, use_cpu=True, report_to="none")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert all(value.abs().max() > 0 for value in trained(tmp_path))


@pytest.mark.slow
def test_notebook(tmp_path, smollm2, monkeypatch, capfd):
    """Its Python cells by exec, its `!` cells by the shell, with the quickstart cut to a few rows."""
    monkeypatch.chdir(tmp_path)
    settings = ["data.train_rows=8", "data.eval_rows=4", "training.num_train_epochs=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    variables: dict = {}
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        source = "".join(cell["source"])
        if source.startswith("!"):
            line = source[1:].replace("lowdft ", f"{sys.executable} -m lowdft ")
            line += " " + " ".join(settings) if " run " in line else ""
            subprocess.run(line, shell=True, check=True, env=environment)
        else:
            exec(source, variables)
    assert set(variables["systems"]) == {"base", "after"} and len(variables["losses"]) == 1
    assert "base {" in capfd.readouterr().out
