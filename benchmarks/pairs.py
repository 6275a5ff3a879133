"""Two writers of one run folder, for `durability.py`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from disturbed import Bench, attempt


def pairs(bench: Bench, options: argparse.Namespace) -> None:
    """Starts the same command again at random operations of the first, which waits at every second of them."""
    slowest, meanwhile = 0.0, 10
    for i in range(-(-options.count // meanwhile)):
        folder = bench.place / f"pair-{i}"
        chosen = sorted(bench.rng.sample(range(3, bench.operations), meanwhile))  # the lock is the second one
        told, tell = os.pipe()
        heard, answer = os.pipe()

        def act(number: int, *_, chosen=chosen, tell=tell, heard=heard) -> int:
            if number in chosen:
                os.write(tell, b"x")
                if chosen.index(number) % 2 == 0:
                    os.read(heard, 1)
            return 0

        line, begin = [bench.recipe, f"output_dir={folder}"], bench.watching(folder, act)
        first, ended = attempt(line, bench.place / "first", begin, wait=False), None
        for k in range(meanwhile):
            os.read(told, 1)
            before = _seen(folder)
            began = time.perf_counter()
            status = attempt(line, bench.place / "second")
            seconds = time.perf_counter() - began
            text = (bench.place / "second").read_text()
            if status == 1 and "another lowdft is writing this folder" in text:
                bench.found["second refused"] += 1
                bench.found["refused naming the process"] += f"process {first} on" in text
                slowest = max(slowest, seconds)
            elif status == 0 and k % 2 and (ended := _ended(first) if ended is None else ended) is not None:
                bench.found["the first had ended"] += 1  # it did not wait
            else:
                bench.found["not refused"] += 1
                print("not refused:", chosen[k], status, text[-1500:], file=sys.stderr)
            if k % 2 == 0:
                bench.found["changes by the second"] += _seen(folder) != before
                os.write(answer, b"x")
        bench.found["first one failed"] += (os.waitpid(first, 0)[1] if ended is None else ended) != 0
        bench.compare(folder, "ends with losses")
        shutil.rmtree(folder)
    bench.found["slowest refusal, ms"] = round(1000 * slowest)
    for i in range(options.count // 5):
        folder = bench.place / f"together-{i}"
        both = [attempt([bench.recipe, f"output_dir={folder}"], bench.place / f"log-{k}", wait=False) for k in (0, 1)]
        statuses = sorted(os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in both)
        bench.found["begun together, one refused" if statuses == [0, 1] else "not refused"] += 1
        bench.compare(folder, "ends with losses")
        shutil.rmtree(folder)


def _ended(process: int) -> int | None:
    """The wait status of a child if it ends within a second, else None."""
    for _ in range(100):
        if (found := os.waitpid(process, os.WNOHANG))[0]:
            return found[1]
        time.sleep(0.01)
    return None


def _seen(folder: Path) -> dict:
    found = {p: p.stat() for p in folder.rglob("*")}
    return {p: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for p, stat in found.items()}
