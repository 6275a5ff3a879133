"""The ranks of a training, forked from a process that has imported torch and the rest: a start takes no seconds."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from lowdft.compat import without_compiled_communication

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["helpers"] + ["deepspeed"] * (importlib.util.find_spec("deepspeed") is not None))
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def run(script: Path, processes: int, *arguments: str, plain: bool = False, status: int = 0) -> str:
    """Runs a script as the ranks of one training, in torchrun's environment; `plain`: as one process without it.

    Returns:
        What the ranks wrote.

    Raises:
        AssertionError: not all ranks ended with `status`; what they wrote is the message.
    """
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as logs:
        world = 0 if plain else processes
        ranks = [FORKS.Process(target=_run, args=(script, n, world, port, logs, arguments)) for n in range(processes)]
        for rank in ranks:
            rank.start()
        end = time.monotonic() + 600
        while any(rank.is_alive() for rank in ranks) and time.monotonic() < end:
            ranks[-1].join(0.05)
            if any(rank.exitcode for rank in ranks):
                end = min(end, time.monotonic() + 30)  # for the others to end as well
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
        wrote = "\n".join(path.read_text() for path in sorted(Path(logs).iterdir()))
    assert codes == [status] * processes, f"ranks ended with {codes}\n{wrote[-6000:]}"
    return wrote


def _run(script: Path, rank: int, processes: int, port: int, logs: str, arguments: tuple[str, ...]) -> None:
    log = os.open(Path(logs, f"{rank}.log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({key: str(value) for key, value in places.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if "deepspeed" in sys.modules:
        without_compiled_communication()
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
