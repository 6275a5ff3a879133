"""Runs a command on several processes with accelerate's launcher and a configuration in `launchers/`.

The launcher runs in a thread of this process, so that signals are handled here and not by torch, which would print a
traceback and kill ranks that take longer than 30 seconds to save. The ranks are children of this process and end with
it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowdft.errors import UserError

FOLDER = Path(__file__).parent / "launchers"
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
LAUNCHER = "LOWDFT_LAUNCHER"  # in a rank's environment: the launcher's process id
PASSED_ON = (143, 130)  # exit statuses of a rank that the command returns, too: SIGTERM, Ctrl-C


def launch(kind: str, processes: int | None, arguments: list[str]) -> int:
    """Runs `lowdft` with these arguments on several processes of this machine; returns the exit status.

    SIGTERM is forwarded to the ranks, which save at the end of their step, however long that takes.

    Args:
        kind: ddp, fsdp, zero2 or zero3.
        processes: how many; None means one per GPU.
        arguments: the arguments of `lowdft`, without those for launching.

    Raises:
        UserError: no GPU was found and no number given, or DeepSpeed is not installed.
    """
    processes = _processes(kind, processes)
    line = ["--config_file", str(FOLDER / f"{kind}.yaml"), "--num_processes", str(processes)]
    line += ["--main_process_port", "0", "-m", "lowdft", *arguments]
    os.environ[LAUNCHER] = str(os.getpid())
    ended: list[BaseException | None] = []
    thread = threading.Thread(target=_launch, args=(line, ended), daemon=True)
    with _passing_on(signal.SIGTERM), _passing_on(signal.SIGINT):
        thread.start()
        while thread.is_alive():
            thread.join(1)
    error = ended[0]
    if error is None or isinstance(error, SystemExit) and not error.code:
        return 0
    if hasattr(error, "failures"):  # torch's ChildFailedError
        return _status(list(error.failures.values()))
    raise error


def _launch(line: list[str], ended: list) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks report themselves why they end
    try:
        launch_command(launch_command_parser().parse_args(line))
        ended.append(None)
    except BaseException as error:  # is raised in the main thread
        ended.append(error)


def die_with_launcher() -> None:
    """Makes a rank end with its launcher, even after SIGKILL (Linux); otherwise it would write while a new job runs."""
    launcher = os.environ.pop(LAUNCHER, None)
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
        if launcher and int(launcher) != os.getppid():  # the launcher has already ended
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _passing_on(number: signal.Signals) -> Iterator[None]:
    """A context in which signals are forwarded to the ranks."""
    import psutil

    def pass_on(*_) -> None:
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    old = signal.signal(number, pass_on)
    try:
        yield
    finally:
        signal.signal(number, old)


def _status(failures: list) -> int:
    codes = [failure.exitcode for failure in failures]
    if set(codes) & set(PASSED_ON) and all(code in PASSED_ON or code < 0 for code in codes):
        return next(code for code in PASSED_ON if code in codes)
    if all(code < 0 for code in codes):
        one = min(failures, key=lambda failure: failure.timestamp)
        name = signal.Signals(-one.exitcode).name
        print(f"lowdft: rank {one.local_rank} was ended by {name}; the others were stopped", file=sys.stderr)
    return 1


def _processes(kind: str, processes: int | None) -> int:
    import torch

    gpus = torch.cuda.device_count()
    if processes is None and gpus == 0:
        raise UserError(f"--launch {kind}: found no GPU; wanted one for each process. On the CPU give --processes N.")
    if processes is not None and gpus and processes > gpus:
        raise UserError(f"--processes is {processes}, but this machine has {gpus} GPUs, and each process needs one")
    if kind == "fsdp" and gpus == 0:
        raise UserError("--launch fsdp needs GPUs; found none. On the CPU use --launch zero2, zero3 or ddp")
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"--launch {kind} needs DeepSpeed: `pip install 'lowdft[deepspeed]'`, or use --launch fsdp")
    if gpus == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return processes or gpus
