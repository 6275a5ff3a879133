"""What takes long to make and little to keep: made once by the first rank, remembered with what it was made from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from lowdft.distributed import collectives
from lowdft.files import read_json, write_json


def cached(note: Path, made_from: dict, make: Callable[[], dict], again: bool = False) -> dict:
    """The facts that `make` returned, called anew unless `note` says that it ran with the same `made_from`.

    The first rank makes, the others wait for its note, however long that takes: they poll the file, since collective
    operations time out, and since not every stage runs on all ranks.

    Args:
        note: a JSON file beside what `make` writes.
        made_from: plain values.
        again: make it even where the note fits.
    """
    if collectives.rank() == 0 and (again or _facts(note, made_from) is None):
        note.unlink(missing_ok=True)
        write_json(note, {"made_from": made_from, "facts": make()})
    while (facts := _facts(note, made_from)) is None:
        time.sleep(0.1)
    return facts


def _facts(note: Path, made_from: dict) -> dict | None:
    if not note.is_file():
        return None
    found = read_json(note)
    return found["facts"] if found["made_from"] == json.loads(json.dumps(made_from)) else None
