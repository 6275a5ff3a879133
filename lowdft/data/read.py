"""Reads a file, or a data set on the Hub, into records: the place of each, its columns, and findings about it.

A line that cannot be read becomes a record with an error among its findings, so that all bad rows are reported
together. A file that cannot be read at all raises UserError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from lowdft.data.structs import own_columns
from lowdft.errors import UserError
from lowdft.files.packages import local_path
from lowdft.text import printable

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")  # text files also with .gz
REMOVE = "Remove the row, or pass --skip-invalid."


@dataclass(frozen=True)
class Finding:
    """One problem of one row. With a `warning` (a heading for all findings of this kind) the row is kept."""

    where: str
    field: str
    text: str
    warning: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (f"{self.where}:", self.field, self.text) if part)


@dataclass
class Record:
    """One row as found in the file. `where` is "train.jsonl:3" (line) or "data.json:[4]" (index from 0)."""

    where: str
    columns: dict
    findings: list[Finding] = field(default_factory=list)


def cut(value: object, length: int = 80) -> str:
    """Any value as short text for a message."""
    text = value if isinstance(value, str) else repr(value)
    text = printable(" ".join(text.encode("utf-8", "backslashreplace").decode().split()))
    return text if len(text) <= length else text[: length - 1] + "…"


def read_records(source: str | os.PathLike, split: str | None = None, revision: str | None = None) -> list[Record]:
    """Reads `source`: a file (.jsonl, .ndjson, .json, .csv, .tsv, all also with .gz, or .parquet) or a Hub data set.

    A name that exists or has an ending, or package:NAME/FILE, is a file. "owner/name" or "owner/name:config" is a data
    set on the Hub, of which `split` ("train" by default) at `revision` is read; both are ignored for a file.

    Raises:
        UserError: the file or data set does not exist, is empty, cannot be read or has an unknown format.
    """
    name = os.fspath(source)
    path = local_path(name)
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", name):
        if not re.search(r"\.[A-Za-z]\w*$", name):
            return _read_hub(name, split or "train", revision)
    _check_file(path, name)
    ending = Path(name.lower().removesuffix(".gz")).suffix
    if ending == ".parquet":
        records = _read_parquet(path, name)
    else:
        readers = {".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
        records = readers.get(ending, _read_jsonl)(_read_bytes(path, name), name)
    if not records:
        raise UserError(f"{name}: this file has no rows; at least one is needed. Check how it was written.")
    return records


def _check_file(path: Path, name: str) -> None:
    kinds = ", ".join(ENDINGS)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.name.lower().removesuffix(".gz").endswith(ENDINGS))
        hint = f" It holds {', '.join(inside[:5])}." if inside else ""
        raise UserError(f"{name}: this is a folder; wanted a file.{hint} Give the path of a file ({kinds}).")
    if not path.exists():
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else None
        if near := get_close_matches(path.name, there or [], n=3, cutoff=0.6):
            hint = f"Did you mean {' or '.join(str(Path(name).parent / n) for n in near)}?"
        elif there is None:
            hint = f"The folder {Path(name).parent} does not exist either; check the path."
        else:
            hint = 'Check the path; a data set on the Hub is written "owner/name".'
        raise UserError(f"{name}: there is no such file (looked from {Path.cwd()}). {hint}")
    if not name.lower().removesuffix(".gz").endswith(ENDINGS) or name.lower().endswith(".parquet.gz"):
        raise UserError(
            f"{name}: unknown file ending; known are {kinds} (text files also with .gz). Rename or convert the file."
        )


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        data = path.read_bytes()
        if name.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as err:
        raise UserError(f"{name}: cannot be read ({cut(err)}). Check its permissions, or download it again.") from err
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{name}: the text is UTF-16; wanted UTF-8. Save it again as UTF-8.")
    return data.removeprefix(b"\xef\xbb\xbf")


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        raise UserError(f"{name}:{line}: {_not_utf8(err)}") from err


def _not_utf8(err: UnicodeDecodeError) -> str:
    start = err.object.rfind(b"\n", 0, err.start) + 1
    return (
        f"byte 0x{err.object[err.start]:02x} at column {err.start - start + 1} is not UTF-8. "
        "Save the file again as UTF-8."
    )


def _loads(text: str, where: str) -> tuple[object, list[Finding]]:
    """Parses JSON, with a warning for each key that occurs twice in one object (Python keeps the last)."""
    twice: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> dict:
        row = dict(items)
        if len(row) < len(items):
            keys = [key for key, _ in items]
            twice.extend(key for key in row if keys.count(key) > 1)
        return row

    value = json.loads(text, object_pairs_hook=pairs)
    text, kind = (
        "occurs twice in one object; the last one is used",
        "a key that occurs twice in one object",
    )
    return value, [Finding(where, cut(key), text, kind) for key in twice]


def _record(value: object, where: str, findings: list[Finding]) -> Record:
    if isinstance(value, dict):
        return Record(where, value, findings)
    text = f"the row is {cut(value)} ({type(value).__name__}); wanted a JSON object of columns. {REMOVE}"
    return Record(where, {}, [Finding(where, "", text)])


def _read_jsonl(data: bytes, name: str) -> list[Record]:
    lines = data.split(b"\n")
    if lines[0].strip() in (b"[", b"{"):
        raise UserError(
            f"{name}:1: one JSON document over several lines; .jsonl has one object per line. Rename it to .json."
        )
    last = max((i for i, line in enumerate(lines) if line.strip()), default=0)
    records = []
    for i, line in enumerate(lines):
        where = f"{name}:{i + 1}"
        if not line.strip():
            continue
        try:
            value, findings = _loads(line.decode("utf-8").rstrip("\r"), where)
        except UnicodeDecodeError as err:
            records.append(Record(where, {}, [Finding(where, "", _not_utf8(err))]))
        except (ValueError, RecursionError) as err:
            text = _not_json(err, line.decode("utf-8").rstrip(), is_last=i == last)
            records.append(Record(where, {}, [Finding(where, "", text)]))
        else:
            records.append(_record(value, where, findings))
    return records


def _not_json(err: Exception, line: str, is_last: bool) -> str:
    if not isinstance(err, json.JSONDecodeError):
        return f"this JSON cannot be read: {cut(err)}. {REMOVE}"
    in_string = "Unterminated" in err.msg
    if is_last and (in_string or err.pos >= len(line) or not line.endswith(("}", "]"))):
        inside = "a string" if in_string else "an object"
        return (
            f"JSON ends inside {inside} at column {len(line)}: the file looks cut off "
            f"(unfinished download or full disk). Get the complete file, or pass --skip-invalid."
        )
    return f"not JSON: {err.msg.removesuffix(' at')} at column {err.colno}; wanted one JSON object per line. {REMOVE}"


def _read_json(data: bytes, name: str) -> list[Record]:
    text = _decode(data, name)
    if not text.strip():
        return []
    try:
        value, findings = _loads(text, name)
    except (ValueError, RecursionError) as err:
        if getattr(err, "msg", "") == "Extra data":  # JSON lines in a .json file, which is common
            return _read_jsonl(data, name)
        at = f":{err.lineno}" if isinstance(err, json.JSONDecodeError) else ""
        raise UserError(f"{name}{at}: not JSON: {cut(err)}. The file may be cut off; get the complete file.") from err
    if isinstance(value, dict):
        lists = {k: v for k, v in value.items() if isinstance(v, list)}
        if not lists or "messages" in lists or "conversations" in lists:
            value = [value]
        elif len(lists) == 1:
            value = next(iter(lists.values()))
        else:
            raise UserError(
                f"{name}: an object with several lists ({cut(', '.join(lists))}); wanted a list of rows. Write the "
                "rows as one list of objects."
            )
    if not isinstance(value, list):
        raise UserError(f"{name}: found {cut(value)} ({type(value).__name__}); wanted a list of objects.")
    records = [_record(row, f"{name}:[{i}]", []) for i, row in enumerate(value)]
    if records:
        records[0].findings.extend(findings)
    return records


def _read_csv(data: bytes, name: str) -> list[Record]:
    csv.field_size_limit(sys.maxsize)
    tab = name.lower().removesuffix(".gz").endswith(".tsv")
    reader = csv.reader(io.StringIO(_decode(data, name), newline=""), delimiter="\t" if tab else ",", strict=True)
    header: list[str] = []
    records: list[Record] = []
    start = 1
    try:
        for cells in reader:
            where, start = f"{name}:{start}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                if len(set(header)) < len(header):
                    raise UserError(f"{where}: the header names a column twice: {cut(', '.join(header))}. Rename one.")
            elif len(cells) != len(header):
                text = (
                    f"found {len(cells)} cells; the header has {len(header)}. Quote cells that contain a separator "
                    "or a line end, or pass --skip-invalid."
                )
                records.append(Record(where, {}, [Finding(where, "", text)]))
            else:
                records.append(Record(where, dict(zip(header, cells, strict=True))))
    except csv.Error as err:
        where = f"{name}:{start}"
        text = f"not {'TSV' if tab else 'CSV'}: {err}. Close the quotes of this record, and double any quote inside."
        records.append(Record(where, {}, [Finding(where, "", text)]))
    return records


def _read_parquet(path: Path, name: str) -> list[Record]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as err:  # pyarrow raises OSError, ArrowInvalid and more for a damaged file
        raise UserError(f"{name}: not a complete parquet file ({cut(err)}). Download or write it again.") from err
    return [Record(f"{name}:[{i}]", own_columns(row)) for i, row in enumerate(rows)]


def _read_hub(name: str, split: str, revision: str | None) -> list[Record]:
    import datasets

    repo, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, config or None, split=split, revision=revision)
    except Exception as err:  # any failure is turned into an error message
        raise UserError(_hub_words(name, split, err)) from err
    return [Record(f"{name}:[{i}]", own_columns(row)) for i, row in enumerate(rows)]


def _hub_words(name: str, split: str, err: Exception) -> str:
    told = f"{type(err).__name__} {err}"
    if re.search(r"gated|\b40[13]\b", told, re.IGNORECASE):
        return (
            f"{name}: this data set on the Hub is gated or private. Ask for access on its page, then run "
            "`hf auth login` or set HF_TOKEN."
        )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") or "offline" in told.lower():
        return (
            f"{name}: HF_HUB_OFFLINE is set and this data set is not in the local cache. Unset it to download, "
            "or give a local file."
        )
    if "Config name is missing" in told or "BuilderConfig" in told:
        return f'{name}: {cut(err, 300)} Write the configuration after a colon: "{name.split(":")[0]}:<config>".'
    if "split" in told.lower():
        return f"{name}: split {split!r} not found ({cut(err, 300)}). Give another split."
    if "NotFound" in type(err).__name__:
        return f"{name}: there is no such file, and no such data set (or revision) on the Hub. Check the name."
    return (
        f"{name}: there is no such file, and the Hub could not be read ({cut(told, 200)}). Give a local file, or "
        "connect to the network once and then set HF_HUB_OFFLINE=1. Private data sets need `hf auth login`."
    )
