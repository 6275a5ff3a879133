"""Arrow tables on disk: written in batches, memory-mapped when read, and identified by a hash of their contents."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from lowdft.files import replacing

BATCH = 1000  # rows that exist as Python objects at the same time


def batches(rows: Iterable, size: int = BATCH) -> Iterator[list]:
    """`rows` in lists of `size`; the last list may be shorter."""
    rows = iter(rows)
    while part := list(itertools.islice(rows, size)):
        yield part


def write_table(path: Path, schema: pa.Schema, parts: Iterable[pa.RecordBatch]) -> None:
    """Writes record batches to one Arrow file, atomically; raises UserError if the disk is full."""
    with replacing(path) as temporary, pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as out:
        for part in parts:
            out.write_batch(part)


def map_table(path: Path) -> pa.Table:
    """The table of an Arrow file. It stays on disk: pages are read when used, and all processes share them."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def content_digest(table: pa.Table, names: Sequence[str]) -> str:
    """A hash of some columns' values that does not depend on their record batches (XXH3, 128 bits, hexadecimal)."""
    whole = xxhash.xxh3_128()
    for name in names:
        levels: list[xxhash.xxh3_128] = []
        for chunk in table[name].chunks:
            _feed(levels, 0, chunk)
        whole.update(name.encode() + b"".join(level.digest() for level in levels))
    return whole.hexdigest()


def _feed(levels: list, depth: int, array: pa.Array) -> None:
    """Adds an array's validity, lengths and values to the hash of its nesting level, and its children's below."""
    if len(levels) == depth:
        levels.append(xxhash.xxh3_128())
    if pa.types.is_list(array.type):
        levels[depth].update(_bytes(pc.list_value_length(array).fill_null(-1)))
        _feed(levels, depth + 1, array.flatten())
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        levels[depth].update(_bytes(pc.binary_length(array).fill_null(-1)))
        if len(levels) == depth + 1:
            levels.append(xxhash.xxh3_128())
        levels[depth + 1].update(_text(array.fill_null("")))
    else:
        if array.null_count:
            levels[depth].update(_bytes(array.is_valid().cast(pa.uint8())))
        levels[depth].update(_bytes(array.fill_null(0)))


def _bytes(array: pa.Array) -> memoryview | bytes:
    if not len(array):
        return b""
    width = array.type.bit_width // 8
    return memoryview(array.buffers()[1])[array.offset * width : (array.offset + len(array)) * width]


def _text(array: pa.Array) -> memoryview | bytes:
    if not len(array) or array.buffers()[2] is None:
        return b""
    kind = pa.int64() if pa.types.is_large_string(array.type) else pa.int32()
    offsets = pa.Array.from_buffers(kind, len(array) + 1, [None, array.buffers()[1]], offset=array.offset)
    return memoryview(array.buffers()[2])[offsets[0].as_py() : offsets[-1].as_py()]
