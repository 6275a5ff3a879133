"""Several processes give the numbers of one: losses, log_u and weights; and checkpoints go from any number to any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TESTS

SCRIPT = """
import json, os, sys
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers import make_rows
from helpers import losses, make_trainer
folder, objective, size, accumulation, stop = sys.argv[2:7]
settings = dict(per_device_train_batch_size=int(size), gradient_accumulation_steps=int(accumulation), seed=3)
settings |= dict(objective=objective, save_strategy="steps", save_steps=2)
if "WORLD_SIZE" in os.environ:
    settings["ddp_backend"] = "gloo"
trainer = make_trainer(folder, make_rows(14), **settings)
if stop != "0":
    from transformers import TrainerCallback
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= int(stop)
    trainer.add_callback(Stop())
resume = any(Path(folder).glob("checkpoint-*"))
trainer.train(resume_from_checkpoint=resume)
weights = {n: p.detach().flatten().tolist()[:5] for n, p in trainer.model.named_parameters() if p.requires_grad}
if trainer.args.process_index == 0:
    Path(folder, "log.json").write_text(json.dumps(trainer.state.log_history))
    Path(folder, "result.json").write_text(json.dumps([losses(trainer), trainer.log_u.tolist(), weights]))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # a rank that ends while gloo's threads run may abort
"""


def train(folder: Path, processes: int, objective: str, size: int, accumulation: int = 1, stop: int = 0):
    """Losses, log_u and some weights of a training by `processes` processes."""
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    arguments = [str(TESTS), str(folder), objective, str(size), str(accumulation), str(stop)]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0", "--standalone"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(folder / "script.py"), *arguments]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def assert_same(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-4, abs=1e-5)
    assert found[1] == pytest.approx(wanted[1], rel=1e-3, abs=1e-4)
    for name, values in wanted[2].items():
        assert found[2][name] == pytest.approx(values, rel=1e-2, abs=1e-4), name


@pytest.mark.parametrize("objective", ["dft", "sft"])
def test_any_number_of_processes(objective, tmp_path):
    """14 examples in steps of 6, two epochs, the last step of each uneven: 1, 2 and 3 processes, and accumulation."""
    one = train(tmp_path / "1", 1, objective, size=6)
    assert len(one[0]) == 6
    assert_same(train(tmp_path / "2", 2, objective, size=3), one)
    assert_same(train(tmp_path / "3", 3, objective, size=2), one)


def test_kto_compares_with_the_mean_over_the_whole_step(tmp_path):
    """Its point of comparison is that of one process on two, and in micro-batches; and it is not all zero."""
    one = train(tmp_path / "1", 1, "kto", size=6)
    lines = json.loads((tmp_path / "1" / "log.json").read_text())
    assert sum(line.get("reference/mismatched_gain", 0.0) > 0.01 for line in lines) >= 3
    assert_same(train(tmp_path / "2", 2, "kto", size=3), one)
    assert_same(train(tmp_path / "accumulated", 1, "kto", size=2, accumulation=3), one)


def test_saved_on_two_resumed_on_one_and_three(tmp_path):
    whole = train(tmp_path / "whole", 1, "dft", size=6)
    for processes, size in ((1, 6), (3, 2)):
        folder = tmp_path / str(processes)
        train(folder, 2, "dft", size=3, stop=4)
        assert_same(train(folder, processes, "dft", size=size), whole)
