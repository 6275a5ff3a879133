"""The cost of the table of moving averages for ten million prompts, and of exchanging its updates between ranks.

OMP_NUM_THREADS=1 python benchmarks/table.py            # the table; then 2 and 3 processes (gloo, on this CPU)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from lowdft.data.encoded import EncodedRows
from lowdft.distributed import collectives
from lowdft.training.log_u import LogU
from lowdft.training.metrics import finite_mean


def seconds(work, times: int = 7) -> float:
    """The median time of a call in seconds, after one that is not counted."""
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def table(n: int, prompts: int) -> dict[str, float]:
    """Bytes and seconds for a table of n examples, with steps of `prompts` prompts."""
    log_u, index, values = LogU(n), torch.randperm(n)[:prompts], torch.randn(prompts)
    out: dict[str, float] = {"bytes in memory, on every rank": sum(t.nbytes for t in (log_u.values, log_u.visits))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log_u.safetensors"
        out["s to save in a checkpoint"] = seconds(lambda: log_u.save(path), 3)
        out["bytes in a checkpoint"] = path.stat().st_size
        out["s to load, every page read"] = seconds(lambda: [t.sum() for t in load_file(path).values()], 3)
    out[f"s to update, a step of {prompts}"] = seconds(lambda: log_u.update(index, values))
    micro = list(index.split(max(1, prompts // 4)))
    out["s to find what samplers repeat, a step on several ranks"] = seconds(
        lambda: collectives.repeated(micro, log_u.visits)
    )
    out["s for its mean, a log line"] = seconds(lambda: finite_mean(log_u.values))
    log_u.values[0] = float("nan")
    out["s for its mean, log_u_init: first_batch, first epoch"] = seconds(lambda: finite_mean(log_u.values))
    return out


def rows(count: int) -> dict[str, float]:
    """Bytes per row and seconds for a fingerprint, of rows like UltraFeedback's (400 + 300 tokens, four negatives)."""
    random = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(1000, 32000, (length,), generator=random).tolist()

    made = EncodedRows.from_rows(
        {"example_id": str(i), "prompt_ids": ids(400), "completion_ids": ids(300),
         "negative_ids": [ids(300) for _ in range(4)], "ref_negative_logps": [-float(i)] * 4}
        for i in range(count)
    )  # fmt: skip
    size = made.table.nbytes / count
    return {"bytes per row": size, "s per row for the fingerprint": seconds(made.fingerprint, 3) / count}


# ---- several processes ----------------------------------------------------------------------------------------------


class StepTimes(TrainerCallback):
    def __init__(self, taken: list[float]):
        self.taken = taken

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.taken.append(time.perf_counter() - self.start)


def one_rank(folder: str) -> None:
    """Runs in each of several processes: the cost of a micro-batch's exchange and of a step of a tiny model."""
    from helpers import make_rows, make_trainer

    trainer = make_trainer(folder, make_rows(240), per_device_train_batch_size=8, gradient_accumulation_steps=1,
                           num_train_epochs=1, ddp_backend="gloo")  # fmt: skip
    original = {
        name: getattr(collectives, name) for name in ("updates_from_all", "repeated", "anywhere", "average_gradients")
    }
    taken: dict[str, list[float]] = {name: [] for name in original}

    def timed(name: str):
        def call(*args):
            torch.distributed.barrier()  # so that waiting for a slower rank is not counted
            start = time.perf_counter()
            out = original[name](*args)
            taken[name].append(time.perf_counter() - start)
            return out

        return call

    for name in original:
        setattr(collectives, name, timed(name))
    taken["a step of a tiny model, all of these included"] = []
    trainer.add_callback(StepTimes(taken["a step of a tiny model, all of these included"]))
    trainer.train()
    objects = taken["the same updates as pickled objects"] = []
    mine = (torch.arange(8), torch.randn(8), torch.ones(8, dtype=torch.int64))
    for _ in range(50):
        torch.distributed.barrier()
        begun = time.perf_counter()
        collectives.from_all(mine)
        objects.append(time.perf_counter() - begun)
    if trainer.args.process_index == 0:
        print(json.dumps({f"ms for {name}": 1e3 * statistics.median(times) for name, times in taken.items()}))
    torch.distributed.destroy_process_group()


def processes(count: int) -> dict[str, float]:
    """The results of `one_rank` on the first of `count` processes."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--master-port=0", "--standalone"]
        command = [sys.executable, *launcher, __file__, "--rank-in", folder]
        out = subprocess.run(command, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
    return json.loads(next(line for line in out.stdout.splitlines() if line.startswith('{"ms')))


def show(title: str, found: dict[str, float]) -> None:
    print(f"\n**{title}**\n")
    print("| | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:,.0f} |" if name.startswith("bytes") else f"| {name} | {value:.3g} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000_000)
    parser.add_argument("--prompts", type=int, default=1024, help="prompts of a step")
    parser.add_argument("--rank-in", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        one_rank(options.rank_in)
        sys.exit()
    print(
        "python",
        sys.version.split()[0],
        f"torch {version('torch')}",
        f"load average {os.getloadavg()[0]:.1f}",
        sep=", ",
    )
    show(f"a table of {options.n:,}", table(options.n, options.prompts))
    show("rows, of 200", rows(200))
    for count in (2, 3):
        show(f"{count} processes, 8 prompts each a step", processes(count))
