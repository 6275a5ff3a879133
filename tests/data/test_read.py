"""Files of every kind become records that know their place; what cannot be read is told in words."""

from __future__ import annotations

import gzip
import json
import sys
import types

import pytest

from lowdft.config.sections import DataSection
from lowdft.data.read import read_records
from lowdft.data.splits import load_splits
from lowdft.errors import UserError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d\ne"}]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def errors(records):
    return [str(f) for r in records for f in r.findings if not f.warning]


def test_jsonl_bom_crlf_and_blank_lines(tmp_path):
    name = write(tmp_path / "t.jsonl", b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n\r\n  \n{"prompt": NaN}')
    records = read_records(name)
    assert [r.where for r in records] == [f"{name}:1", f"{name}:4"]
    assert records[0].columns == {"prompt": "a\u2028b"}
    assert records[1].columns["prompt"] != records[1].columns["prompt"]


def test_where_is_the_path_as_given(tmp_path, monkeypatch):
    write(tmp_path / "t.jsonl", '{"a": 1}')
    monkeypatch.chdir(tmp_path)
    assert read_records("./t.jsonl")[0].where == "./t.jsonl:1"


@pytest.mark.parametrize("ending", "jsonl ndjson jsonl.gz json json.gz csv tsv csv.gz parquet".split())
def test_every_kind_of_file_gives_the_same_columns(tmp_path, ending):
    path, kind = tmp_path / f"t.{ending}", ending.removesuffix(".gz")
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        comma = "\t" if kind == "tsv" else ","
        table = f'prompt{comma}completion\r\na{comma}b\r\n\r\nc{comma}"d\ne"\r\n'
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        data = {"json": json.dumps(ROWS), "csv": table, "tsv": table}.get(kind, lines).encode()
        write(path, gzip.compress(data) if ending.endswith("gz") else data)
    records = read_records(path)
    assert [r.columns for r in records] == ROWS
    places = {"json": "[0] [1]", "parquet": "[0] [1]", "csv": "2 4", "tsv": "2 4"}.get(kind, "1 2").split()
    assert [r.where for r in records] == [f"{path}:{at}" for at in places]


def test_json_under_other_shapes(tmp_path):
    rows = write(tmp_path / "a.json", json.dumps({"version": 1, "data": ROWS}))
    assert [r.columns for r in read_records(rows)] == ROWS
    one = write(tmp_path / "b.json", json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    assert [r.where for r in read_records(one)] == [f"{one}:[0]"]
    lines = write(tmp_path / "c.json", "\n".join(map(json.dumps, ROWS)))
    assert [r.where for r in read_records(lines)] == [f"{lines}:1", f"{lines}:2"]
    two = write(tmp_path / "d.json", json.dumps({"train": ROWS, "test": ROWS}))
    with pytest.raises(UserError, match="several lists .train, test."):
        read_records(two)
    assert "[1]: the row is 7 (int)" in errors(read_records(write(tmp_path / "e.json", '[{"a": 1}, 7]')))[0]


@pytest.mark.parametrize(
    "last, words",
    [
        ('{"a": "What is the answ', "JSON ends inside a string at column 23: the file looks cut off"),
        ('{"a": "x"', "JSON ends inside an object at column 9: the file looks cut off"),
        ('{"a": [{"b": 1}', "JSON ends inside an object at column 15: the file looks cut off"),
        ("{'a': 1}", "not JSON: Expecting property name enclosed in double quotes at column 2;"),
    ],
)
def test_last_line_that_does_not_parse(tmp_path, last, words):
    records = read_records(write(tmp_path / "t.jsonl", '{"a": "ok"}\n' + last))
    assert [bool(r.findings) for r in records] == [False, True]
    assert errors(records)[0].startswith(f"{tmp_path}/t.jsonl:2: {words}")


def test_bad_lines_are_collected_with_their_numbers(tmp_path):
    data = b'{"a": "cut\n[1, 2]\n{"a": "caf\xe9"}\n{"a": 1, "a": 2}\n'
    records = read_records(write(tmp_path / "t.jsonl", data))
    told = [e.removeprefix(f"{tmp_path}/t.jsonl:") for e in errors(records)]
    assert told[0].startswith("1: not JSON: Unterminated string starting at column 7")
    assert told[1].startswith("2: the row is [1, 2] (list); wanted a JSON object of columns.")
    assert told[2].startswith("3: byte 0xe9 at column 11 is not UTF-8.")
    assert records[3].columns == {"a": 2}
    assert [(f.field, bool(f.warning)) for f in records[3].findings] == [("a", True)]


def test_csv_trouble(tmp_path):
    ragged = read_records(write(tmp_path / "a.csv", "p,q\n1,2\n1,2,3\n4,5\n"))
    assert errors(ragged) == [f"{tmp_path}/a.csv:3: found 3 cells; the header has 2. Quote cells that contain a "
                              "separator or a line end, or pass --skip-invalid."]  # fmt: skip
    assert [r.where.rpartition(":")[2] for r in ragged] == ["2", "3", "4"]
    unclosed = read_records(write(tmp_path / "b.csv", 'p,q\n1,2\n3,"open\n'))
    assert errors(unclosed)[0].startswith(f"{tmp_path}/b.csv:3: not CSV: unexpected end of data. Close the quotes")
    with pytest.raises(UserError, match=r"c.csv:3: byte 0xff at column 3 is not UTF-8"):
        read_records(write(tmp_path / "c.csv", b"p,q\n1,2\n3,\xff\n"))
    with pytest.raises(UserError, match="names a column twice: p, p"):
        read_records(write(tmp_path / "d.csv", "p,p\n1,2\n"))


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("empty.jsonl", b"", "this file has no rows"),
        ("blank.json", b"\n", "this file has no rows"),
        ("none.json", b"[]", "this file has no rows"),
        ("header.csv", b"prompt,completion\n", "this file has no rows"),
        ("notes.txt", b"hello", "unknown file ending; known are .jsonl"),
        ("wide.jsonl", b"\xff\xfe{\x00", "UTF-16"),
        ("pretty.jsonl", b'{\n "a": 1\n}\n', "Rename it to .json"),
        ("cut.json", b'[\n{"a": 1},\n{"a"', "cut.json:3: not JSON"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0)[:-4], "cannot be read"),
        ("bad.parquet", b"PAR1 no", "not a complete parquet file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, data, words):
    with pytest.raises(UserError, match=words):
        read_records(write(tmp_path / name, data))


def test_missing_file_and_folder(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(UserError, match=r"no such file .*Did you mean .*/train\.jsonl\?"):
        read_records(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="folder .*nowhere does not exist"):
        read_records(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(UserError, match="this is a folder; .*It holds train.jsonl"):
        read_records(tmp_path)


def fake_hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_hub_rows(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    fake_hub(monkeypatch, lambda *a, **k: asked.append((a, k)) or ROWS)
    assert [r.where for r in read_records("openai/gsm8k:main")] == ["openai/gsm8k:main:[0]", "openai/gsm8k:main:[1]"]
    read_records("owner/name-v1.5", split="test", revision="abc")
    assert asked == [
        (("openai/gsm8k", "main"), {"split": "train", "revision": None}),
        (("owner/name-v1.5", None), {"split": "test", "revision": "abc"}),
    ]


@pytest.mark.parametrize(
    "error, offline, words",
    [
        (ConnectionError("Couldn't reach 'o/n' on the Hub"), "", "Give a local file, or connect"),
        (ConnectionError("Couldn't reach 'o/n' on the Hub"), "1", "HF_HUB_OFFLINE is set and this data set is not"),
        (RuntimeError("o/n is a gated dataset on the Hub"), "", "gated or private.*hf auth login"),
        (ValueError("Config name is missing. Please pick one: ['main']"), "", "'main'.*\"o/n:<config>\""),
        (ValueError("Unknown split \"test\". Should be one of ['train']."), "", "split 'test' not found"),
        (type("DatasetNotFoundError", (Exception,), {})("no"), "", "no such data set"),
    ],
)
def test_hub_failures_in_words(monkeypatch, tmp_path, error, offline, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)

    def load_dataset(*args, **kwargs):
        raise error

    fake_hub(monkeypatch, load_dataset)
    with pytest.raises(UserError, match=f"^o/n: .*{words}"):
        read_records("o/n", split="test")


def test_a_folder_is_refused_without_reading_what_is_in_it(tmp_path, monkeypatch):
    """It was first given to datasets, which read the files and printed progress and errors about them."""
    seen = []
    fake_hub(monkeypatch, lambda *args, **kwargs: seen.append(args))
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(UserError, match="this is a folder"):
        load_splits(DataSection(train=str(tmp_path)), tmp_path / "cache")
    assert not seen
