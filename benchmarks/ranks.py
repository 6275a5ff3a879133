"""Tests two ranks of `lowdft run --launch` with signals, a killed launcher and a hanging rank.

    python benchmarks/ranks.py --launch ddp zero2 zero3 --what SIGTERM Ctrl-C launcher hang

Each line starts training a tiny model on two processes of this machine, waits for the first checkpoint, disturbs the
run, and prints the exit status, tracebacks, ranks that are left after 10 seconds and, for a stopped rank, after how
many seconds the other one reported it. Then the same command must resume. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
SAID = "has not moved for"


def make_recipe(place: Path) -> str:
    """Writes a recipe of some hundred steps on rows with negatives, a checkpoint every 2 steps; returns its path."""
    from helpers import save_tiny_model

    save_tiny_model(place / "tiny")
    rows = [{"prompt": f"{a}+{a}?", "completion": str(2 * a), "negatives": ["no", "0"]} for a in range(10)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "recipe.yaml").write_text(
        f"output_dir: {place}/run\n"
        f"model: {{name_or_path: {place}/tiny, hub_id: someone/tiny, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: {place}/rows.jsonl, eval_rows: 2}}\nadapter: {{r: 2}}\n"
        "training: {objective: dft2, per_device_train_batch_size: 1, negatives_per_step: 1, num_train_epochs: 100, "
        "save_steps: 2, use_cpu: true, disable_tqdm: true}\nevaluation: {answer: none}\n"
    )
    return str(place / "recipe.yaml")


class Launched:
    """A launched training run that has written a checkpoint, its ranks, and its standard error."""

    def __init__(self, kind: str, recipe: str, place: Path):
        self.error, self.place = place / "error", place
        command = [sys.executable, "-m", "lowdft", "train", recipe, "--launch", kind, "--processes", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(self.error, "w") as file:
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=file, env=environment, start_new_session=True
            )
        before = self._newest()
        self._until(lambda: self._newest() > before, 600)
        self.ranks = [p for p in psutil.Process(self.process.pid).children() if "lowdft" in " ".join(p.cmdline())]
        self.step = self._newest()

    def _newest(self) -> int:
        found = (self.place / "run" / "checkpoints").glob("checkpoint-*[0-9]")
        return max((int(path.name.split("-")[1]) for path in found), default=0)

    def _until(self, holds, seconds: float) -> float | None:
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if holds():
                return round(time.monotonic() - began, 1)
            if self.process.poll() is not None and not holds():
                return None
            time.sleep(0.1)
        return None

    def disturbed(self, what: str) -> dict:
        """Disturbs the run, and returns what was observed."""
        found = {"after step": self.step}
        if what == "SIGTERM":
            self.process.terminate()
        elif what == "Ctrl-C":
            os.killpg(self.process.pid, signal.SIGINT)
        elif what == "launcher":
            self.process.kill()
        else:
            self.ranks[1].suspend()
            found["said after s"] = self._until(lambda: SAID in self.error.read_text(), 300)
            self.ranks[1].resume()
            self.process.terminate()
        self.process.wait(600)
        left = psutil.wait_procs(self.ranks, timeout=10)[1]
        found |= {"status": self.process.returncode, "tracebacks": self.error.read_text().count("Traceback")}
        found["ranks left after 10 s"] = len(left)
        for rank in left:
            rank.kill()
        return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", nargs="+", default=["ddp", "zero2", "zero3"])
    parser.add_argument("--what", nargs="+", default=["SIGTERM", "Ctrl-C", "launcher", "hang"])
    options = parser.parse_args()
    for kind in options.launch:
        with tempfile.TemporaryDirectory() as place:
            recipe = make_recipe(Path(place))
            for what in options.what:  # each resumes from what the previous one left
                launched = Launched(kind, recipe, Path(place))
                print(kind, what, json.dumps(launched.disturbed(what)), flush=True)
