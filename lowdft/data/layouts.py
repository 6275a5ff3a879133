"""Finds the layout of a row from its columns, and the error message if there is none."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection

from lowdft.data.read import REMOVE, cut
from lowdft.errors import UserError
from lowdft.text import nearest

LAYOUTS = {  # multiple choice is separate, see `choices`
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt+completion": ("prompt", "completion"),
    "prompt+chosen": ("prompt", "chosen"),
    "prompt+real": ("prompt", "real"),
    "question+answer": ("question", "answer"),
    "instruction+output": ("instruction", "output"),
    "chosen": ("chosen",),
    "real": ("real",),
    "prompt+answer": ("prompt", "answer"),
    "query+response": ("query", "response"),
}
ONLY_ALONE = ("chosen", "real", "prompt+answer", "query+response")  # used only if no other layout fits
CONVERSATIONS = ("messages", "conversations", "chosen", "real")
MAPPABLE = ("prompt", "completion", "messages", "choices", "negatives", "example_id", "tools", "system", "answer",
            "aligned_logps")  # fmt: skip
KNOWN_COLUMNS = [*dict.fromkeys(c for needed in LAYOUTS.values() for c in needed), "input", "negatives", "rejected"]
NEGATIVES = re.compile(r"negatives|(rejected|generated)(_\d+)?")  # columns of negatives


class BadRow(UserError):
    """A row that fits no layout. `field` is the place; `text` says what was found, what was wanted and the fix."""

    def __init__(self, field: str, text: str):
        super().__init__(f"{field} {text}".strip())
        self.field, self.text = field, text


def detect_layout(columns: Collection[str], mapped: Collection[str] = (), expected: str | None = None) -> str:
    """The layout of these columns. Names in `mapped` take precedence; `expected` is the layout of the file.

    Raises:
        BadRow: no layout fits; the message lists the columns found and the nearest known name or all layouts.
    """
    fitting = fitting_layouts(columns, mapped)
    if not fitting:
        raise no_layout(list(columns), expected)
    return fitting[0]


def fitting_layouts(columns: Collection[str], mapped: Collection[str]) -> list[str]:
    """The layouts whose columns are all present; of several, those with most columns in `mapped`."""
    fitting = [name for name, needed in LAYOUTS.items() if all(c in columns for c in needed)]
    fitting = [name for name in fitting if name not in ONLY_ALONE] or fitting[:1]
    by_map = {name: len(set(LAYOUTS[name]) & set(mapped)) for name in fitting}
    return [name for name in fitting if by_map[name] == max(by_map.values())]


@functools.lru_cache
def unused_columns(columns: tuple[str, ...], layout: str, others: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The columns that a row of this layout does not use; `others` are used besides those that lowdft knows.

    For multiple choice there are none.
    """
    if layout not in LAYOUTS:
        return ()
    used = {*LAYOUTS[layout], *MAPPABLE, *others, "id"} | ({"input"} if layout.startswith("instr") else set())
    return tuple(str(name) for name in columns if name not in used and not NEGATIVES.fullmatch(str(name)))


@functools.cache
def meant(column: str) -> str | None:
    """The name of a further column that an unused one is close to."""
    return nearest(column, ("negatives", "rejected", "system", "tools", "aligned_logps"), cutoff=0.6)


def no_layout(columns: list[str], expected: str | None) -> BadRow:
    """The error for columns that fit no layout."""
    if not columns:
        return BadRow("", f"the row has no columns; one of these is wanted: {', '.join(LAYOUTS)}. {REMOVE}")
    found = cut(", ".join(map(str, columns)))
    for column in columns:
        near = nearest(str(column), KNOWN_COLUMNS)
        if near and near != column and near not in columns:
            return BadRow(
                cut(column),
                f'is an unknown column (of {found}); did you mean "{near}"? Rename it, or map it with data.columns.',
            )
    if "text" in columns:
        return BadRow(
            "text",
            f"is plain text (found: {found}); it is not clear where the prompt ends and the answer begins, so no "
            "token can be scored. Write a prompt and a completion column.",
        )
    if expected in LAYOUTS:
        missing = next(c for c in LAYOUTS[expected] if c not in columns)
        return BadRow(missing, f"is missing ({found} found); the layout of this file is {expected}. {REMOVE}")
    return BadRow(
        cut(columns[0]),
        f"is of no known layout (columns found: {found}); known are {', '.join(LAYOUTS)}, question+choices+answer. "
        "Rename the columns, or map them with data.columns: {prompt: …, completion: …}.",
    )


def kind_of(value: object) -> str:
    """A JSON value's type in plain words, with the value shortened."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return f"{names.get(type(value), type(value).__name__)} ({cut(value, 40)})"


def json_list(value: object) -> object:
    """A list from its JSON text, as in CSV and many parquet files; anything else is unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
