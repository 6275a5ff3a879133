"""Files that are whole or not there: written beside their place, flushed to disk, then renamed into it.

After the rename the folder is flushed too: until then a power failure may undo it.
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

ABANDONED = 24 * 3600  # seconds after which a temporary of another machine is taken for a dead process's
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
_live: set[Path] = set()  # temporaries of this very process
_concealed: dict[str, str] = {}  # text of the environment that a recipe refers to -> how it refers to it


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path of the same folder; on success what was written there becomes `path`, at once.

    Works for a file or a folder. On any error the temporary is removed and `path` stays as it was. When this returns,
    the new contents and their name are on the disk itself.

    Raises:
        UserError: the disk is full or failing, or the place is not writable.
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
    """What to tell people about a failed write to `path`; None when `error` is another kind of error.

    A full disk is an OSError of Python's own writers, and some other error with a number in its text from those of
    safetensors, tokenizers, pyarrow and torch.
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
        f"{name}: could not be written ({reason}). Nothing half-written was kept; {advice}, then run the same command "
        "again."
    )


def make_folder(path: str | Path) -> None:
    """Makes a folder and its parents, each entered in its parent on the disk itself."""
    missing, path = [], Path(path)
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def flush(path: Path) -> None:
    """Asks the operating system to put a file, or a folder with all that is in it, on the disk itself."""
    if path.is_dir():
        for inside in path.iterdir():
            flush(inside)
        sync_folder(path)
    elif path.is_file():
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())


def sync_folder(path: Path) -> None:
    """Puts a folder's entries (names, renames, deletions) on the disk itself, where the file system can."""
    if os.name == "nt":  # which has no such call
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
    """Removes a file or a folder if it is there and can be removed."""
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
    """Removes temporaries of processes that are no more; those of a live process stay."""
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
    """From now on `value` (8 characters or more) is never written to a text file; `shown` stands in its place."""
    if len(value) >= 8:
        for form in {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], escape(value)}:
            _concealed[form] = shown


def concealed(text: str) -> str:
    """`text` as it may be written."""
    for value in sorted(_concealed, key=len, reverse=True):
        text = text.replace(value, _concealed[value])
    return text


def as_written(value: dict) -> dict:
    """A dict as it is read back from a file of `write_json`."""
    return json.loads(concealed(json.dumps(value, ensure_ascii=False)))


def write_text(path: str | Path, text: str) -> None:
    """Writes a whole UTF-8 text file atomically, without what `conceal` was told; UserError when it cannot."""
    with replacing(path) as temporary:
        temporary.write_text(concealed(text), encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Writes a whole JSON file atomically; UserError when it cannot."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict:
    """Reads a JSON object; UserError when the file is not one."""
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not JSON ({error}). It was changed by hand or cut off; delete it.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object but {type(value).__name__}. It was changed; delete it.")
    return value
