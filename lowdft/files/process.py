"""Memory of this process, and whether other processes exist, on all systems (Windows has no `resource`)."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil

M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def peak_bytes() -> float:
    """Peak resident memory of this process, in bytes."""
    if sys.platform == "linux":  # ru_maxrss would include that of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if found := status.partition("VmHWM:")[2].split():
            return 1024 * float(found[0])
    try:
        import resource
    except ImportError:
        return float(psutil.Process().memory_info().peak_wset)  # Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def is_alive(process: int) -> bool:
    """Whether there is a process with this id on this machine. (On Windows, `os.kill(id, 0)` would send Ctrl-C.)"""
    return psutil.pid_exists(process)


def return_freed_memory(block: int = 2**20) -> None:
    """From now on, freed memory blocks of at least `block` bytes are returned to the system at once (glibc only).

    Otherwise glibc keeps freed activations: a checkpointed step of SmolLM2-135M peaked at 3.2 GB instead of 1.5. Steps
    with small activations take a fifth longer, so this is only used if memory is to be saved.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, block)
