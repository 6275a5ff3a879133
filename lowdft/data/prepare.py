"""Turns rows of text into Arrow files of token ids: tokenizes in several processes and joins generated negatives."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from lowdft.data.arrow import BATCH, map_table, write_table
from lowdft.data.cache import cached, facts_of
from lowdft.data.encode import Encoder, Truncation
from lowdft.data.encoded import IDS, SCHEMA, EncodedRows, drop_unused, record_batch
from lowdft.data.example import Example
from lowdft.data.examples import Examples
from lowdft.errors import UserError

ROWS_PER_PROCESS = 2500  # with fewer rows, starting another process takes longer than tokenizing them
SHOWN = 20  # rows that cannot be tokenized, reported in full


@dataclasses.dataclass
class Tokenizing:
    """Turns a run's examples into ids.

    Args:
        encoder: with the run's template and lengths.
        ready_negatives: use the examples' own negatives.
        sampling_ids: maps an example to the ids of the prompt that its negatives are sampled from; None if not needed.
    """

    encoder: Encoder
    ready_negatives: bool
    sampling_ids: Callable[[Encoder, Example], list[int]] | None = None

    def row(self, example: Example) -> dict:
        """One encoded row; raises UserError if the chat template rejects it."""
        text = {
            "example_id": example.example_id,
            "prompt": example.prompt,
            "completion": example.completion,
            "tools": example.tools,
            "negatives": example.negatives if self.ready_negatives else [],
            "aligned_logps": example.aligned_logps,
        }
        encoded = self.encoder.row(text)
        if self.sampling_ids:
            encoded["sampling_prompt_ids"] = self.sampling_ids(self.encoder, example)
        return encoded


def prepare(
    path: Path,
    made_from: dict,
    examples: Examples,
    how: Tokenizing,
    negatives: Path | None = None,
    without: dict | None = None,
) -> tuple[EncodedRows, Truncation]:
    """The encoded rows at `path`, memory-mapped; made first if they are missing or were made from other things.

    Args:
        made_from: what they depend on: data, tokenizer, lengths, negatives.
        negatives: a parquet file with generated `negative_ids` by `example_id`, for every example.
        without: what the rows depend on without these negatives; if `path` already has those rows, they are not
            tokenized again.

    Returns:
        the rows, and what was cut to length when they were made.

    Raises:
        UserError: the chat template rejects rows; all of them are in one message.
    """

    note = path.with_suffix(".json")
    tokenized = facts_of(note, without) if negatives and without else None

    def make() -> dict:
        truncation = Truncation(**tokenized or {})
        parts = map_table(path).to_batches() if tokenized else _tokenized(examples, how, truncation)
        if negatives:
            parts = _with_negatives(parts, negatives, how.encoder.max_length, truncation)
        write_table(path, SCHEMA, parts)
        return dataclasses.asdict(truncation)

    facts = cached(note, made_from, [path], make)
    return EncodedRows(drop_unused(map_table(path))), Truncation(**facts)


def _tokenized(examples: Examples, how: Tokenizing, truncation: Truncation) -> Iterator[pa.RecordBatch]:
    """Record batches in order; counts what is cut to length in `truncation`."""
    parts = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
    processes = min(os.cpu_count() or 1, len(examples) // ROWS_PER_PROCESS)
    if processes < 2:
        found = map(_Worker(how), parts)
        yield from _collected(found, len(examples), truncation)
        return
    with multiprocessing.Pool(processes, _start, (how,)) as pool:
        yield from _collected(pool.imap(_encode_in_worker, parts), len(examples), truncation)


def _collected(found: Iterable, total: int, truncation: Truncation) -> Iterator[pa.RecordBatch]:
    errors: list[str] = []
    with tqdm(total=total, desc="tokenizing", unit="row", file=sys.stderr, disable=total < ROWS_PER_PROCESS) as bar:
        for batch, cut, wrong in found:
            errors += wrong
            for name, value in vars(cut).items():
                old = getattr(truncation, name)
                setattr(truncation, name, max(old, value) if name == "longest" else old + value)
            if not errors:
                yield batch
            bar.update(BATCH)
    if errors:
        more = f"\n… and {len(errors) - SHOWN} more rows" if len(errors) > SHOWN else ""
        raise UserError("\n".join(errors[:SHOWN]) + more)


class _Worker:
    """Tokenizes parts: (record batch, what was cut, error messages)."""

    def __init__(self, how: Tokenizing):
        self.how = how

    def __call__(self, examples: Examples) -> tuple[pa.RecordBatch, Truncation, list[str]]:
        self.how.encoder.truncation = Truncation()
        rows, errors = [], []
        for example in examples:
            try:
                rows.append(self.how.row(example))
            except UserError as error:
                errors.append(f"{example.source}: {error}")
        return record_batch(rows), self.how.encoder.truncation, errors


def _start(how: Tokenizing) -> None:
    global _worker
    _worker = _Worker(how)


def _encode_in_worker(examples: Examples) -> tuple:
    return _worker(examples)


def _with_negatives(
    parts: Iterable[pa.RecordBatch], path: Path, max_length: int | None, truncation: Truncation
) -> Iterator[pa.RecordBatch]:
    """The batches with their rows' negatives, joined by `example_id` and cut to length, without loading the file."""
    read = pq.ParquetFile(path).iter_batches(BATCH, columns=["example_id", "negative_ids"])
    held = pa.table({"example_id": pa.array([], pa.string()), "negative_ids": pa.array([], pa.list_(IDS))})
    for part in parts:
        index = pc.index_in(part["example_id"], value_set=held["example_id"])
        while index.null_count and (more := next(read, None)) is not None:
            more = pa.Table.from_batches([more]).cast(held.schema)
            held = pa.concat_tables([held, more]).combine_chunks()
            index = pc.index_in(part["example_id"], value_set=held["example_id"])
        if index.null_count:
            lacking = part["example_id"].filter(index.is_null())[0]
            raise UserError(
                f"{path}: there are no negatives for {lacking}; delete the file and its manifest to generate them again"
            )
        found = held["negative_ids"].take(index).combine_chunks()
        found = found.chunk(0) if isinstance(found, pa.ChunkedArray) else found
        left = np.setdiff1d(np.arange(len(held)), index.to_numpy())
        held = held.take(left)
        prompts = pc.list_value_length(part["prompt_ids"]).to_numpy()
        cut = fit_negatives(prompts, found, max_length, truncation)
        yield part.set_column(SCHEMA.get_field_index("negative_ids"), SCHEMA.field("negative_ids"), cut)


