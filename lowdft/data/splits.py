"""Training rows and held-out rows: read and checked once, then kept in the run folder as Arrow files."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lowdft import __version__
from lowdft.config.sections import DataSection
from lowdft.data.arrow import map_table, write_table
from lowdft.data.cache import cached
from lowdft.data.examples import SCHEMA, Examples, record_batches
from lowdft.data.labels import find_labels, with_labels
from lowdft.data.load import Loaded, load_examples, overlap
from lowdft.errors import InvalidRows, UserError
from lowdft.files import digest_of
from lowdft.files.packages import local_path

SPLITS = ("train", "heldout")
log = logging.getLogger("lowdft")


@dataclass
class Splits:
    """Both splits, the layout of the training rows, and a digest of each split."""

    train: Examples
    heldout: Examples
    layout: str
    digests: dict[str, str]


def load_splits(section: DataSection, folder: Path) -> Splits:
    """Reads and checks the rows, or maps those that an earlier call left in `folder` for the same data and settings.

    In both cases it logs the notes and warnings of reading.

    Raises:
        InvalidRows: training or held-out rows are invalid; all of them are in one message, and `valid` holds the valid
            training rows.
        UserError: the data cannot be read, or no rows are left to train on.
    """
    settings = dataclasses.asdict(section)
    digests = [_digest(section, section.train, section.split, section.revision)]
    if section.eval:
        digests.append(_digest(section, section.eval, section.eval_split, section.eval_revision or section.revision))
    made_from = {"lowdft": __version__, "data": settings, "contents": digests}
    paths = {name: folder / f"{name}.arrow" for name in SPLITS}
    facts = cached(
        folder / "rows.json", made_from, list(paths.values()), lambda: _make(section, paths), again=None in digests
    )
    for line in facts["lines"]:
        log.info(line)
    tables = {name: Examples(map_table(path)) for name, path in paths.items()}
    return Splits(**tables, layout=facts["layout"], digests=facts["digests"])


def _make(section: DataSection, paths: dict[str, Path]) -> dict:
    lines, errors = [], []
    loaded = _load(section, section.train, section.split, section.revision, lines, errors)
    rows, held = loaded.examples, []
    if section.eval:
        revision = section.eval_revision or section.revision
        held = _load(section, section.eval, section.eval_split, revision, lines, errors).examples[: section.eval_rows]
    if errors:
        valid = pa.Table.from_batches(record_batches(rows[: section.train_rows]), SCHEMA)
        raise InvalidRows("\n".join(errors), Examples(valid))
    if section.eval_rows and not section.eval:
        if section.eval_rows >= len(rows):
            raise UserError(f"data.eval_rows is {section.eval_rows}, but data.train has {len(rows)} rows; wanted fewer")
        rows, held = rows[: -section.eval_rows], rows[-section.eval_rows :]
    if section.tune_rows:
        rows, held = rows[: -section.tune_rows], rows[-section.tune_rows :]
    rows = rows[: section.train_rows]
    if section.labels is not None:
        labels = find_labels(rows) if section.labels == "auto" else section.labels
        lines.append(f"labels: {', '.join(map(str, labels))}")
        rows, held = with_labels(rows, labels), with_labels(held, labels)
    lines += [f"warning: {warning}" for warning in overlap(rows, held)]
    found = {}
    for name, examples in zip(SPLITS, (rows, held), strict=True):
        write_table(paths[name], SCHEMA, record_batches(examples))
        found[name] = Examples(map_table(paths[name])).fingerprint()
    return {"layout": loaded.layout, "lines": lines, "digests": found}


def _load(
    section: DataSection, source: str, split: str, revision: str | None, lines: list[str], errors: list[str]
) -> Loaded:
    """The valid rows of a source; adds notes and warnings to `lines`, and errors to `errors`."""
    try:
        loaded = load_examples(
            source,
            split=split,
            revision=revision,
            columns=dict(section.columns),
            prompt_style=section.prompt_style,
            system_prompt=section.system_prompt,
            prompt_template=section.prompt_template,
            skip_invalid=section.skip_invalid,
        )
    except InvalidRows as error:
        errors.append(str(error))
        return Loaded(error.valid, "", [], [], 0, "")
    lines += [f"{source}: {note}" for note in [*loaded.notes, *(f"warning: {w}" for w in loaded.warnings)]]
    return loaded


def _digest(section: DataSection, source: str, split: str, revision: str | None) -> str | None:
    """A hash of a source's contents without parsing them; None if it cannot be read (reading it reports why)."""
    try:
        path = local_path(source)
        if path.is_file():
            return digest_of(path)
        if source.startswith("toy:"):
            return source
        if path.exists():  # a folder
            return None
        import datasets

        name, _, config = source.partition(":")
        return datasets.load_dataset(name, config or None, split=split, revision=revision)._fingerprint
    except Exception:  # reading the source reports what is wrong with it
        return None
