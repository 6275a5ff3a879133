"""Reports every operation by which this process changes files below a folder, before it happens, or makes it fail.

    import operations
    operations.preload()                      # first of all: restarts the program with `operations.c` in front of libc
    operations.watch(folder, act)             # act(name, path) -> 0, or the errno with which the operation fails

It sees calls of Python and those of C, C++ and Rust that go through libc (needs Linux and a C compiler).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

CALLED = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)
NEW_MOUNTS, PRIVATE, BIND = 0x20000, 0x44000, 0x1000  # CLONE_NEWNS, MS_REC | MS_PRIVATE, MS_BIND
_kept: list = []  # ctypes does not keep callbacks alive


def preload() -> None:
    """Compiles the library and restarts this program with it in front of libc; does nothing if it is already there."""
    if "operations.so" in os.environ.get("LD_PRELOAD", ""):
        return
    library = Path(tempfile.mkdtemp()) / "operations.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    os.execve(sys.executable, sys.orig_argv, os.environ | {"LD_PRELOAD": str(library)})


def watch(folder: Path, act: Callable[[str, str], int]) -> None:
    """From now on `act` is called before each operation of the main thread below `folder`, until the process ends."""

    def called(name: bytes, path: bytes) -> int:
        if threading.get_native_id() != os.getpid():
            return 0
        try:
            return act(name.decode(), path.decode(errors="replace"))
        except BaseException:
            traceback.print_exc()
            os._exit(99)

    _kept.append(CALLED(called))
    ctypes.CDLL(None).watch_operations(_kept[-1], str(folder).encode())


def replace_for_me(folder: Path, copy: Path) -> None:
    """Makes this process, but no other, see `copy` in place of `folder` (Linux, root)."""
    libc = ctypes.CDLL(None, use_errno=True)
    steps = [
        libc.unshare(NEW_MOUNTS),
        libc.mount(b"none", b"/", None, ctypes.c_ulong(PRIVATE), None),
        libc.mount(str(copy).encode(), str(folder).encode(), None, ctypes.c_ulong(BIND), None),
    ]
    if any(steps):
        raise OSError(ctypes.get_errno(), "cannot mount: this needs root")
