"""Disturbs runs and resumes them, for `durability.py`: forks of one process, their folders, and counts of outcomes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import kills  # of this folder; it also finds the tests' helpers
import operations
from helpers import save_tiny_model

from lowdft.cli import main
from lowdft.config.recipe import load_recipe
from lowdft.errors import UserError
from lowdft.pipeline.context import Run
from lowdft.training.checkpoints import newest_whole

TEMPORARY = re.compile(r"\w+-\d+-[0-9a-f]{8}|\.tmp\w{6}")  # in names of files that are being written


def make_recipe(place: Path) -> str:
    """Writes a recipe of three DFT steps on negatives sampled from the model; returns its path."""
    save_tiny_model(place / "tiny")
    rows = [{"prompt": f"{a}+{a}?", "completion": str(2 * a)} for a in range(14)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "recipe.yaml").write_text(
        f"output_dir: {place}/whole\n"
        f"model: {{name_or_path: {place}/tiny, hub_id: someone/tiny, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: {place}/rows.jsonl, eval_rows: 2}}\n"
        "adapter: {r: 2, dropout: 0.1}\n"
        "negatives: {max_new_tokens: 3, batch_size: 6}\n"
        "training: {objective: dft, per_device_train_batch_size: 4, negatives_per_step: 1, num_train_epochs: 1, "
        "save_steps: 1, use_cpu: true, disable_tqdm: true, learning_rate: 1e-2}\n"
        "evaluation: {answer: none}\n"
    )
    return str(place / "recipe.yaml")


def attempt(arguments: list[str], log: Path, begin: Callable | None = None, wait: bool = True) -> int:
    """Forks a `lowdft run`; returns its exit status, or its process id if `wait` is False."""
    return forked(lambda: main(["run", *arguments]), log, begin, wait)


def forked(work: Callable[[], int], log: Path, begin: Callable | None = None, wait: bool = True) -> int:
    """Runs `work` in a fork with its output in `log`; the exit status is the result of `work`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if wait else child
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    status = 70
    try:
        if begin:
            begin()
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def look_at(arguments: list[str]) -> int:
    """The exit status of a run's checks of its folder before it loads a model: 0, or 1 with an error message."""
    warnings.showwarning = lambda message, *_, **__: print(message)
    try:
        run = Run(load_recipe(arguments[0], arguments[1:]))
        run.check()
        newest_whole(run.args.output_dir)
        run.evaluation.is_done()
    except UserError as error:
        print(error)
        return 1
    return 0


def change(path: Path, how: str, rng: random.Random) -> None:
    """Deletes, empties or cuts a file, or flips one of its bits."""
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])


def content_of(path: Path) -> bytes | None:
    """The contents of a file; None if it does not exist."""
    return path.read_bytes() if path.is_file() else None


