"""What takes long to make and little to keep: made once by the first rank, remembered with what it was made from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.files import as_written, checksum_of, contents_of, damage_in, read_json, write_json


def cached(note: Path, made_from: dict, files: Sequence[Path], make: Callable[[], dict], again: bool = False) -> dict:
    """The facts that `make` returned, called anew unless `note` says that it ran with the same `made_from`.

    A note or a file that is missing, cut or changed since is made anew too. The first rank makes, the others wait for
    its note, however long that takes: they poll the file, since collective operations time out, and since not every
    stage runs on all ranks.

    Args:
        note: a JSON file beside what `make` writes.
        made_from: plain values.
        files: what `make` writes, beside the note.
        again: make it even where the note fits.
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
    """The facts in `note`, if it and its files are whole and made from this; else None."""
    try:
        found = read_json(note)
    except UserError:  # missing or damaged
        return None
    checksum = found.pop("checksum", None)
    if checksum != checksum_of(found) or found["made_from"] != as_written(made_from):
        return None
    return None if damage_in(note.parent, found["contents"]) else found["facts"]
