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

from lowdft import ranks
from lowdft.files import replacing
from lowdft.run_folder import Product


def make_in_parts(
    product: Product, items: Sequence, part_size: int, work: Callable[[Sequence], list[dict]], what: str
) -> pa.Table:
    """Turns items into one row each and stores them as `product` (a parquet file); goes on from the parts at hand.

    Of several ranks each makes its share of the parts, and the first puts them together.

    Args:
        items: in an order that the same settings always give; part i is `items[i * part_size : (i + 1) * part_size]`.
        work: rows of one part, in order.
        what: for the progress bar, which shows the first rank's share, its rate and the time left.
    """
    folder, began = product.path.with_suffix(".parts"), time.perf_counter()
    starts = range(0, len(items), part_size)
    paths = [folder / f"part-{number:06d}.parquet" for number in range(len(starts))]
    if ranks.rank() == 0:
        product.begin()
    missing = ranks.from_all([number for number, path in enumerate(paths) if not path.is_file()])[0]
    mine = missing[ranks.rank() :: ranks.world_size()]
    total = sum(len(items[starts[number] : starts[number] + part_size]) for number in mine)
    with tqdm(total=total, desc=what, unit="row", file=sys.stderr, disable=ranks.rank() > 0) as bar:
        for number in mine:
            part = items[starts[number] : starts[number] + part_size]
            _write(pa.Table.from_pylist(work(part)), paths[number])
            bar.update(len(part))
    ranks.wait()
    if ranks.rank() == 0:
        _write(pa.concat_tables(map(pq.read_table, paths), promote_options="permissive"), product.path)
        product.finish(rows=len(items), seconds=round(time.perf_counter() - began, 1))
        shutil.rmtree(folder)
    ranks.wait()
    return pq.read_table(product.path)


def _write(table: pa.Table, path: Path) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
