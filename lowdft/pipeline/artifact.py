"""The run folder: every step's product stands in it beside a manifest of what it was made from.

A step is skipped when its product matches, goes on where it was interrupted, and refuses a mismatch in words.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

from lowdft import __version__
from lowdft.errors import UserError
from lowdft.files import read_json, write_json

VERSION = "version."  # begins the keys of `made_from` that may differ


@dataclass
class Product:
    """One file or folder of a run, `path`, and what it is made from: a flat dict of plain values."""

    path: Path
    made_from: dict

    @property
    def manifest(self) -> Path:
        return self.path.with_name(self.path.name + ".manifest.json")

    def is_done(self) -> bool:
        """True when the finished product is there and matches; False when it is absent or unfinished.

        Raises:
            UserError: it was made from something else; every difference is named.
        """
        if not self.manifest.is_file():
            if self.path.exists():
                raise UserError(
                    f"{self.path}: has no manifest, so nobody knows what it was made from. Move it away, "
                    "or choose another output_dir."
                )
            return False
        found = read_json(self.manifest)
        old = found["made_from"]
        differing = [k for k in {**old, **self.made_from} if old.get(k) != self.made_from.get(k)]
        if versions := [k for k in differing if k.startswith(VERSION)]:
            _warn("; ".join(f"{k.removeprefix(VERSION)} {old.get(k)} -> {self.made_from.get(k)}" for k in versions))
        if differing := [k for k in differing if k not in versions]:
            told = "; ".join(f"{k} was {_short(old.get(k))}, is now {_short(self.made_from.get(k))}" for k in differing)
            raise UserError(
                f"{self.path}: was made with other settings ({told}). Use them again, choose another output_dir, or "
                f"delete {self.path.name} and {self.manifest.name} to make it anew."
            )
        return found["done"] and self.path.exists()

    def begin(self) -> None:
        """Notes what is being made, so that an interrupted step can go on or refuse."""
        write_json(self.manifest, {"done": False, "lowdft": __version__, "made_from": self.made_from})

    def finish(self, **facts) -> None:
        """Notes that the product is whole, with facts worth keeping (counts, seconds)."""
        write_json(self.manifest, {"done": True, "lowdft": __version__, "made_from": self.made_from, "facts": facts})

    def facts(self) -> dict:
        """What `finish` noted."""
        return read_json(self.manifest).get("facts", {})


@functools.lru_cache
def _warn(changed: str) -> None:
    """Once per process and change."""
    text = "warning: packages changed since this run folder was begun (%s): numbers may differ by rounding"
    logging.getLogger("lowdft").info(text, changed)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
