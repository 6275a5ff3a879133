"""Turns the rows given to `DFTTrainer` into `EncodedRows`: text in any layout of `formats`, or token ids."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from lowdft.data.checks import check_columns, check_row
from lowdft.data.encode import Encoder
from lowdft.data.encoded import EncodedRows
from lowdft.data.example import to_example
from lowdft.data.formats import to_row
from lowdft.data.layouts import LAYOUTS, BadRow, kind_of
from lowdft.data.load import SHOWN
from lowdft.data.read import Finding, Record
from lowdft.data.structs import own_columns
from lowdft.errors import InvalidRows, UserError

BESIDE = ("ref_negative_logps", "ref_logps", "sampling_prompt", "sampling_prompt_ids")  # copied from rows of text
ASKED = {columns[0] for columns in LAYOUTS.values()} - {"chosen"}  # columns that say what a prompt is
IDS = ("prompt_ids", "completion_ids")
RECIPES = re.compile(r",? or (?:pass --skip-invalid|(?:map|say)[^.]* data\.columns(?:: \{[^}]*\})?)")


def encode_rows(dataset: Iterable[Mapping] | EncodedRows, encoder: Encoder, name: str = "train_dataset") -> EncodedRows:
    """Rows of text or of ids as `EncodedRows`; rows without an `example_id` get their position.

    As in TRL, strings stay text, and messages go through the chat template. All layouts of recipes work (`messages`,
    `prompt` and `completion`, `chosen` and `rejected`, …; see `data.formats`). Pairs of whole texts, `chosen` and
    `rejected` alone, have an implicit prompt, as in TRL.

    Args:
        dataset: any iterable or sequence of dictionaries, also of torch and pandas; it is read in batches.
            `EncodedRows` are returned unchanged.
        encoder: with the trainer's lengths; it needs no tokenizer if the rows are ids already.
        name: the name of the data set in error messages.

    Raises:
        InvalidRows: some rows cannot be trained on; all of them are in one message.
        UserError: this is not a data set, or it has rows of text and there is no tokenizer.
    """
    if isinstance(dataset, EncodedRows):
        return dataset
    if isinstance(dataset, Mapping):
        raise UserError(
            f"{name} is a {type(dataset).__name__} of {', '.join(map(str, dataset))}; wanted one data set. Pass one of "
            f"them, as in {name}[{next(iter(dataset), 'train')!r}]."
        )
    if hasattr(dataset, "iterrows"):  # of pandas, where a missing value is NaN
        dataset = dataset.astype(object).where(dataset.notna(), None).to_dict("records")
    if isinstance(dataset, str) or not (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        raise UserError(f"{name} is {kind_of(dataset)}; wanted a data set or a list of rows")
    if hasattr(dataset, "with_format"):  # of `datasets`: Python values whatever its format, unless that is a function
        custom = (getattr(dataset, "format", None) or {}).get("type") == "custom"
        dataset = map(own_columns, dataset if custom else dataset.with_format(None))
    if not hasattr(dataset, "__iter__"):  # of torch
        dataset = map(dataset.__getitem__, range(len(dataset)))
    reading = _Reading(encoder, name)
    rows = EncodedRows.from_rows(reading.rows(dataset))
    reading.conclude(rows)
    return rows


class _Reading:
    """Encodes rows one after another, and collects findings about them."""

    def __init__(self, encoder: Encoder, name: str):
        self.encoder, self.name = encoder, name
        self.found: list[Finding] = []

    def rows(self, dataset: Iterable[Mapping]) -> Iterator[dict]:
        """Encoded rows; after the first bad row the others are only checked."""
        for i, row in enumerate(dataset):
            where = f"{self.name}[{i}]"
            if self.encoder.turns is None and isinstance(row, Mapping) and not any(key in row for key in IDS):
                raise UserError(
                    f"{where}: rows of text need a tokenizer: pass processing_class, or rows with prompt_ids, "
                    "completion_ids and negative_ids"
                )
            try:
                encoded = self._row(row, where)
            except BadRow as error:
                self.found.append(Finding(where, error.field, error.text))
            except UserError as error:
                self.found.append(Finding(where, "", str(error)))
            else:
                if encoded is not None:
                    yield {"example_id": str(i), **encoded}

    def _row(self, row: object, where: str) -> dict | None:
        if not isinstance(row, Mapping):
            raise BadRow("", f"is {kind_of(row)}; wanted a dictionary of columns.")
        row = {name: _plain(value) for name, value in row.items()}
        if any(key in row for key in IDS):
            _check_ids(row)
        else:
            row = self._of_text(row, where)
            if row is None:
                return None
        if row.get("example_id") is not None:
            row["example_id"] = str(row["example_id"])
        _check_reference(row)
        return self.encoder.row(row)

    def _of_text(self, row: dict, where: str) -> dict | None:
        """The parts of a row of text in the form that the encoder needs; None if the row has an error."""
        record = Record(where, _with_prompt(row))
        parts = to_row(record)
        found = [*check_row(parts), *check_columns(record, parts.layout, BESIDE)]
        self.found += found
        if any(not finding.warning for finding in found):
            return None
        example = to_example(parts, "direct")
        given = {name: row[name] for name in BESIDE if row.get(name) is not None}
        return given | {
            "example_id": parts.given_id,
            "prompt": example.prompt,
            "completion": example.completion,
            "negatives": example.negatives,
            "tools": example.tools,
            "aligned_logps": example.aligned_logps,
        }

    def conclude(self, rows: EncodedRows) -> None:
        """Raises InvalidRows with all errors, or gives the warnings. `rows` are the valid rows."""
        errors = [finding for finding in self.found if not finding.warning]
        if errors:
            lines = [RECIPES.sub("", str(error)) for error in errors[:SHOWN]]
            more = [f"… and {len(errors) - SHOWN} more errors"] if len(errors) > SHOWN else []
            raise InvalidRows("\n".join([*lines, *more]), rows)
        for kind in dict.fromkeys(finding.warning for finding in self.found):
            wheres = list(dict.fromkeys(finding.where for finding in self.found if finding.warning == kind))
            shown = ", ".join(wheres[:3]) + (", …" if len(wheres) > 3 else "")
            warnings.warn(f"{len(wheres)} rows with {kind} ({shown})", stacklevel=5)


def _with_prompt(row: dict) -> dict:
    """TRL's implicit prompt: splits the texts `chosen` and `rejected` into their common first words and the rest."""
    texts = {name: row[name] for name in ("chosen", "rejected") if isinstance(row.get(name), str)}
    others = [name for name in ASKED if row.get(name) is not None]
    if len(texts) < 2 or others:
        return row
    common = os.path.commonprefix([*texts.values()])
    end = max((i for i, letter in enumerate(common) if letter.isspace()), default=-1) + 1
    end -= common[end - 1 : end] == " "  # a space belongs to the word after it
    return row | {"prompt": common[:end]} | {name: text[end:] for name, text in texts.items()}


