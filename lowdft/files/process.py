"""This process and others, as the operating system sees them; Windows has no `resource`."""

from __future__ import annotations

import sys

import psutil


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
