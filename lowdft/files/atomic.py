"""Atomic files: written under a temporary name, flushed to disk, then renamed.

After the rename the folder is flushed, too; until then a power failure could undo the rename.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

from safetensors import SafetensorError

from lowdft.errors import UserError
from lowdft.files.process import is_alive

ABANDONED = 24 * 3600  # seconds after which a temporary file of another machine counts as abandoned
ADVICE = {
    errno.ENOSPC: "free some space or choose another output_dir",
    errno.EDQUOT: "your quota is used up: free some space or choose another output_dir",
    errno.EROFS: "this place is read-only: choose another output_dir, or mount it for writing",
    errno.EACCES: "you may not write there: change the permissions, or choose another output_dir",
    errno.EPERM: "you may not write there: change the permissions, or choose another output_dir",
    errno.EIO: "the disk, or the connection to it, failed: check it or choose another output_dir",
}
CODED = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)  # safetensors, tokenizers and pyarrow write so
TORCH = re.compile(r"PytorchStreamWriter|inline_container|iostream error")  # torch.save on a full disk
_live: set[Path] = set()  # temporary files of this process
_concealed: dict[str, str] = {}  # value from the environment -> the recipe's reference to it


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success, what was written there atomically replaces `path`.

    Works for a file or a folder. On any error the temporary file is removed and `path` stays unchanged. When this
    returns, the new contents and their name have been flushed to disk.

    Raises:
        UserError: the disk is full or failing, or the location is not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_owner()}-{secrets.token_hex(4)}.tmp")
    _live.add(temporary)
    try:
        make_folder(path.parent)
        _remove_abandoned(path)
        yield temporary
        flush(temporary)
        _swap(temporary, path)
        sync_folder(path.parent)
    except Exception as error:
        if failure := write_error(path, error):
            raise failure from error
        raise
    finally:
        remove(temporary)
        _live.discard(temporary)


def write_error(path: str | Path | None, error: BaseException) -> UserError | None:
    """The error message for a failed write to `path`, or None if `error` is another kind of error.

    Python reports a full disk as an OSError; safetensors, tokenizers, pyarrow and torch raise other errors with the
    number in their text.
    """
    number = getattr(error, "errno", None)
    if number is None and (coded := CODED.search(str(error))):
        number = int(coded[1])
    known = isinstance(error, OSError | SafetensorError) or number in ADVICE or TORCH.search(str(error))
    if not known or isinstance(error, UserError):
        return None
    name = path or getattr(error, "filename", None) or "a file"
    reason = os.strerror(number) if number else (str(error).splitlines() or [type(error).__name__])[0]
    advice = ADVICE.get(number, "free some space or choose another output_dir")
    return UserError(
        f"{name} could not be written ({reason}). No incomplete file was kept; {advice}, then run the same command "
        "again."
    )


def make_folder(path: str | Path) -> None:
    """Makes a folder and its parents, and flushes each new entry to disk."""
    missing, path = [], Path(path)
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def flush(path: Path) -> None:
    """Flushes a file, or a folder with everything in it, to disk."""
    if path.is_dir():
        for inside in path.iterdir():
            flush(inside)
        sync_folder(path)
    elif path.is_file():
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries (names, renames, deletions) to disk, if the file system supports that."""
    if os.name == "nt":  # Windows has no such call
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a file or a folder if it exists and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _swap(temporary: Path, path: Path) -> None:
    if not (temporary.is_dir() and path.exists()):
        os.replace(temporary, path)
        return
    old = temporary.with_name(temporary.name.removesuffix(".tmp") + ".old.tmp")
    os.replace(path, old)
    os.replace(temporary, path)
    remove(old)


def _owner() -> str:
    return f"{re.sub('[^A-Za-z0-9]', '_', socket.gethostname())}-{os.getpid()}"


def _remove_abandoned(path: Path) -> None:
    """Removes temporary files of processes that have ended; those of running processes stay."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        found = re.fullmatch(r"(\w+)-(\d+)-\w+", left.name[len(path.name) + 2 :].split(".")[0])
        with contextlib.suppress(OSError):
            if found is None or found[1] != _owner().rpartition("-")[0]:
                dead = time.time() - left.stat().st_mtime > ABANDONED
            else:
                own = int(found[2]) == os.getpid()
                dead = left not in _live if own else not is_alive(int(found[2]))
            if dead:
                remove(left)


# ---- text and JSON --------------------------------------------------------------------------------------------------


def conceal(value: str, shown: str) -> None:
    """From now on, text files contain `shown` instead of `value` (if it has 8 characters or more)."""
    if len(value) >= 8:
        for form in {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], escape(value)}:
            _concealed[form] = shown


def concealed(text: str) -> str:
    """`text` with concealed values replaced."""
    for value in sorted(_concealed, key=len, reverse=True):
        text = text.replace(value, _concealed[value])
    return text


def as_written(value: dict) -> dict:
    """A dict as it would be read back from a file written by `write_json`."""
    return json.loads(concealed(json.dumps(value, ensure_ascii=False)))


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file atomically, with concealed values replaced; raises UserError if that fails."""
    with replacing(path) as temporary:
        temporary.write_text(concealed(text), encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Writes a JSON file atomically; raises UserError if that fails."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict:
    """Reads a JSON object; raises UserError if the file does not hold one."""
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: this file is not JSON ({error}). It was edited or truncated; delete it.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: found {type(value).__name__}; wanted a JSON object. It was edited; delete it.")
    return value
