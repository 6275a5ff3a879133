"""Kills `lowdft run` at random and chosen moments, restarts it, and compares the end with an uninterrupted run.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 60 --seed 0 --objective dft

A tiny random model first goes through all stages (generate, score, train, evaluate, report, export) undisturbed. Then
such runs are killed and restarted again and again until they finish. Each end is compared: rows of every parquet file,
lines of metrics.jsonl, tensors of the adapter and of the last checkpoint's `log_u`, evaluation, manifests, and the
names of all files. Every attempt is a fork of one process that has imported everything, so that it starts at once.

A moment is an access to a file (open, rename, delete, ...: Python's audit events), before which the process kills
itself, or a time after such an access.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # no thread may exist when a run is forked
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pyarrow.parquet as pq
import torch
from helpers import save_tiny_model
from safetensors.torch import load_file

from lowdft.cli import WHOLE_WAY, main

SPEED = {"tokens_per_second", "peak_memory_gb", "seconds"}  # in metrics.jsonl: they differ between any two runs
ROWS, EPOCHS = 44, 2
STEPS = EPOCHS * (ROWS - 4) // 4


@dataclass(frozen=True)
class Moment:
    """`seconds` after the `count`-th access to a path in the run folder that contains `where`; 0: just before it."""

    place: str
    where: str
    count: int
    seconds: float = 0.0


def moments(rng: random.Random) -> list[Moment]:
    """The kills of one run, in the order of its stages; each lets it get a little further."""
    short, long = (lambda: rng.uniform(0, 0.02)), (lambda: rng.uniform(0, 0.15))
    return [
        Moment("before a model is loaded", "", 1, long()),
        Moment("generation, writing a part", "/negatives.parts", rng.randint(2, 9)),
        Moment("generation", "/negatives.parts", rng.randint(1, 12), long()),
        Moment("generation, its end", "negatives.parquet", rng.randint(5, 24)),
        Moment("scoring, writing a part", "/reference.parts", rng.randint(2, 9)),
        Moment("scoring", "/reference.parts", rng.randint(1, 5), short()),
        Moment("scoring, its end", "reference.parquet", rng.randint(4, 12)),
        Moment("a step", "/metrics.jsonl", 1, long()),
        Moment("a step", "/metrics.jsonl", rng.randint(3, 5), long()),
        Moment("a checkpoint, writing it", "/.partial/checkpoint", rng.randint(5, 80)),
        Moment("a checkpoint", "/.partial", rng.randint(10, 80), short()),
        Moment("a checkpoint, its renaming and the next", "/checkpoints", rng.randint(35, 50)),
        Moment("a step", "/metrics.jsonl", rng.randint(2, 4), long()),
        Moment("saving the adapter", "/.adapter.", rng.randint(5, 28)),
        Moment("saving the adapter", "adapter", rng.randint(8, 30), short()),
        Moment("evaluation", "evaluation.json", rng.randint(2, 8)),
        Moment("evaluation", "evaluation.json", 2, long()),
        Moment("report", "report.html", rng.randint(1, 3)),
        Moment("export", "/adapter/.", rng.randint(1, 11)),
    ]


def prepare() -> None:
    """Imports what a run imports, so that forks start at once and do not collect its garbage; prints the versions."""
    for stage in WHOLE_WAY:
        __import__(f"lowdft.pipeline.stages.{stage}")
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "deepspeed"):
        with contextlib.suppress(ImportError):
            __import__(name)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    print("python", sys.version.split()[0], *(f"{n} {version(n)}" for n in ("torch", "transformers", "peft")), sep=", ")


# ---- one attempt ----------------------------------------------------------------------------------------------------


def attempt(arguments: list[str], folder: Path, moment: Moment | None, log: Path) -> int:
    """Forks a `lowdft run`, kills it at the moment, and returns its exit status (-9: it was killed)."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        _walk(arguments, folder, moment, log, tell)
    os.close(tell)
    if moment and moment.seconds and select.select([told], [], [], 300)[0] and os.read(told, 1):
        time.sleep(moment.seconds)
        os.kill(child, signal.SIGKILL)
    os.close(told)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _walk(arguments: list[str], folder: Path, moment: Moment | None, log: Path, tell: int) -> None:
    """The child: installs the trap, runs the command, and never returns."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    if moment:
        sys.addaudithook(_trap(folder, moment, tell))
    status = 1
    try:
        status = main(["run", *arguments])
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def _trap(folder: Path, moment: Moment, tell: int):
    touches = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal touches
        if not event.startswith(("open", "os.", "shutil.")):
            return
        paths = [os.fspath(a) for a in args if isinstance(a, str | os.PathLike)]
        if any(str(p).startswith(str(folder)) and moment.where in str(p) for p in paths):
            touches += 1
            if touches == moment.count:
                os.write(tell, b"x") if moment.seconds else os.kill(os.getpid(), signal.SIGKILL)

    return hook


# ---- the end --------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, object]:
    """Everything that a run made, by name, without times and speeds; lists of rows and lines in order."""
    found: dict[str, object] = {"files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))}
    for path in folder.glob("*.parquet"):
        found[path.name] = pq.read_table(path).to_pylist()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = [{k: v for k, v in line.items() if k not in SPEED} for line in lines]
    found["adapter"] = load_file(folder / "adapter" / "adapter_model.safetensors")
    found["log_u"] = load_file(folder / "checkpoints" / f"checkpoint-{STEPS}" / "log_u.safetensors")
    found["evaluation.json"] = json.loads((folder / "evaluation.json").read_text())
    for path in folder.glob("*.manifest.json"):
        manifest = json.loads(path.read_text())
        for name in ("seconds", "metrics"):  # of metrics.jsonl, with its speeds
            manifest["facts"].pop(name, None)
        manifest["made_from"].pop("trained", None)
        for name in ("checksum", "contents"):  # the contents themselves are compared above
            manifest.pop(name)
        found[path.name] = manifest
    return found


def losses(whole: dict, found: dict) -> Counter:
    """What an end lacks, has twice or has differently, by name; empty if it equals the uninterrupted one."""
    counts: Counter = Counter()
    for name in whole.keys() | found.keys():
        a, b = whole.get(name), found.get(name)
        if a is None or b is None:
            counts[f"{name}: missing or left over"] += 1
        elif isinstance(a, dict) and any(isinstance(v, torch.Tensor) for v in a.values()):
            counts[f"{name}: tensors that differ"] += sum(k not in b or not torch.equal(v, b[k]) for k, v in a.items())
        elif name == "files":
            counts.update([f"file lost: {re.sub('[0-9]+', 'N', n)}" for n in set(a) - set(b)])
            counts.update([f"file left over: {re.sub('[0-9]+', 'N', n)}" for n in set(b) - set(a)])
        elif isinstance(a, list):
            counts[f"{name}: lost or other"] += sum(item not in b for item in a)
            counts[f"{name}: repeated or new"] += max(0, len(b) - sum(item in a for item in b), len(b) - len(a))
            counts[f"{name}: order"] += a != b and sorted(map(str, a)) == sorted(map(str, b))
        else:
            counts[f"{name}: differs"] += a != b
    return +counts


def make_recipe(place: Path, objective: str) -> str:
    """Writes a tiny model, rows of sums and a recipe that saves at every step; returns the recipe's path."""
    save_tiny_model(place / "tiny")
    rows = [json.dumps({"prompt": f"{a}+{a}?", "completion": str(2 * a)}) + "\n" for a in range(ROWS)]
    (place / "rows.jsonl").write_text("".join(rows))
    (place / "recipe.yaml").write_text(
        f"output_dir: {place}/whole\n"
        f"model: {{name_or_path: {place}/tiny, hub_id: someone/tiny, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: {place}/rows.jsonl, eval_rows: 4}}\n"
        "adapter: {r: 2, dropout: 0.1}\n"
        "negatives: {max_new_tokens: 6, batch_size: 8}\n"
        f"training: {{objective: {objective}, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, "
        f"num_train_epochs: {EPOCHS}, save_steps: 1, use_cpu: true, learning_rate: 1e-2}}\n"
        "evaluation: {max_new_tokens: 4}\n"
    )
    return str(place / "recipe.yaml")


