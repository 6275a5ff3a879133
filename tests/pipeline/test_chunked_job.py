"""Work in parts: whatever parts are at hand, of whatever size, every item is made once and stands in its place."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowdft.pipeline.artifact import Product
from lowdft.pipeline.chunked_job import make_in_parts, part_size


@pytest.mark.parametrize("part_size", [1, 3, 4, 50])
def test_gaps_are_filled(part_size, tmp_path):
    """Items 3 to 5 and 8 are at hand, made in another run's parts; of the others each is made once."""
    product, made = Product(tmp_path / "t.parquet", {"seed": 1}), []
    product.begin()
    (tmp_path / "t.parts").mkdir()
    for start, end in ((3, 6), (8, 9)):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([{"i": i, "by": "before"} for i in range(start, end)]), sink)
        content = sink.getvalue().to_pybytes()
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        (tmp_path / "t.parts" / f"from-{start:09d}-{digest}.parquet").write_bytes(content)

    def work(items):
        made.append(list(items))
        return [{"i": i, "by": "now"} for i in items]

    assert make_in_parts(product, range(11), part_size, work, "items", lambda table: {"n": len(table)}) == {"n": 11}
    assert sum(made, []) == [0, 1, 2, 6, 7, 9, 10] and max(map(len, made)) <= part_size
    rows = pq.read_table(product.path).to_pylist()
    assert [row["i"] for row in rows] == list(range(11))
    assert [row["i"] for row in rows if row["by"] == "before"] == [3, 4, 5, 8]
    assert product.is_done() and product.facts()["n"] == 11 and not (tmp_path / "t.parts").exists()


def test_a_million_rows_make_a_few_hundred_files():
    assert [part_size(n, 16) for n in (5, 3000, 1_000_000)] == [16, 16, 3334]
    assert part_size(10, 0) == 1  # more negatives per prompt than are drawn at once
