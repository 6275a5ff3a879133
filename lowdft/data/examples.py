"""Rows of text in Arrow columns; an `Example` is built only when it is accessed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lowdft.data.arrow import batches, content_digest
from lowdft.data.example import Example

SCHEMA = pa.schema(
    {
        "example_id": pa.string(),
        "prompt": pa.string(),  # JSON, like the next three, because messages can have any keys
        "completion": pa.string(),
        "negatives": pa.list_(pa.string()),
        "tools": pa.string(),
        "answer": pa.string(),
        "aligned_logps": pa.float64(),
        "source": pa.string(),
    }
)


class Examples(Sequence):
    """Checked rows of text in a table of `SCHEMA`. `examples[i]` is an `Example`, `examples[a:b]` an `Examples`."""

    def __init__(self, table: pa.Table):
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int | slice) -> Example | Examples:
        if isinstance(i, slice):
            return Examples(self.table[i])
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        row = {name: self.table[name][int(i)].as_py() for name in SCHEMA.names}
        for name in ("prompt", "completion", "tools"):
            row[name] = row[name] and json.loads(row[name])
        return Example(**row | {"negatives": [json.loads(one) for one in row["negatives"]]})

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def negatives_N(self) -> np.ndarray:
        """int [rows]: how many negatives each row has."""
        return pc.list_value_length(self.table["negatives"]).to_numpy()

    @property
    def has_aligned_N(self) -> np.ndarray:
        """bool [rows]: which rows have `aligned_logps`."""
        return self.table["aligned_logps"].is_valid().to_numpy()

    def sources(self, numbers: Iterable[int]) -> list[str]:
        """The places of some rows, such as "train.jsonl:3"."""
        return [self.table["source"][int(i)].as_py() for i in numbers]

    def fingerprint(self) -> str:
        """A hash of everything in the rows, in order; it does not depend on the file."""
        return content_digest(self.table, SCHEMA.names[:-1])


def record_batches(examples: Iterable[Example]) -> Iterator[pa.RecordBatch]:
    """Examples as columns of `SCHEMA`."""
    for part in batches(examples):
        yield pa.RecordBatch.from_pylist([_row(example) for example in part], SCHEMA)


def _row(example: Example) -> dict:
    return {
        "example_id": _utf8(example.example_id),
        "prompt": json.dumps(example.prompt, default=str),
        "completion": json.dumps(example.completion, default=str),
        "negatives": [json.dumps(one, default=str) for one in example.negatives],
        "tools": None if example.tools is None else json.dumps(example.tools, default=str),
        "answer": None if example.answer is None else _utf8(example.answer),
        "aligned_logps": example.aligned_logps,
        "source": _utf8(example.source),
    }


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