def kill_until(kills: int, seed: int, objective: str, place: Path) -> dict:
    """Runs with kills until there were enough; counts kills by place, runs, and losses by kind."""
    recipe, rng = make_recipe(place, objective), random.Random(seed)
    began = time.perf_counter()
    assert attempt([recipe], place / "whole", None, place / "log") == 0, (place / "log").read_text()
    whole, seconds = contents(place / "whole"), time.perf_counter() - began
    by_place, lost, walks = Counter(), Counter(), 0
    while sum(by_place.values()) < kills:
        folder = place / f"walk-{walks}"
        arguments = [recipe, f"output_dir={folder}"]
        statuses = []
        scored = (place / "whole" / "reference.parquet").exists()
        for moment in [*(m for m in moments(rng) if scored or "scoring" not in m.place), None]:
            statuses.append(attempt(arguments, folder, moment, place / "log"))
            by_place[moment.place if moment else "last attempt"] += statuses[-1] == -signal.SIGKILL
        assert set(statuses) <= {0, -signal.SIGKILL} and statuses[-1] == 0, (place / "log").read_text()[-5000:]
        lost += losses(whole, contents(folder))
        walks += 1
        shutil.rmtree(folder)
    return {"kills": sum(by_place.values()), "walks": walks, "losses": sum(lost.values()), "what": dict(lost),
            "by_place": dict(+by_place), "seconds_of_a_whole_run": round(seconds, 1)}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objective", default="dft")
    options = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(kill_until(options.kills, options.seed, options.objective, Path(place)), indent=2))