def _check_ids(row: dict) -> None:
    """Raises BadRow unless the columns of ids are lists of integers, and `negative_ids` is a list of such lists."""
    for name in IDS:
        if name not in row:
            raise BadRow(name, f"is missing (found: {', '.join(map(str, row))}); rows of ids have {' and '.join(IDS)}.")
    lists = {name: row[name] for name in (*IDS, "sampling_prompt_ids") if row.get(name) is not None or name in IDS}
    negatives = row.get("negative_ids")
    if not isinstance(negatives or [], list):
        raise BadRow("negative_ids", f"is {kind_of(negatives)}; a list of lists of token ids is needed.")
    lists |= {f"negative_ids[{k}]": ids for k, ids in enumerate(negatives or [])}
    for name, ids in lists.items():
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
            raise BadRow(name, f"is {kind_of(ids)}; a list of token ids (0 or more, below 2^31) is needed.")


def _check_reference(row: dict) -> None:
    """Raises BadRow unless the reference log-probabilities are one number per negative, and one for the completion."""
    logps = row.get("ref_negative_logps")
    if logps is not None:
        negatives = row.get("negative_ids", row.get("negatives")) or []
        if not isinstance(logps, list) or len(logps) != len(negatives) or not all(map(_is_number, logps)):
            wanted = f"a list of {len(negatives)} numbers, one per negative, is needed"
            raise BadRow("ref_negative_logps", f"is {kind_of(logps)}; {wanted}.")
    for name in ("ref_logps", "aligned_logps"):
        if row.get(name) is not None and not _is_number(row[name]):
            raise BadRow(name, f"is {kind_of(row[name])}; a number is needed.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: object) -> object:
    """Tensors and arrays, also inside lists, as Python values."""
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float | str):
        return [_plain(one) for one in value]
    return list(value) if isinstance(value, tuple) else value