def with_mismatched(rows: EncodedRows, max_length: int | None) -> EncodedRows:
    """The rows, each with the completion of the next row as `mismatched_ids`, which is no answer to its own prompt.

    Args:
        max_length: maximum tokens of prompt and completion; the completion is cut to fit.
    """
    others = rows.table["completion_ids"].take(np.roll(np.arange(len(rows)), -1)).combine_chunks()
    others = others.chunk(0) if isinstance(others, pa.ChunkedArray) else others
    one_each = pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32), others)
    fitting = fit_negatives(rows.lengths("prompt_ids"), one_each, max_length, Truncation())
    return rows.with_columns(mismatched_ids=fitting.flatten())


def fit_negatives(
    prompts_N: np.ndarray, negative_ids: pa.ListArray, max_length: int | None, truncation: Truncation
) -> pa.ListArray:
    """`Encoder.fit` for the negatives of N rows at once: list<list<int32>>, each cut so that prompt + negative fit.

    Args:
        prompts_N: how many tokens each row's prompt has.
    """
    counts_N = pc.list_value_length(negative_ids).to_numpy()
    flat = negative_ids.flatten()
    lengths_C, prompts_C = pc.list_value_length(flat).to_numpy(), np.repeat(prompts_N, counts_N)
    truncation.longest = max(truncation.longest, int((lengths_C + prompts_C).max(initial=0)))
    kept_C = lengths_C
    if max_length is not None:
        kept_C = np.where(lengths_C + prompts_C > max_length, np.maximum(1, max_length - prompts_C), lengths_C)
        truncation.negatives += int((lengths_C + prompts_C > max_length).sum())
    values = flat.flatten().to_numpy()
    if (kept_C < lengths_C).any():
        starts_C = np.cumsum(lengths_C) - lengths_C
        place = np.arange(len(values)) - np.repeat(starts_C, lengths_C)
        values = values[place < np.repeat(kept_C, lengths_C)]
    inner = pa.ListArray.from_arrays(_offsets(kept_C), pa.array(values, pa.int32()))
    return pa.ListArray.from_arrays(_offsets(counts_N), inner)


def _offsets(lengths: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
