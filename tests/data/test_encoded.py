"""Rows of ids in Arrow: what goes in comes out, columns answer the checks, and the fingerprint is of contents."""

from __future__ import annotations

import pyarrow as pa
import pytest
from helpers import make_rows

from lowdft.data.arrow import content_digest, map_table, write_table
from lowdft.data.encoded import SCHEMA, EncodedRows, record_batch

ROWS = [{"example_id": str(i), **row} for i, row in enumerate(make_rows(2500))]


def stored(tmp_path, size: int) -> EncodedRows:
    """The rows in a file of record batches of that size."""
    write_table(tmp_path / "r.arrow", SCHEMA, (record_batch(ROWS[i : i + size]) for i in range(0, len(ROWS), size)))
    return EncodedRows(map_table(tmp_path / "r.arrow"))


def test_rows_come_back_from_memory_and_from_a_file(tmp_path):
    for rows in (EncodedRows.from_rows(iter(ROWS)), stored(tmp_path, 700)):
        assert list(rows) == ROWS and rows[-1] == ROWS[-1] and len(rows[900:1900]) == 1000
        assert rows[900:1900][5] == ROWS[905]
        assert rows.__getitems__([3, 2000]) == [(3, ROWS[3]), (2000, ROWS[2000])]
    with pytest.raises(IndexError):
        rows[2500]


def test_columns_answer_what_is_checked():
    rows = [dict(row) for row in ROWS[:5]]
    rows[1] = rows[1] | {"negative_ids": [[3], []]}
    rows[2] = rows[2] | {"prompt_ids": [], "aligned_logps": -0.5}
    rows[4] = rows[4] | {"negative_ids": []}
    encoded = EncodedRows.from_rows(rows)
    assert encoded.without_tokens().tolist() == [1, 2]
    assert encoded.lengths("negative_ids").tolist() == [4, 2, 4, 4, 0]
    assert encoded.has("aligned_logps").tolist() == [False, False, True, False, False]
    assert "aligned_logps" not in encoded[0] and encoded[2]["aligned_logps"] == -0.5
    assert encoded.longest() == max(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows)
    assert encoded.example_ids([4, 0]) == ["4", "0"]


def test_added_columns_are_absent_where_a_row_has_none():
    rows = EncodedRows.from_rows(ROWS[:2]).with_columns(ref_logps=[-3.0, None])
    assert rows[0]["ref_logps"] == -3.0 and "ref_logps" not in rows[1]
    assert rows.with_columns(ref_logps=[None, -1.0])[1]["ref_logps"] == -1.0


def test_fingerprint_is_of_contents(tmp_path):
    """However the rows are stored or sliced; any moved id, and any moved boundary between rows, changes it."""
    whole = EncodedRows.from_rows(ROWS)
    assert stored(tmp_path, 700).fingerprint() == stored(tmp_path, 2500).fingerprint() == whole.fingerprint()
    assert whole[10:20].fingerprint() == EncodedRows.from_rows(ROWS[10:20]).fingerprint()
    first = {"example_id": "a", "prompt_ids": [1, 2], "completion_ids": [3], "negative_ids": [[4, 5], [6]]}
    others = [
        first | {"example_id": "b"},
        first | {"prompt_ids": [2, 1]},
        first | {"prompt_ids": [1], "completion_ids": [2, 3]},
        first | {"negative_ids": [[4], [5, 6]]},
        first | {"negative_ids": [[4, 5, 6]]},
        first | {"negative_ids": [[4, 5], [6], []]},
    ]
    found = {EncodedRows.from_rows([row]).fingerprint() for row in [first, *others]}
    assert len(found) == len(others) + 1


def test_digest_tells_missing_text_from_empty_text():
    def digest(values):
        return content_digest(pa.table({"text": pa.array(values, pa.string())}), ["text"])

    assert len({digest(v) for v in (["a", ""], ["a", None], ["", "a"], ["a"])}) == 4
    sliced = pa.table({"text": pa.array(["x", "a", "", "y"])})[1:3]
    assert content_digest(sliced, ["text"]) == digest(["a", ""])


def test_a_mapped_table_is_not_read_into_memory(tmp_path):
    stored(tmp_path, 700)
    before = pa.total_allocated_bytes()
    table = map_table(tmp_path / "r.arrow")
    assert table.nbytes > 100_000 and pa.total_allocated_bytes() - before < 10_000
