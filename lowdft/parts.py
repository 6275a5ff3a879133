"""Long work in parts: each part is written whole before the next begins, so an interruption loses one part at most."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from lowdft.files import replacing
from lowdft.run_folder import Product


def make_in_parts(
    product: Product,
    items: Sequence,
    part_size: int,
    work: Callable[[Sequence], list[dict]],
    what: str,
    count: Callable[[pa.Table], dict] = lambda table: {},
) -> dict:
    """Turns items into one row each and stores them as `product` (a parquet file); goes on from the parts at hand.

    Args:
        items: in an order that the same settings always give.
        part_size: items of a part; it may be another one after an interruption.
        work: rows of one part, in order.
        what: for the progress bar, which shows the rate and the time left.
        count: facts about the whole table that are worth noting in the manifest; they are returned.
    """
    folder, began = product.path.with_suffix(".parts"), time.perf_counter()
    if not product.manifest.is_file():  # nobody knows what older parts were made from
        shutil.rmtree(folder, ignore_errors=True)
    product.begin()
    if not product.path.is_file():
        _write(_all_parts(folder, items, part_size, work, what), product.path)
    shutil.rmtree(folder, ignore_errors=True)
    facts = count(pq.read_table(product.path))
    product.finish(rows=len(items), seconds=round(time.perf_counter() - began, 1), **facts)
    return facts


def _all_parts(folder: Path, items: Sequence, part_size: int, work: Callable, what: str) -> pa.Table:
    """The parts together; a file is named by its first item and has one row an item: its length says what is next."""
    parts, start = [], 0
    with tqdm(total=len(items), desc=what, unit="row", file=sys.stderr) as bar:
        while start < len(items):
            path = folder / f"from-{start:09d}.parquet"
            if not path.is_file():
                _write(pa.Table.from_pylist(work(items[start : start + part_size])), path)
            parts.append(pq.read_table(path))
            start += len(parts[-1])
            bar.update(len(parts[-1]))
    return pa.concat_tables(parts, promote_options="permissive")


def _write(table: pa.Table, path: Path) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
