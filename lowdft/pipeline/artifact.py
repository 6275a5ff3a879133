"""The artifacts in a run folder: each stage's product has a manifest of what it was made from and what it contains.

A stage is skipped if its product matches, and resumes if it was interrupted. It stops and lists the differences if the
product was made with other settings, or if its content is no longer what was written.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lowdft import __version__
from lowdft.errors import UserError
from lowdft.files import as_written, checksum_of, contents_of, damage_in, read_json, write_json

VERSION = "version."  # prefix of the keys of `made_from` that may differ


@dataclass
class Product:
    """One file or folder of a run, `path`, and what it is made from: a flat dict of plain values."""

    path: Path
    made_from: dict

    @property
    def manifest(self) -> Path:
        return self.path.with_name(self.path.name + ".manifest.json")

    def is_done(self) -> bool:
        """True if the product is finished, matches and is undamaged; False if it is missing or unfinished.

        Raises:
            UserError: it was made from something else (lists every difference), or its content is not what was written.
        """
        if not self.manifest.is_file():
            if self.path.exists():
                raise UserError(
                    f"{self.path} has no manifest, so it is unknown what it was made from. Restore "
                    f"{self.manifest.name}, move {self.path.name} away, or choose another output_dir."
                )
            return False
        found = self._read()
        old, new = found["made_from"], as_written(self.made_from)
        differing = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        if versions := [k for k in differing if k.startswith(VERSION)]:
            _warn("; ".join(f"{k.removeprefix(VERSION)} {old.get(k)} -> {new.get(k)}" for k in versions))
        if differing := [k for k in differing if k not in versions]:
            told = "; ".join(f"{k} was {old.get(k)!r}, is now {new.get(k)!r}" for k in differing)
            raise UserError(
                f"{self.path} was made with other settings ({told}). Use the old settings, choose another output_dir, "
                f"or delete {self.path.name} and {self.manifest.name} to make it again."
            )
        if not (found["done"] and self.path.exists()):
            return False
        self.require_whole()
        return True

    def require_whole(self) -> None:
        """Raises UserError if the content is not what was written, whatever it was made from."""
        if damage := damage_in(self.path, self._read().get("contents", {})):
            raise UserError(
                f"{damage}: it was changed, cut or damaged after it was made. Restore it, or delete {self.path} and "
                f"{self.manifest.name} to make it again."
            )

    def begin(self) -> None:
        """Records what is being made, so that an interrupted stage can resume or stop."""
        self._write({"done": False})

    def finish(self, **facts) -> None:
        """Records that the product is complete, its contents, and facts about it (counts, seconds)."""
        self._write({"done": True, "facts": facts, "contents": contents_of(self.path)})

    def facts(self) -> dict:
        """The facts that `finish` recorded."""
        return self._read().get("facts", {})

    def base(self) -> str | None:
        """The identity of the base that the product was made with."""
        return self._read()["made_from"].get("base")

    def content(self) -> str | None:
        """A hash of everything in the finished product; None if it is not finished."""
        contents = self._read().get("contents") if self.manifest.is_file() else None
        return contents and checksum_of(contents)

    def _write(self, value: dict) -> None:
        value = as_written({"lowdft": __version__, "made_from": self.made_from, **value})
        write_json(self.manifest, value | {"checksum": checksum_of(value)})

    def _read(self) -> dict:
        found = read_json(self.manifest)
        checksum = found.pop("checksum", None)
        if checksum not in (None, checksum_of(found)) or not {"done", "made_from"} <= found.keys():
            raise UserError(
                f"{self.manifest} was changed or damaged, so it is unknown what {self.path.name} was made from. "
                f"Restore the manifest, or delete it and {self.path.name} to make both again."
            )
        return found


def require_matching(products: Iterable[Product]) -> None:
    """Raises UserError that names every existing product that was made with other settings, or is damaged."""
    faults = []
    for product in (one for one in products if one.manifest.is_file()):
        try:
            product.is_done()
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))


@functools.lru_cache
def _warn(changed: str) -> None:
    """Warns once per process and change."""
    text = "warning: packages changed since this run folder was started (%s): numbers may differ by rounding"
    logging.getLogger("lowdft").info(text, changed)
