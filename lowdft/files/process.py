"""This process and others, as the operating system sees them; Windows has no `resource`."""

from __future__ import annotations

import ctypes
import sys

import psutil

M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def peak_bytes() -> float:
    """Peak resident memory of this process, in bytes."""
    try:
        import resource
    except ImportError:
        return float(psutil.Process().memory_info().peak_wset)  # Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def is_alive(process: int) -> bool:
    """Is there a process of this id on this machine? (`os.kill(id, 0)` sends Ctrl-C on Windows.)"""
    return psutil.pid_exists(process)


def return_freed_memory(block: int = 2**20) -> None:
    """From here on, freed memory of at least `block` bytes goes back to the system at once; glibc alone has this.

    It keeps freed activations otherwise: a checkpointed step of SmolLM2-135M peaked at 3.2 GB instead of 1.5. The price
    is a fifth of the time of steps whose activations are small, so this is for those who save memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, block)
