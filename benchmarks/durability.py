"""Tests how a run folder survives failing writes, kills, damage, two writers at once and power failure.

    python benchmarks/durability.py faults      # all operations fail from the n-th on: every n, four kinds of error
    python benchmarks/durability.py kills       # SIGKILL before the n-th operation, every n
    python benchmarks/durability.py full        # a file system that becomes full (tmpfs), of several sizes
    python benchmarks/durability.py damage      # every file deleted, emptied, cut, one bit flipped
    python benchmarks/durability.py pairs       # the same command again while it runs, and two at the same time
    python benchmarks/durability.py power       # images of the disk, cut while the run writes (--system ext4, xfs)

A tiny random model runs every stage: generated negatives, reference scores, three steps with a checkpoint each,
evaluation, report, export. An operation is an open for writing, write, truncate, fsync, mkdir, rename or removal below
the run folder, by any library (`operations.py`). After each disturbance the same command runs again, and its end is
compared with that of an undisturbed run (as in `kills.py`). Disturbances that leave the same files behind count as one
folder. With --end-every N only every N-th folder is run to its end; for the others, only the checks of a run are made.
Every attempt is a fork of one process that has imported everything. The exit status is 0 if nothing was lost. Needs
Linux and root.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import operations

if __name__ == "__main__":
    operations.preload()

import kills  # of this folder; it also finds the tests' helpers
from disturbed import Bench, attempt, change, content_of
from pairs import pairs

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
BAD = (
    "tracebacks", "dead ends", "ends with losses", "other statuses", "not found", "not refused", "first one failed",
    "changes by the second", "images with log lines lost before a checkpoint", "images without the newest checkpoint",
)  # fmt: skip


# ---- failing operations and kills ----------------------------------------------------------------------------------


def faults(bench: Bench, options: argparse.Namespace) -> None:
    """Before the n-th operation the run forks, once per kind of error; in the fork all operations from then on fail."""
    folder, fails_with = bench.place / "run", 0
    log, copy = bench.place / "forked", bench.place / "copy"

    def act(number: int, name: str, path: str) -> int:
        nonlocal fails_with
        if fails_with:
            removing = name == "remove" and fails_with in (errno.ENOSPC, errno.EDQUOT)  # removing works on a full disk
            return 0 if removing else fails_with
        for code in ERRORS if number % options.every == 0 else ():
            shutil.copytree(folder, copy)
            if not (child := os.fork()):
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, 1), os.dup2(handle, 2)
                operations.replace_for_me(folder, copy)
                fails_with = code
                return code if name != "remove" or code not in (errno.ENOSPC, errno.EDQUOT) else 0
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            bench.judge(status, log, f"operation {number}, {name} {path}: {os.strerror(code)}")
            bench.keep(copy)
            shutil.rmtree(copy)
        return 0

    bench.walk(folder, act)
    bench.continue_all(options.end_every)


def killed(bench: Bench, options: argparse.Namespace) -> None:
    """Keeps the folder as it is before the n-th operation, which is what SIGKILL at that point leaves."""
    folder = bench.place / "run"

    def act(number: int, name: str, path: str) -> int:
        if number % options.every == 0:
            bench.keep(folder)
        return 0

    bench.walk(folder, act)
    bench.continue_all(options.end_every)


def full(bench: Bench, options: argparse.Namespace) -> None:
    """Lets a file system become full at some write, then makes it larger."""
    disk = bench.place / "disk"
    disk.mkdir()
    size = sum(p.stat().st_size + 4096 for p in (bench.place / "whole").rglob("*"))
    for i in range(options.count):
        limit = 4096 * (2 + (i * size // options.count) // 4096)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={limit}", "lowdft", disk], check=True)
        try:
            status = attempt([bench.recipe, f"output_dir={disk}/run"], bench.place / "full")
            bench.judge(status, bench.place / "full", f"a disk of {limit} bytes")
            subprocess.run(["mount", "-o", f"remount,size={size * 20}", disk], check=True)
            bench.continued(disk / "run")
        finally:
            subprocess.run(["umount", disk], check=True)


# ---- damage --------------------------------------------------------------------------------------------------------

HOW = ("deleted", "emptied", "cut", "with a flipped bit")
NAMED = (
    "is missing",
    "bytes, but",
    "other contents",
    "damaged",
    "has no manifest",
    "is not JSON",
    "cut or deleted after training",
)  # in messages


def damage(bench: Bench, options: argparse.Namespace) -> None:
    """Damages every file of an unfinished run's newest checkpoint, and of a finished run, and records the outcome."""
    whole = bench.place / "whole"
    cut = shutil.copytree(whole, bench.place / "cut")
    shutil.rmtree(cut / "adapter")  # as if training had been killed after its last checkpoint
    manifest = json.loads((cut / "adapter.manifest.json").read_text())
    begun = {k: manifest[k] for k in ("lowdft", "made_from")} | {"done": False}
    (cut / "adapter.manifest.json").write_text(json.dumps(begun))
    for name in ("evaluation.json", "evaluation.json.manifest.json"):
        (cut / name).unlink()
    unread = bench.unread(whole)
    print("not opened by the command in a finished run:", *sorted(map(str, unread)))
    for start, below in ((cut, f"checkpoints/checkpoint-{kills.STEPS}"), (whole, "")):
        for file in sorted(p for p in (start / below).rglob("*") if p.is_file() and p.stat().st_size):
            name = file.relative_to(start)
            unopened = start == whole and name in unread  # then its contents do not matter, only its name and size
            for how in HOW[: 2 if unopened else 4] if name.name != ".lock" else ():
                _one_damage(bench, start, name, how, unopened)


