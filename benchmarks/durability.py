"""What may happen to a run folder besides SIGKILL: failing writes, damage, two writers at once, power failure.

    python benchmarks/durability.py faults --count 40     # a write fails, at every kind of moment, four kinds of error
    python benchmarks/durability.py full --count 20       # a file system of so many bytes (Linux, root: tmpfs)
    python benchmarks/durability.py damage                # every file deleted, emptied, cut, one bit flipped
    python benchmarks/durability.py pairs --count 20      # the same command twice, at random offsets
    python benchmarks/durability.py power --count 40      # an ext4 image copied at random moments (Linux, root)

A tiny random model trains on rows with their own negatives, with a checkpoint at every step, and is exported. Each end
is compared with an undisturbed run's (`kills.py` says how), after the same command was given again. Every attempt is a
fork of one process that has imported everything. The status is 0 when nothing was lost.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import kills  # of this folder; it also finds the tests' helpers
import torch
from helpers import make_llama, make_tokenizer

from lowdft.cli import WHOLE_WAY, main

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
WRITING = ("open", "os.rename", "os.mkdir")


def make_recipe(place: Path) -> str:
    """Four steps on rows with negatives; gives the recipe's path."""
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(place / "tiny")
    tokenizer.save_pretrained(place / "tiny")
    rows = [{"prompt": f"{a}+{a}?", "completion": str(2 * a), "negatives": [str(a), "no"]} for a in range(10)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "recipe.yaml").write_text(
        f"output_dir: {place}/whole\n"
        f"model: {{name_or_path: {place}/tiny, hub_id: someone/tiny, load_in_4bit: false, dtype: float32}}\n"
        f"data: {{train: {place}/rows.jsonl, eval_rows: 2}}\n"
        "adapter: {r: 2, dropout: 0.1}\n"
        "training: {objective: dft2, per_device_train_batch_size: 4, negatives_per_step: 1, num_train_epochs: 2, "
        "save_steps: 1, use_cpu: true, disable_tqdm: true, learning_rate: 1e-2}\n"
        "evaluation: {answer: none}\n"
    )
    return str(place / "recipe.yaml")


def attempt(arguments: list[str], log: Path, trap: Callable | None = None, wait: bool = True) -> int:
    """Forks a `lowdft run`; gives its exit status, or its process id when it shall not `wait`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if wait else child
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    status = 70
    try:
        if trap:
            sys.addaudithook(trap)
        status = main(["run", *arguments])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def contents(folder: Path) -> dict:
    """What `kills.contents` finds."""
    kills.STEPS = 4
    return kills.contents(folder)


class Bench:
    """One undisturbed run, and the counts of what became of the others."""

    def __init__(self, place: Path, seed: int):
        self.place, self.rng, self.recipe = place, random.Random(seed), make_recipe(place)
        began = time.perf_counter()
        assert attempt([self.recipe], place / "log") == 0, (place / "log").read_text()
        self.seconds = time.perf_counter() - began
        self.whole, self.found = contents(place / "whole"), Counter(seconds_of_a_whole_run=round(self.seconds, 1))

    def mended(self, folder: Path, recipe: str | None = None) -> None:
        """The same command again, undisturbed: counts a dead end or losses."""
        status = attempt([recipe or self.recipe, f"output_dir={folder}"], self.place / "again")
        if status:
            self.found["dead ends"] += 1
            print((self.place / "again").read_text()[-1500:], file=sys.stderr)
        elif lost := kills.losses(self.whole, contents(folder)):
            self.found["with losses"] += 1
            print(dict(lost), file=sys.stderr)

    def judge(self, status: int, log: Path) -> None:
        """Counts a traceback, and an end that is neither 0 nor 1."""
        text = log.read_text(errors="replace")
        self.found["tracebacks"] += "Traceback" in text
        self.found["other statuses"] += status not in (0, 1)
        self.found["told" if status == 1 else "unharmed"] += 1
        if "Traceback" in text or status not in (0, 1):
            print(text[-2000:], file=sys.stderr)


# ---- failing writes ------------------------------------------------------------------------------------------------


def failing(folder: Path, number: int, code: int) -> Callable:
    """An audit hook: from the n-th opening for writing, making or renaming below `folder` on, all of them fail."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event not in WRITING or not str(args[0]).startswith(str(folder)):
            return
        if event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        seen += 1
        if seen >= number:
            raise OSError(code, os.strerror(code), str(args[0]))

    return hook