def state_of(folder: Path) -> str:
    """A hash of all names and contents below a folder, ignoring the names of temporary files."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda path: TEMPORARY.sub("", str(path))):
        if path.name != ".lock":
            found.update(TEMPORARY.sub("", str(path.relative_to(folder))).encode())
            found.update(path.read_bytes() if path.is_file() else b"a folder")
    return found.hexdigest()


class Bench:
    """An undisturbed run to compare with, and counts of the outcomes of the others."""

    def __init__(self, place: Path, seed: int):
        kills.STEPS = 3
        self.place, self.rng, self.recipe, self.found = place, random.Random(seed), make_recipe(place), Counter()
        (place / "states").mkdir()
        self.walk(place / "whole", lambda *_: 0)
        self.operations, self.whole = self.found["operations of a run"], kills.contents(place / "whole")

    def watching(self, folder: Path, act: Callable[[int, str, str], int]) -> Callable:
        """For `attempt`: calls `act(number, name, path)` before every operation below the folder."""

        def begin() -> None:
            number = 0

            def counted(name: str, path: str) -> int:
                nonlocal number
                number += 1
                (self.place / "number").write_text(str(number))
                return act(number, name, path)

            operations.watch(folder, counted)

        return begin

    def walk(self, folder: Path, act: Callable[[int, str, str], int]) -> None:
        """A complete run in the folder, with `act` before every operation; it must succeed."""
        log, told = self.place / "log", self.place / "told.json"

        def finally_told(number: int, name: str, path: str) -> int:
            code = act(number, name, path)
            told.write_text(json.dumps(self.found))
            return code

        status = attempt([self.recipe, f"output_dir={folder}"], log, self.watching(folder, finally_told))
        if status:
            raise SystemExit(f"the run in which operations were watched ended with {status}: {log.read_text()[-3000:]}")
        self.found = Counter(json.loads(told.read_text()))
        self.found["operations of a run"] = int((self.place / "number").read_text())
        if folder.name != "whole":
            self.compare(folder, "ends with losses")

    def keep(self, folder: Path) -> None:
        """Keeps a copy of what a disturbance left behind, unless another disturbance left the same."""
        self.found["disturbances"] += 1
        kept = self.place / "states" / (state_of(folder) if folder.is_dir() else "nothing")
        if not kept.exists():
            shutil.copytree(folder, kept) if folder.is_dir() else kept.mkdir()

    def continue_all(self, every: int) -> None:
        """Checks every distinct folder that was kept, and runs every n-th of them to the end."""
        for number, kept in enumerate(sorted((self.place / "states").iterdir())):
            self.found["distinct folders"] += 1
            if number % every == 0:
                self.continued(kept)
            elif self.looked_at(kept):
                self.found["dead ends"] += 1
                print((self.place / "looked").read_text()[-1500:], file=sys.stderr)
            shutil.rmtree(kept)

    def looked_at(self, folder: Path) -> int:
        """The result of `look_at`; its output is in the file `looked`."""
        return forked(lambda: look_at([self.recipe, f"output_dir={folder}"]), self.place / "looked")

    def continued(self, folder: Path) -> None:
        """Runs the same command again, undisturbed; counts dead ends and losses."""
        status = attempt([self.recipe, f"output_dir={folder}"], self.place / "again")
        text = (self.place / "again").read_text(errors="replace")
        self.found["run to the end"] += 1
        if status:
            self.found["dead ends"] += 1
            print(text[-1500:], file=sys.stderr)
        else:
            self.compare(folder, "ends with losses")

    def compare(self, folder: Path, name: str) -> None:
        """Counts an end that differs from that of the undisturbed run."""
        if lost := kills.losses(self.whole, kills.contents(folder)):
            self.found[name] += 1
            print(dict(lost), file=sys.stderr)

    def unread(self, whole: Path) -> set[Path]:
        """The files of a finished run that the same command does not open, from their access times."""
        folder = shutil.copytree(whole, self.place / "read")
        files = [path for path in folder.rglob("*") if path.is_file()]
        for path in files:
            os.utime(path, ns=(0, path.stat().st_mtime_ns))
        status = attempt([self.recipe, f"output_dir={folder}"], self.place / "log")
        found = {path for path in files if path.is_file() and not path.stat().st_atime_ns}
        if status or folder / "recipe.yaml" in found or folder / "evaluation.json" in found:
            raise SystemExit("this file system does not keep access times (mount option noatime)")
        shutil.rmtree(folder)
        return {path.relative_to(folder) for path in found}

    def is_equal(self, folder: Path) -> bool:
        """Whether this end equals that of the undisturbed run."""
        try:
            return not kills.losses(self.whole, kills.contents(folder))
        except (OSError, ValueError):  # a file that is missing, or no JSON
            return False

    def judge(self, status: int, log: Path, what: str) -> None:
        """Counts tracebacks, and exit statuses other than 0 and 1."""
        text = log.read_text(errors="replace")
        self.found["tracebacks"] += "Traceback" in text
        self.found["other statuses"] += status not in (0, 1)
        self.found["ended with an error message" if status == 1 else "ended well"] += status in (0, 1)
        if "Traceback" in text or status not in (0, 1):
            print(f"{what}: status {status}: {text[-2500:]}", file=sys.stderr)
