"""Long jobs in parts: each part is written before the next one begins, so an interruption loses at most one part."""

from __future__ import annotations

import hashlib
import itertools
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from lowdft.distributed import collectives
from lowdft.files import remove, replacing
from lowdft.pipeline.artifact import Product

MOST_PARTS = 300
ROWS_IN_MEMORY = 1000  # rows of the joined file in memory while it is written or read


def part_size(items: int, at_once: int) -> int:
    """Items per part: as many as are processed `at_once`, or more if that would make over 300 files."""
    return max(1, at_once, -(-items // MOST_PARTS))


def make_in_parts(
    product: Product,
    items: Sequence,
    part_size: int,
    work: Callable[[Sequence], list[dict]],
    what: str,
    count: Callable[[pa.Table], dict] = lambda table: {},
    noted: dict | None = None,
) -> dict:
    """Turns each item into one row and stores the rows as `product` (a parquet file); resumes from existing parts.

    With several ranks, each makes its share of the parts, and the first joins them.

    Args:
        items: in an order that is always the same for the same settings.
        part_size: items per part; it may change after an interruption.
        work: makes the rows of one part, in order.
        what: title of the progress bar, which shows the first rank's share, its rate and the time left.
        count: returns numbers about a piece of the table; their sums go into the manifest and are returned.
        noted: other facts for the manifest.
    """
    folder, began = product.path.with_suffix(".parts"), time.perf_counter()
    if collectives.rank() == 0:
        if not product.manifest.is_file():  # it is unknown what older parts were made from
            remove(folder)
        product.begin()
    missing = []
    if collectives.rank() == 0 and not product.path.is_file():
        missing = _missing(folder, len(items), part_size)
    missing = collectives.from_all(missing)[0]
    _make(folder, items, missing[collectives.rank() :: collectives.world_size()], work, what)
    collectives.wait()
    if collectives.rank() == 0:
        if not product.path.is_file():
            _join(_at_hand(folder), product.path)
        remove(folder)
    collectives.wait()
    facts: Counter[str] = Counter()
    for batch in pq.ParquetFile(product.path).iter_batches(ROWS_IN_MEMORY):
        facts.update(count(pa.Table.from_batches([batch])))
    if collectives.rank() == 0:
        product.finish(rows=len(items), seconds=round(time.perf_counter() - began, 1), **facts, **(noted or {}))
    return dict(facts)


def _make(folder: Path, items: Sequence, missing: list[tuple[int, int]], work: Callable, what: str) -> None:
    """Writes the missing parts. A file has one row per item; its name has its first item and its hash."""
    total = sum(end - start for start, end in missing)
    with tqdm(total=total, desc=what, unit="row", file=sys.stderr, disable=collectives.rank() > 0) as bar:
        for start, end in missing:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(work(items[start:end])), sink)
            content = sink.getvalue().to_pybytes()
            with replacing(folder / f"from-{start:09d}-{_hash(content)}.parquet") as temporary:
                temporary.write_bytes(content)
            bar.update(end - start)


def _missing(folder: Path, count: int, part_size: int) -> list[tuple[int, int]]:
    """(first item, last item + 1) of every part to make: the gaps between existing parts."""
    missing, position = [], 0
    for path in [*_at_hand(folder), None]:
        start = int(path.stem.split("-")[1]) if path else count
        cuts = [*range(position, start, part_size), start]
        missing += itertools.pairwise(cuts)
        position = start + (pq.read_metadata(path).num_rows if path else 0)
    return missing


def _at_hand(folder: Path) -> list[Path]:
    """The existing parts in order; a damaged part is removed and will be made again."""
    whole = []
    for path in sorted(folder.glob("from-*.parquet")):
        if path.stem.rpartition("-")[2] == _hash(path.read_bytes()):
            whole.append(path)
        else:
            warnings.warn(f"{path} is damaged (cut or changed since it was written) and is made again", stacklevel=4)
            remove(path)
    return whole


def _join(parts: list[Path], path: Path) -> None:
    """Joins the parts into one file, with one part in memory. A column may be null in one part and typed in another."""
    schema = pa.unify_schemas([pq.read_schema(part) for part in parts], promote_options="permissive")
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as out:
        for part in parts:
            same = pa.concat_tables([schema.empty_table(), pq.read_table(part)], promote_options="permissive")
            out.write_table(same, row_group_size=ROWS_IN_MEMORY)


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
