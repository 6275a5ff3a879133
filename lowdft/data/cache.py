"""A cache on disk: the first rank computes something slow once, and stores it with what it was made from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.files import as_written, checksum_of, contents_of, damage_in, read_json, write_json


def cached(note: Path, made_from: dict, files: Sequence[Path], make: Callable[[], dict], again: bool = False) -> dict:
    """Returns what `make` returned: from `note` if that has the same `made_from`, else by calling `make`.

    It is also called if the note or a file is missing, truncated or changed. Only the first rank calls it; the others
    wait for the note, however long that takes. They poll the file, because collective operations time out and because
    not every stage runs on all ranks.

    Args:
        note: a JSON file next to what `make` writes.
        made_from: plain values on which the result depends.
        files: names of the files that `make` writes, next to the note.
        again: call `make` even if the note matches.
    """
    if collectives.rank() == 0 and (again or facts_of(note, made_from) is None):
        note.unlink(missing_ok=True)
        facts = make()
        value = {"made_from": made_from, "facts": facts, "contents": {p.name: contents_of(p)["."] for p in files}}
        value = as_written(value)
        write_json(note, value | {"checksum": checksum_of(value)})
    while (facts := facts_of(note, made_from)) is None:
        time.sleep(0.1)
    return facts


def facts_of(note: Path, made_from: dict) -> dict | None:
    """The facts in `note`, if the note and its files are complete and were made from `made_from`; otherwise None."""
    try:
        found = read_json(note)
    except UserError:  # missing or damaged
        return None
    checksum = found.pop("checksum", None)
    if checksum != checksum_of(found) or found["made_from"] != as_written(made_from):
        return None
    return None if damage_in(note.parent, found["contents"]) else found["facts"]
