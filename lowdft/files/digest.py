"""Sizes and hashes of the files in a folder, and what has changed since they were recorded."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE = 1 << 24  # bytes per hash; several threads hash the pieces of a large file
_known: dict[tuple, str] = {}  # hashes that this process has computed, valid while time and size are unchanged


def digest_of(path: str | Path) -> str:
    """The BLAKE2b hash of a file's content: 32 hexadecimal digits.

    For a file larger than 16 MiB it is the hash of the hashes of its 16 MiB pieces, so that several cores share the
    work and a checkpoint of many gigabytes is read at the speed of the disk.
    """
    path = Path(path)
    now = path.stat()
    key = (str(path.absolute()), now.st_ino, now.st_size, now.st_mtime_ns)
    if key not in _known:
        _known[key] = _digest(path, now.st_size)
    return _known[key]


def _digest(path: Path, size: int) -> str:
    def piece(start: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return hashlib.blake2b(file.read(PIECE), digest_size=16).digest()

    starts = range(0, max(1, size), PIECE)
    if len(starts) == 1:
        return piece(0).hex()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.blake2b(b"".join(pool.map(piece, starts)), digest_size=16).hexdigest()


def contents_of(path: str | Path) -> dict[str, list]:
    """[size in bytes, hash] of a file (by the name "."), or of every file below a folder, by relative name."""
    path = Path(path)
    if path.is_file():
        return {".": [path.stat().st_size, digest_of(path)]}
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): [p.stat().st_size, digest_of(p)] for p in files}


def checksum_of(value: dict) -> str:
    """A hash of a JSON object, to be stored in the same file."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def damage_in(path: str | Path, noted: dict[str, list]) -> str | None:
    """The first file that is missing or changed since `contents_of`, in words; None if there is none.

    Files that were added since are ignored.
    """
    path = Path(path)
    for name, (size, digest) in noted.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        try:
            if (found := file.stat().st_size) != size:
                return f"{file} has {found} bytes, but {size} were written"
            if digest_of(file) != digest:
                return f"{file} has other contents than were written"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror or error})"
    return None
