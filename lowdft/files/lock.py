"""A lock, so that only one process at a time writes a folder."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lowdft.errors import UserError
from lowdft.files.atomic import make_folder, write_error

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: str | Path, wait: bool = False) -> Iterator[None]:
    """Locks `folder` for this process; the operating system releases the lock when the process ends for any reason.

    With several ranks, the first holds it for all (those that `wait` take turns). The lock is flock(2) (Windows:
    msvcrt) on the file `.lock` in the folder, which stays there and names its last holder.

    Args:
        folder: is created if it is missing.
        wait: wait for the other holder instead of raising.

    Raises:
        UserError: another process holds it (named by machine and process id), or the folder is not writable.
    """
    if int(os.environ.get("RANK", "0")) > 0 and not wait:
        yield
        return
    path = Path(folder) / NAME
    lock = FileLock(path, timeout=-1 if wait else 0, thread_local=False)
    try:
        make_folder(folder)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: another lowdft is writing this folder ({_holder(path)}). Wait until it ends, or choose another "
            "output_dir. Nothing was changed."
        ) from None
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        with contextlib.suppress(OSError):  # Windows lets nobody else write a locked file
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        lock.release()


def check_free(folder: str | Path) -> None:
    """Raises UserError at once, without creating anything, if another process holds `folder`."""
    if (Path(folder) / NAME).is_file():
        with locked(folder):
            pass


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")[:200] or "it has just started"
    except (OSError, ValueError):
        return "its name cannot be read"