def faults(bench: Bench, count: int) -> None:
    """A write fails and all after it; then the disk is well again."""
    total, folder = 0, bench.place / "counted"

    def counting(event: str, args: tuple) -> None:
        nonlocal total
        if event in WRITING and str(args[0]).startswith(str(folder)):
            if event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                total += 1
                (bench.place / "total").write_text(str(total))

    attempt([bench.recipe, f"output_dir={folder}"], bench.place / "log", counting)
    total = int((bench.place / "total").read_text())
    bench.found["writes of a whole run"] = total
    for i in range(count):
        number = 1 + i * total // count
        one = bench.place / f"fault-{i}"
        log = bench.place / "faulted"
        status = attempt([bench.recipe, f"output_dir={one}"], log, failing(one, number, ERRORS[i % len(ERRORS)]))
        bench.judge(status, log)
        bench.mended(one)
        shutil.rmtree(one)


def full(bench: Bench, count: int) -> None:
    """A file system of so many bytes is full at some write of C++ or Rust; then it is made larger."""
    disk = bench.place / "disk"
    disk.mkdir()
    size = sum(p.stat().st_size + 4096 for p in (bench.place / "whole").rglob("*"))
    for i in range(count):
        limit = 4096 * (2 + (i * size // count) // 4096)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={limit}", "lowdft", disk], check=True)
        try:
            status = attempt([bench.recipe, f"output_dir={disk}/run"], bench.place / "full")
            bench.judge(status, bench.place / "full")
            subprocess.run(["mount", "-o", f"remount,size={size * 20}", disk], check=True)
            bench.mended(disk / "run")
        finally:
            subprocess.run(["umount", disk], check=True)


# ---- damage ------------------------------------------------------------------------------------------------


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


def damage(bench: Bench, count: int) -> None:
    """Every file of an unfinished run's newest checkpoint, and of a finished run: found, and what comes of it."""
    cut = bench.place / "cut"
    shutil.copytree(bench.place / "whole", cut)
    for name in ("adapter", "adapter.manifest.json"):  # as if training had been killed after its last checkpoint
        shutil.rmtree(cut / name, ignore_errors=True)
    manifest = json.loads((bench.place / "whole" / "adapter.manifest.json").read_text())
    begun = {k: manifest[k] for k in ("lowdft", "made_from")} | {"done": False}
    (cut / "adapter.manifest.json").write_text(json.dumps(begun))
    for name in ("evaluation.json", "evaluation.json.manifest.json"):
        (cut / name).unlink()
    newest = f"checkpoints/checkpoint-{kills.STEPS}"
    for start, below in ((cut, newest), (bench.place / "whole", "")):
        for file in sorted(p for p in (start / below).rglob("*") if p.is_file() and p.stat().st_size):
            name = file.relative_to(start)
            if not below and (name.parts[0] == "checkpoints" or name.name == ".lock"):
                continue
            for how in ("deleted", "emptied", "cut", "flipped"):
                _one_damage(bench, start, name, how)


MADE_AGAIN = ("recipe.yaml", "report.html", "logps.png", "adapter/README.md")  # by every run


def _one_damage(bench: Bench, start: Path, name: Path, how: str) -> None:
    folder, log = bench.place / "damaged", bench.place / "damaged.log"
    shutil.copytree(start, folder)
    change(folder / name, how, bench.rng)
    status = attempt([bench.recipe, f"output_dir={folder}"], log)
    text = log.read_text(errors="replace")
    bench.found["damages"] += 1
    bench.found["tracebacks"] += "Traceback" in text
    if status == 0 and not kills.losses(bench.whole, contents(folder)):
        bench.found["made again or one before used: equal end"] += 1
    elif status == 1 and "damaged" in text or "changed" in text:
        bench.found["named, with what to do"] += 1
    else:
        bench.found["not found"] += 1
        print(name, how, status, text[-1500:], file=sys.stderr)
    shutil.rmtree(folder)


# ---- two writers ------------------------------------------------------------------------------------------------


def pairs(bench: Bench, count: int) -> None:
    """The same command again while it runs: the second ends at once with status 1, and the end is that of one."""
    slowest = 0.0
    for i in range(count):
        folder = bench.place / f"pair-{i}"
        first = attempt([bench.recipe, f"output_dir={folder}"], bench.place / "first", wait=False)
        time.sleep(bench.rng.uniform(0.05, 0.8 * bench.seconds))
        began = time.perf_counter()
        second = attempt([bench.recipe, f"output_dir={folder}"], bench.place / "second")
        seconds = time.perf_counter() - began
        ended = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        refused = second == 1 and "another lowdft is writing" in (bench.place / "second").read_text()
        bench.found["second refused"] += refused
        bench.found["after the first had ended, or before it began"] += not refused and {second, ended} <= {0, 1}
        slowest = max(slowest, seconds if refused else 0)
        bench.found["first failed"] += ended != 0 and second != 0
        bench.mended(folder)
        shutil.rmtree(folder)
    bench.found["slowest refusal, ms"] = round(1000 * slowest)


# ---- power failure ------------------------------------------------------------------------------------------------


def power(bench: Bench, count: int) -> None:
    """A run on an ext4 image. The image is copied while the run is stopped: what was not flushed is not in it."""
    image, mounted = bench.place / "image", bench.place / "mounted"
    mounted.mkdir()
    copies, per_run = [], 10
    for number in range(-(-count // per_run)):
        with open(image, "wb") as file:
            file.truncate(48 << 20)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, mounted], check=True)
        child = attempt([bench.recipe, f"output_dir={mounted}/run"], bench.place / "powered", wait=False)
        for k in range(per_run):
            time.sleep(bench.rng.uniform(0, 1.6 * bench.seconds / per_run))
            os.kill(child, signal.SIGSTOP)
            copies.append(bench.place / f"image-{number}-{k}")
            subprocess.run(["cp", "--sparse=always", image, copies[-1]], check=True)
            shown = {p.name for p in (mounted / "run" / "checkpoints").glob("checkpoint-*[0-9]")}
            copies[-1].with_suffix(".json").write_text(json.dumps(sorted(shown)))
            os.kill(child, signal.SIGCONT)
        os.waitpid(child, 0)
        subprocess.run(["umount", mounted], check=True)
    for copy in copies[:count]:
        subprocess.run(["mount", "-o", "loop", copy, mounted], check=True)
        try:
            folder = mounted / "run"
            there = {p.name for p in (folder / "checkpoints").glob("checkpoint-*[0-9]")}
            named = set(json.loads(copy.with_suffix(".json").read_text()))
            bench.found["checkpoints seen before the failure and not after"] += bool(named) and max(named) not in there
            if there:
                lines = (folder / "metrics.jsonl").read_bytes().count(b"\n")
                bench.found["lines lost before a checkpoint"] += lines < max(int(n.split("-")[1]) for n in there)
            bench.found["images"] += 1
            bench.found["images with a checkpoint"] += bool(there)
            bench.mended(folder)
        finally:
            subprocess.run(["umount", mounted], check=True)
            copy.unlink()


PARTS = {"faults": faults, "full": full, "damage": damage, "pairs": pairs, "power": power}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for stage in WHOLE_WAY:
        __import__(f"lowdft.pipeline.stages.{stage}")
    torch.set_num_threads(1)
    print("python", sys.version.split()[0], *(f"{n} {version(n)}" for n in ("torch", "transformers", "peft")), sep=", ")
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), options.seed)
        PARTS[options.part](bench, options.count)
    print(json.dumps(+bench.found, indent=2))
    sys.exit(any(bench.found[bad] for bad in ("tracebacks", "dead ends", "with losses", "not found", "first failed",
                                              "other statuses", "lines lost before a checkpoint",
                                              "checkpoints seen before the failure and not after")))  # fmt: skip
