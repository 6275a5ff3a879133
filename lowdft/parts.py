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
    product: Product, items: Sequence, part_size: int, work: Callable[[Sequence], list[dict]], what: str
) -> pa.Table:
    """Turns items into one row each and stores them as `product` (a parquet file); goes on from the parts at hand.

    Args:
        items: in an order that the same settings always give; part i is `items[i * part_size : (i + 1) * part_size]`.
        work: rows of one part, in order.
        what: for the progress bar, which shows the rate and the time left.
    """
    folder = product.path.with_suffix(".parts")
    product.begin()
    starts = range(0, len(items), part_size)
    began = time.perf_counter()
    with tqdm(total=len(items), desc=what, unit="row", file=sys.stderr) as bar:
        for number, start in enumerate(starts):
            path = folder / f"part-{number:06d}.parquet"
            if not path.is_file():
                _write(pa.Table.from_pylist(work(items[start : start + part_size])), path)
            bar.update(len(items[start : start + part_size]))
    table = pa.concat_tables(
        [pq.read_table(folder / f"part-{number:06d}.parquet") for number in range(len(starts))],
        promote_options="permissive",
    )
    _write(table, product.path)
    product.finish(rows=len(items), seconds=round(time.perf_counter() - began, 1))
    shutil.rmtree(folder)
    return table


def _write(table: pa.Table, path: Path) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
