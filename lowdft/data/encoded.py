"""Rows of token ids in Arrow columns; a row becomes Python lists only when it is accessed.

A token id takes four bytes. Rows read from a file stay on disk, and all processes map the same copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from lowdft.data.arrow import batches, content_digest

IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "example_id": pa.string(),
        "prompt_ids": IDS,
        "completion_ids": IDS,
        "negative_ids": pa.list_(IDS),
        "ref_negative_logps": pa.list_(pa.float64()),
        "ref_logps": pa.float64(),
        "aligned_logps": pa.float64(),
        "sampling_prompt_ids": IDS,
        "mismatched_ids": IDS,
        "ref_mismatched_logps": pa.float64(),
    }
)
REQUIRED = SCHEMA.names[:4]


class EncodedRows(Dataset):
    """Rows for training and evaluation.

    `rows[i]` is a dictionary with `example_id`, `prompt_ids`, `completion_ids` (lists of ints) and `negative_ids` (a
    list of such lists). If the row has them, it also contains `ref_negative_logps` (a number per negative),
    `ref_logps`, `aligned_logps`, `sampling_prompt_ids`, `mismatched_ids` (another row's completion) and
    `ref_mismatched_logps`.
    `rows[a:b]` is an `EncodedRows` on the same memory.

    Args:
        table: columns of `SCHEMA`, at least the first four.
    """

    def __init__(self, table: pa.Table):
        self.table = table

    @classmethod
    def from_rows(cls, rows: Iterable[dict]) -> EncodedRows:
        """Rows from dictionaries, read in batches: of a stream, only one batch is in memory as Python objects."""
        parts = [record_batch(part) for part in batches(rows)]
        return cls(drop_unused(pa.Table.from_batches(parts, SCHEMA)))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int | slice) -> dict | EncodedRows:
        if isinstance(i, slice):
            return EncodedRows(self.table[i])
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        found = {name: _plain(self.table[name][int(i)]) for name in self.table.column_names}
        return {name: value for name, value in found.items() if value is not None}

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[int, dict]]:
        """What a data loader passes to `collate`: every row with its position."""
        return [(i, self[i]) for i in numbers]

    def __iter__(self) -> Iterator[dict]:
        return (self[i] for i in range(len(self)))

    def has(self, name: str) -> np.ndarray:
        """bool [rows]: which rows have a value of the column."""
        if name not in self.table.column_names:
            return np.zeros(len(self), bool)
        return self.table[name].is_valid().to_numpy()

    def lengths(self, name: str) -> np.ndarray:
        """int [rows]: tokens of `prompt_ids` or `completion_ids`, or how many `negative_ids`."""
        return pc.list_value_length(self.table[name]).to_numpy()

    def negative_lengths(self) -> np.ndarray:
        """int [negatives of all rows]: tokens of each."""
        return pc.list_value_length(pc.list_flatten(self.table["negative_ids"])).to_numpy()

    def largest_id(self, name: str) -> int:
        """The largest token id of a column; -1 if there is none."""
        column = self.table[name]
        while pa.types.is_list(column.type):
            column = pc.list_flatten(column)
        found = pc.max(column).as_py()
        return -1 if found is None else found

    def without_tokens(self) -> np.ndarray:
        """Positions of rows whose prompt, completion or any negative has no tokens."""
        empty = (self.lengths("prompt_ids") == 0) | (self.lengths("completion_ids") == 0)
        owners = np.repeat(np.arange(len(self)), self.lengths("negative_ids"))
        empty[owners[self.negative_lengths() == 0]] = True
        return np.flatnonzero(empty)

    def longest(self) -> int:
        """Tokens of the longest prompt with its completion; 0 without rows."""
        return int((self.lengths("prompt_ids") + self.lengths("completion_ids")).max(initial=0))

    def example_ids(self, numbers: Iterable[int]) -> list[str]:
        """The `example_id` of some rows."""
        return [self.table["example_id"][int(i)].as_py() for i in numbers]

    def with_columns(self, **columns: pa.Array | pa.ChunkedArray | Sequence) -> EncodedRows:
        """The same rows with columns of `SCHEMA` added or replaced, one value per row; None for rows without one."""
        table = self.table
        for name, values in columns.items():
            if not isinstance(values, pa.Array | pa.ChunkedArray):
                values = pa.array(values, SCHEMA.field(name).type)
            there = table.column_names
            place = there.index(name) if name in there else len(there)
            field = pa.field(name, SCHEMA.field(name).type)
            change = table.set_column if name in there else table.add_column
            table = change(place, field, values.cast(field.type))
        return EncodedRows(table)

    def fingerprint(self) -> str:
        """A hash of the ids of all rows, prompts, completions and negatives, in order. Takes about 1 s per 4 GB."""
        return content_digest(self.table, REQUIRED)


def record_batch(rows: Sequence[dict]) -> pa.RecordBatch:
    """Encoded rows as columns of `SCHEMA`."""
    return pa.RecordBatch.from_pylist([{"negative_ids": [], **row} for row in rows], SCHEMA)


def drop_unused(table: pa.Table) -> pa.Table:
    """The table without optional columns in which no row has a value."""
    unused = [n for n in table.column_names if n not in REQUIRED and table[n].null_count == len(table)]
    return table.drop_columns(unused) if len(table) else table.select(REQUIRED)


def _plain(scalar: pa.Scalar):
    """A value as a Python object. Lists of numbers go through numpy, which is ten times as fast."""
    if not isinstance(scalar, pa.ListScalar) or not scalar.is_valid:
        return scalar.as_py()
    values = scalar.values
    if pa.types.is_list(values.type):
        return [_plain(one) for one in values]
    return values.to_numpy().tolist()
