"""Files that are whole or not there: written beside their place, flushed to disk, then renamed into it."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lowdft.errors import UserError

WRITE_ERRORS = (OSError, SafetensorError)  # what a full disk raises, by who was writing


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path of the same folder; on success what was written there becomes `path`, at once.

    Works for a file or a folder. On any error the temporary is removed and `path` stays as it was. One process at a
    time may write a path.

    Raises:
        UserError: the disk is full, or the place is not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a process that was killed
            _remove(left)
        yield temporary
        flush_to_disk(temporary)
        if temporary.is_dir() and path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except WRITE_ERRORS as error:
        raise UserError(
            f"{path}: could not be written ({reason(error)}). Nothing half-written was kept; free some space or choose "
            "another output_dir, then run the same command again."
        ) from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """Why a write failed, in a line."""
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0]


def flush_to_disk(path: Path) -> None:
    """Asks the operating system to put a file, or every file below a folder, on the disk itself."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def write_text(path: str | Path, text: str) -> None:
    """Writes a whole UTF-8 text file atomically; UserError when it cannot."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Writes a whole JSON file atomically; UserError when it cannot."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict:
    """Reads a JSON object; UserError when the file is not one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON ({error}). It was changed by hand or cut off; delete it.") from error
