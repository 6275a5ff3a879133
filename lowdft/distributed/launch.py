"""The same command on several processes, by `accelerate launch` with one of the configurations in `launchers/`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from lowdft.errors import UserError

FOLDER = Path(__file__).parent / "launchers"


def command(kind: str, processes: int, arguments: list[str]) -> list[str]:
    """What runs `lowdft` with these arguments on so many processes of this machine."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{kind}.yaml")]
    return [*launcher, "--num_processes", str(processes), "--main_process_port", "0", "-m", "lowdft", *arguments]


def become(kind: str, processes: int | None, arguments: list[str]) -> None:
    """Replaces this process by its launcher; does not return.

    Args:
        kind: ddp, fsdp, zero2 or zero3.
        processes: how many; None: one for each GPU.
        arguments: of `lowdft`, without those that say how to launch.

    Raises:
        UserError: no GPU was found and no number given, or DeepSpeed is not installed.
    """
    import torch

    gpus = torch.cuda.device_count()
    if processes is None and gpus == 0:
        raise UserError(f"--launch {kind}: found no GPU; wanted one for each process, or --processes N on the CPU")
    if processes is not None and gpus and processes > gpus:
        raise UserError(f"--processes is {processes}; this machine has {gpus} GPUs, and each process needs its own")
    if kind == "fsdp" and gpus == 0:
        raise UserError("--launch fsdp needs GPUs; found none. On the CPU use --launch zero2, zero3 or ddp")
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"--launch {kind} needs DeepSpeed: `pip install 'lowdft[deepspeed]'`; or use --launch fsdp")
    if gpus == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    line = command(kind, processes or gpus, arguments)
    os.execv(line[0], line)
