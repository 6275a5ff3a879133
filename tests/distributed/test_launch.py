"""The same command on several processes: one process's run folder; and what cannot be launched is told in words."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.commands.config import load_config_from_file
from helpers import ROOT
from safetensors.torch import load_file

from lowdft.cli import main
from lowdft.distributed import launch
from lowdft.verbs import LAUNCHERS

ROWS = [{"prompt": f"{a}+{a}?", "completion": str(2 * a)} for a in range(9)]


@pytest.fixture
def recipe(tmp_path, tiny_folder) -> str:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "recipe.yaml").write_text(
        f"output_dir: {tmp_path}/one\n"
        f"model: {{name_or_path: {tiny_folder}, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: {tmp_path}/rows.jsonl, eval_rows: 2}}\n"
        "adapter: {r: 2}\n"
        "negatives: {max_new_tokens: 6, batch_size: 4}\n"
        "training: {per_device_train_batch_size: 4, num_train_epochs: 1, disable_tqdm: true, use_cpu: true}\n"
        "evaluation: {max_new_tokens: 4}\n"
    )
    return str(tmp_path / "recipe.yaml")


def lowdft(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lowdft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_processes_make_the_run_folder_of_one(recipe, tmp_path):
    """Negatives, reference scores and adapter, by `--launch zero3` on 2 processes: every product is that of one."""
    assert main(["run", recipe]) == 0
    two = ["output_dir=" + str(tmp_path / "two"), "training.per_device_train_batch_size=2"]
    out = lowdft("run", recipe, *two, "--launch", "zero3", "--processes", "2")
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count("rows scored") == 1
    for name in ("negatives.parquet", "heldout_negatives.parquet"):
        assert pq.read_table(tmp_path / "two" / name) == pq.read_table(tmp_path / "one" / name)
    one, both = (pq.read_table(tmp_path / run / "reference.parquet").to_pydict() for run in ("one", "two"))
    assert both["example_id"] == one["example_id"]
    for found, wanted in zip(both["ref_negative_logps"], one["ref_negative_logps"], strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)
    wanted = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-2, atol=1e-5)
    assert not list((tmp_path / "two").glob("*.parts")) and (tmp_path / "two" / "report.html").is_file()


def test_configurations_are_accelerates_own():
    """Every one is a file that accelerate reads, in the package and by the path that people see."""
    assert {path.stem for path in launch.FOLDER.glob("*.yaml")} == set(LAUNCHERS)
    for kind in LAUNCHERS:
        path = ROOT / "recipes" / "launch" / f"{kind}.yaml"
        assert path.samefile(launch.FOLDER / f"{kind}.yaml")
        load_config_from_file(str(path))
        assert yaml.safe_load(path.read_text())["num_machines"] == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--launch", "zero3"], "found no GPU"),
        (["--launch", "fsdp", "--processes", "2"], "needs GPUs"),
        (["training.nonsense=1", "--launch", "ddp"], "training.nonsense is not known"),
        (["--processes", "2"], "--processes also needs --launch"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_what_cannot_be_launched_is_told(recipe, arguments, words, capsys):
    assert main(["train", recipe, *arguments]) == 1
    assert words in capsys.readouterr().err


@pytest.fixture
def launched(request, recipe, tmp_path):
    """A training that takes long on two processes, with a checkpoint written; its process and its ranks'."""
    kind = getattr(request, "param", "ddp")
    if kind != "ddp":
        pytest.importorskip("deepspeed")
    overrides = ["training.objective=sft", "training.num_train_epochs=40", "training.save_steps=2"]
    overrides += ["training.per_device_train_batch_size=1"]
    command = [sys.executable, "-m", "lowdft", "run", recipe, *overrides, "--launch", kind, "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    while not list((tmp_path / "one" / "checkpoints").glob("checkpoint-*[0-9]")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    yield process, psutil.Process(process.pid).children()
    process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launched, send, status, words",
    [
        *(
            (kind, subprocess.Popen.terminate, 143, "stopped by SIGTERM after step")
            for kind in ("ddp", "zero2", "zero3")
        ),
        ("ddp", lambda process: os.killpg(process.pid, signal.SIGINT), 130, "stopped; run the same command again"),
    ],
    indirect=["launched"],
)
def test_signals_have_their_status_and_no_traceback(launched, send, status, words):
    process, ranks = launched
    send(process)
    _, error = process.communicate(timeout=300)
    assert process.returncode == status, error[-3000:]
    assert error.count(words) == 1 and "Traceback" not in error
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no parent death signal")
def test_ranks_end_with_a_killed_launcher(launched, recipe, tmp_path):
    """And the second command for a folder in use is refused before they do."""
    process, ranks = launched
    second = lowdft("train", recipe)
    assert second.returncode == 1 and f"process {ranks[0].pid} on" in second.stderr
    process.kill()
    process.communicate()
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


def test_deepspeed_and_bitsandbytes_say_nothing_that_does_not_matter(recipe):
    """A training step on a CPU without a launcher, and a launcher that stops; DeepSpeed's warnings go to stdout."""
    trained = lowdft("train", recipe, "training.objective=sft", "training.max_steps=1")
    assert trained.returncode == 0 and "trained in 1 steps" in trained.stdout
    assert "accelerator" not in trained.stdout + trained.stderr
    stopped = lowdft("train", recipe, "--launch", "fsdp", "--processes", "2")
    assert (stopped.returncode, stopped.stdout) == (1, "")
    assert stopped.stderr.startswith("lowdft: --launch fsdp needs GPUs") and stopped.stderr.count("\n") == 1
