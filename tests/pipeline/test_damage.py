"""A finished run of which something was damaged: named by what reads it, or made again; never a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

from lowdft.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder):
    """A recipe whose run is finished, negatives by the base included."""
    place = tmp_path_factory.mktemp("finished")
    rows = [{"prompt": f"{a}+{a}?", "completion": str(2 * a)} for a in range(8)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "recipe.yaml").write_text(
        f"output_dir: {place}/run\n"
        f"model: {{name_or_path: {tiny_folder}, hub_id: someone/tiny, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: {place}/rows.jsonl, eval_rows: 2}}\n"
        "adapter: {r: 2}\n"
        "negatives: {max_new_tokens: 4}\n"
        "training: {per_device_train_batch_size: 6, num_train_epochs: 2, save_steps: 1, use_cpu: true}\n"
        "evaluation: {answer: none}\n"
    )
    assert main(["run", str(place / "recipe.yaml")]) == 0
    return place


@pytest.fixture
def run(finished, tmp_path):
    """(arguments of the command line, folder) of a copy of it."""
    folder = shutil.copytree(finished / "run", tmp_path / "run")
    return [str(finished / "recipe.yaml"), f"output_dir={folder}"], folder


@pytest.mark.parametrize(
    "name",
    ["negatives.parquet", "reference.parquet", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"],
)
@pytest.mark.parametrize("how", ["emptied", "cut", "flipped"])
def test_a_damaged_product_is_named(run, name, how, capsys):
    arguments, folder = run
    content = (folder / name).read_bytes()
    flipped = content[:20] + bytes([content[20] ^ 1]) + content[21:]
    (folder / name).write_bytes({"emptied": b"", "cut": content[: len(content) // 2], "flipped": flipped}[how])
    assert main(["report", *arguments]) == 1
    error = capsys.readouterr().err
    assert f"{folder / name} has" in error and "Restore it, or delete" in error and "Traceback" not in error


def test_a_damaged_adapter_is_neither_merged_nor_talked_to(run, capsys):
    arguments, folder = run
    path = folder / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    for verb in ("merge", "chat"):
        assert main([verb, *arguments]) == 1
        assert f"{path} has other contents" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["base_evaluation.json", "base_evaluation.json.manifest.json", "evaluation.json.manifest.json"]
)
def test_measures_of_the_base_are_checked_when_all_is_measured(run, name, capsys):
    arguments, folder = run
    (folder / name).write_bytes(b"")
    assert main(["evaluate", *arguments]) == 1
    assert f"{folder / name}" in capsys.readouterr().err


def test_deleted_measures_of_the_base_are_made_again(run):
    arguments, folder = run
    before = (folder / "base_evaluation.json").read_bytes()
    (folder / "base_evaluation.json").unlink()
    assert main(["evaluate", *arguments]) == 0
    assert (folder / "base_evaluation.json").read_bytes() == before


@pytest.mark.parametrize("name", ["log_u.safetensors", "manifest.json"])
def test_a_report_leaves_out_damaged_moving_averages(run, name, capsys):
    arguments, folder = run
    newest = folder / "checkpoints" / "checkpoint-2"
    (newest / name).write_bytes(b"")
    assert main(["report", *arguments]) == 0
    assert f"warning: {newest / name}" in capsys.readouterr().out
    assert "Moving averages log_u" not in (folder / "report.html").read_text(encoding="utf-8")


def test_negatives_made_anew_do_not_take_the_old_reference(run, capsys):
    """Other negatives with a manifest of their own: the reference beside them is of those before."""
    arguments, folder = run
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(folder / name)
    (folder / "adapter.manifest.json").unlink()
    manifest = json.loads((folder / "reference.parquet.manifest.json").read_text())
    manifest["facts"]["negatives"] = "0" * 32
    del manifest["checksum"]
    (folder / "reference.parquet.manifest.json").write_text(json.dumps(manifest))
    assert main(["train", *arguments]) == 1
    assert "was scored on other negatives" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["deleted", "emptied", "cut", "with another number"])
def test_lost_log_lines_come_back_from_the_checkpoint(run, how, capsys):
    """`train` says "already trained" and `report` draws: no dead end, and the lines are those that were."""
    arguments, folder = run
    path = folder / "metrics.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()]
    if how == "deleted":
        path.unlink()
    else:
        other = path.read_text().replace(f'"loss": {before[0]["loss"]}', '"loss": 0.5')
        path.write_text({"emptied": "", "cut": path.read_text()[:-40], "with another number": other}[how])
    assert main(["report", *arguments]) == 0
    assert "was changed, cut or deleted after training" in capsys.readouterr().out
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in after] == [(line["step"], line["loss"]) for line in before]


def test_report_of_a_finished_training_without_any_line(run):
    arguments, folder = run
    (folder / "metrics.jsonl").unlink()
    shutil.rmtree(folder / "checkpoints")
    assert main(["report", *arguments]) == 0
    assert (folder / "report.html").is_file()


def test_a_deleted_adapter_comes_back_from_the_last_checkpoint(run):
    arguments, folder = run
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "adapter")
    assert main(["train", *arguments]) == 0
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == weights


HOLD = "import sys; from lowdft.files import locked\nwith locked(sys.argv[1]): print(1, flush=True); sys.stdin.read()"


def test_a_second_command_changes_nothing(run, capsys):
    arguments, folder = run
    command = [sys.executable, "-c", HOLD, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "1\n"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    for verb in ("run", "train", "export", "report"):
        assert main([verb, *arguments]) == 1
        assert f"process {holder.pid} on" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    holder.kill()
    holder.communicate()
