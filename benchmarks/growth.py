"""How costs grow with rows and steps: `python benchmarks/growth.py --rows 6250 25000 100000 --steps 1000 100000`.

Rows have one prompt, one completion and four negatives each. Measured is the CPU time of this process and its children:
for the checks of single rows and of all rows together; for everything that `lowdft` does before it loads a model
(`Run.check` reads, parses and checks the rows, and stores them); and for the same again with the stored rows.
Steps: the size and CPU time of a checkpoint of a tiny model, written by a trainer that has logged that many lines.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers import make_trainer, save_tiny_model

from lowdft.config.recipe import load_recipe
from lowdft.data.checks import check_row, check_table
from lowdft.data.formats import to_row
from lowdft.data.read import read_records
from lowdft.pipeline.context import Run


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def rows(count: int, place: Path) -> dict:
    """CPU time per row, in ms, of both calls."""
    rng, path = random.Random(0), place / f"{count}.jsonl"
    words = [f"{rng.randrange(10**5):x}" for _ in range(5000)]

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    with open(path, "w") as file:
        for _ in range(count):
            row = {"prompt": text(20), "completion": text(20), "negatives": [text(20) for _ in range(4)]}
            file.write(json.dumps(row) + "\n")
    (place / "recipe.yaml").write_text(
        f"output_dir: {place}/{count}\nmodel: {{name_or_path: {place}/tiny, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: {path}, eval_rows: 100}}\nadapter: {{r: 2}}\ntraining: {{objective: dft2, use_cpu: true}}\n"
    )
    rows = [to_row(record, {}, expected="prompt+completion") for record in read_records(path)]
    began = cpu_seconds()
    assert not [*(finding for row in rows for finding in check_row(row)), *check_table(rows)]
    found = {"rows": count, "ms per row, checks": round(1000 * (cpu_seconds() - began) / count, 4)}
    del rows
    for call in ("first", "second"):
        began = cpu_seconds()
        Run(load_recipe(place / "recipe.yaml")).check()
        found[f"ms per row, {call} call"] = round(1000 * (cpu_seconds() - began) / count, 4)
    return found


def steps(count: int, place: Path) -> dict:
    """Bytes of a checkpoint after so many logged steps."""
    trainer = make_trainer(place / f"steps-{count}", save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    trainer.state.log_history = [line | {"step": step} for step in range(1, count + 1)]
    trainer.state.global_step = count
    began = cpu_seconds()
    trainer._save_checkpoint(trainer.model, None)
    seconds = cpu_seconds() - began
    files = [p for p in (place / f"steps-{count}" / f"checkpoint-{count}").rglob("*") if p.is_file()]
    state = next(p for p in files if p.name == "trainer_state.json")
    total = sum(p.stat().st_size for p in files)
    return {"steps": count, "bytes": total, "of trainer_state.json": state.stat().st_size, "CPU s": round(seconds, 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[6250, 25000, 100000])
    parser.add_argument("--steps", type=int, nargs="*", default=[1000, 100000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_tiny_model(place / "tiny")
        for count in options.steps:
            print(json.dumps(steps(count, place)), flush=True)
        for count in options.rows:
            print(json.dumps(rows(count, place)), flush=True)
