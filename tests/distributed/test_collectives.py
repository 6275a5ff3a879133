"""Several processes give the numbers of one: losses, log_u and weights; and checkpoints go from any number to any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked_ranks import run
from safetensors.torch import load_file

TRAINING = Path(__file__).with_name("training.py")


def train(folder: Path, processes: int, objective: str, size: int, accumulation: int = 1, stop: int = 0) -> dict:
    """A training of 14 examples, two epochs, by `processes` processes: losses, log_u, log, the adapter's weights."""
    folder.mkdir(exist_ok=True)
    settings = {"objective": objective, "per_device_train_batch_size": size, "stop": stop}
    settings["gradient_accumulation_steps"] = accumulation
    kind = "ddp" if processes > 1 else "one"
    run(TRAINING, processes, str(folder), kind, json.dumps(settings), plain=kind == "one")
    found = json.loads((folder / "result.json").read_text())
    return found | {"weights": load_file(folder / "saved" / "adapter_model.safetensors")}


def assert_same(found: dict, wanted: dict) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-4, abs=1e-5)
    assert found["log_u"] == pytest.approx(wanted["log_u"], rel=1e-3, abs=1e-4)
    for name, weight in wanted["weights"].items():
        assert found["weights"][name].flatten()[:5].tolist() == pytest.approx(
            weight.flatten()[:5].tolist(), rel=1e-2, abs=1e-4
        ), name


@pytest.mark.parametrize("objective", ["dft", "sft"])
def test_any_number_of_processes(objective, tmp_path):
    """14 examples in steps of 6, two epochs, the last step of each uneven: 1, 2 and 3 processes, and accumulation."""
    one = train(tmp_path / "1", 1, objective, size=6)
    assert len(one["losses"]) == 6
    assert_same(train(tmp_path / "2", 2, objective, size=3), one)
    assert_same(train(tmp_path / "3", 3, objective, size=2), one)


def test_kto_compares_with_the_mean_over_the_whole_step(tmp_path):
    """Its point of comparison is that of one process on two, and in micro-batches; and it is not all zero."""
    one = train(tmp_path / "1", 1, "kto", size=6)
    assert sum(line.get("reference/mismatched_gain", 0.0) > 0.01 for line in one["log"]) >= 3
    assert_same(train(tmp_path / "2", 2, "kto", size=3), one)
    assert_same(train(tmp_path / "accumulated", 1, "kto", size=2, accumulation=3), one)


def test_saved_on_two_resumed_on_one_and_three(tmp_path):
    whole = train(tmp_path / "whole", 1, "dft", size=6)
    for processes, size in ((1, 6), (3, 2)):
        folder = tmp_path / str(processes)
        train(folder, 2, "dft", size=3, stop=4)
        assert_same(train(folder, processes, "dft", size=size), whole)