def _one_damage(bench: Bench, start: Path, name: Path, how: str, unopened: bool) -> None:
    """Runs the same command on a folder with one damaged file.

    Before comparing, files that a finished run does not make again are restored: a deleted file that the command does
    not open, and a damaged checkpoint that was set aside.
    """
    folder, log = shutil.copytree(start, bench.place / "damaged"), bench.place / "looked"
    change(folder / name, how, bench.rng)
    damaged = content_of(folder / name)
    status = attempt([bench.recipe, f"output_dir={folder}"], log)
    text = log.read_text(errors="replace")
    named = name.name in text and any(word in text for word in NAMED)
    mended = content_of(folder / name) != damaged
    if unopened and how == "deleted":
        shutil.copy(start / name, folder / name)
    for aside in folder.glob("checkpoints/*.damaged"):
        shutil.rmtree(aside)
        shutil.copytree(start / "checkpoints" / aside.stem, aside.with_suffix(""))
    equal = status == 0 and bench.is_equal(folder)
    bench.found["damages"] += 1
    bench.found["tracebacks"] += "Traceback" in text
    if status == 1 and named:
        verdict = "stopped: the file is named, and what to do"
    elif equal and named:
        verdict = "the file is named and not used: equal end"
    elif equal and mended:
        verdict = "made again: equal end"
    else:
        verdict = "of a file that the command does not open: equal end" if equal and unopened else "not found"
    bench.found[verdict] += 1
    if verdict == "not found" or "Traceback" in text:
        print(name, how, status, text[-1500:], file=sys.stderr)
    shutil.rmtree(folder)


# ---- power failure -------------------------------------------------------------------------------------------------

SYSTEMS = {"ext4": ("mkfs.ext4", "-q"), "xfs": ("mkfs.xfs", "-q")}


def power(bench: Bench, options: argparse.Namespace) -> None:
    """A run on a disk image. The image is copied before operations, without what the kernel has not yet written."""
    image, mounted = bench.place / "image", bench.place / "mounted"
    mounted.mkdir(exist_ok=True)
    with open(image, "wb") as file:
        file.truncate((320 if options.system == "xfs" else 32) << 20)
    subprocess.run([*SYSTEMS[options.system], image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mounted], check=True)
    folder = mounted / "run"
    chosen = {1 + i * bench.operations // options.count for i in range(options.count)}
    saved, last = 0, ""

    def act(number: int, name: str, path: str) -> int:
        nonlocal saved, last
        if last == f"fsync {folder}/checkpoints":  # the name of the newest checkpoint is on disk
            saved = max(_steps(folder), default=0)
        last = f"{name} {path}"
        if number in chosen:
            copy = bench.place / f"image-{number}"
            subprocess.run(["cp", "--sparse=always", image, copy], check=True)
            copy.with_suffix(".json").write_text(json.dumps(saved))
        return 0

    bench.walk(folder, act)
    subprocess.run(["umount", mounted], check=True)
    for copy in sorted(p for p in bench.place.glob("image-*") if p.suffix != ".json"):
        how = "loop,nouuid" if options.system == "xfs" else "loop"
        subprocess.run(["mount", "-o", how, copy, mounted], check=True)
        try:
            _after_failure(bench, folder, json.loads(copy.with_suffix(".json").read_text()))
        finally:
            subprocess.run(["umount", mounted], check=True)
            copy.unlink()
    bench.continue_all(options.end_every)


def _after_failure(bench: Bench, folder: Path, saved: int) -> None:
    steps = _steps(folder)
    bench.found["images"] += 1
    bench.found["images with a checkpoint"] += bool(steps)
    bench.found["images without the newest checkpoint"] += saved > max(steps, default=0)
    if steps:
        lines = (folder / "metrics.jsonl").read_bytes().count(b"\n")
        bench.found["images with log lines lost before a checkpoint"] += lines < max(steps)
    bench.keep(folder)


def _steps(folder: Path) -> list[int]:
    return [int(p.name.split("-")[1]) for p in folder.glob("checkpoints/checkpoint-*[0-9]")]


PARTS: dict[str, Callable] = {"faults": faults, "kills": killed, "full": full, "damage": damage, "pairs": pairs,
                              "power": power}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", choices=PARTS, nargs="+")
    parser.add_argument("--count", type=int, default=100, help="number of pairs, images or disk sizes")
    parser.add_argument("--every", type=int, default=1, help="faults, kills: at every N-th operation")
    parser.add_argument("--end-every", type=int, default=1, help="run every N-th of the remaining folders to its end")
    parser.add_argument("--system", choices=SYSTEMS, default="ext4", help="power: the file system")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills.prepare()
    bad = False

    def told(*_) -> None:
        print("stopped by SIGTERM; until then:", json.dumps(+bench.found, indent=2), flush=True)
        os._exit(143)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        bench = Bench(Path(place), options.seed)
        for part in options.parts:
            bench.found = Counter({"operations of a run": bench.operations})
            signal.signal(signal.SIGTERM, told)
            PARTS[part](bench, options)
            print(part, json.dumps(+bench.found, indent=2), flush=True)
            bad |= any(bench.found[name] for name in BAD)
    sys.exit(bad)
