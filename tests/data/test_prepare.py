"""Text to ids: negatives joined by example_id and cut to length, one process or several, and the cache."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import make_tokenizer

from lowdft.data.arrow import map_table, write_table
from lowdft.data.encode import Encoder, Truncation
from lowdft.data.encoded import EncodedRows
from lowdft.data.example import Example
from lowdft.data.examples import SCHEMA, Examples, record_batches
from lowdft.data.prepare import Tokenizing, fit_negatives, prepare
from lowdft.data.python_rows import encode_rows
from lowdft.errors import UserError


def examples(folder, count: int) -> Examples:
    made = (
        Example(f"row {i}", f"{i}?", str(i), ["a", "bc"], source=f"t.jsonl:{i + 1}", aligned_logps=-1.0 if i else None)
        for i in range(count)
    )
    write_table(folder / "t.arrow", SCHEMA, record_batches(made))
    return Examples(map_table(folder / "t.arrow"))


def test_examples_come_back(tmp_path):
    prompt = [{"role": "user", "content": "é\n?"}]
    one = Example("x", prompt, [{"role": "assistant", "content": "a"}], [], [{"type": "function"}], "f:1", None, -0.5)
    write_table(tmp_path / "x.arrow", SCHEMA, record_batches([one]))
    assert list(Examples(map_table(tmp_path / "x.arrow"))) == [one]
    rows = examples(tmp_path, 3)
    assert rows.negatives_N.tolist() == [2, 2, 2] and rows.has_aligned_N.tolist() == [False, True, True]
    assert rows.sources([2]) == ["t.jsonl:3"] and rows[1:].fingerprint() != rows[:2].fingerprint()


def test_several_processes_make_the_rows_that_one_makes(tmp_path, monkeypatch):
    """The second call maps what the first made: it does not tokenize."""
    rows, how = examples(tmp_path, 2100), Tokenizing(Encoder(make_tokenizer(), max_length=6), ready_negatives=True)
    one, cut = prepare(tmp_path / "one.arrow", {"a": 1}, rows, how)
    monkeypatch.setattr("lowdft.data.prepare.ROWS_PER_PROCESS", 700)
    many, cut_many = prepare(tmp_path / "many.arrow", {"a": 1}, rows, how)
    assert one.fingerprint() == many.fingerprint() and cut == cut_many and cut.completions > 0
    assert one[5] == encode_rows([vars(rows[5])], how.encoder)[0]
    monkeypatch.setattr(Tokenizing, "row", lambda *_: pytest.fail("tokenized again"))
    again, cut_again = prepare(tmp_path / "one.arrow", {"a": 1}, rows, how)
    assert again.fingerprint() == one.fingerprint() and cut_again == cut


def test_generated_negatives_are_joined_by_example_id(tmp_path, monkeypatch):
    """In whatever order the file has them, to rows that are not tokenized again; one that is missing is named."""
    rows, how = examples(tmp_path, 3), Tokenizing(Encoder(make_tokenizer(), max_length=5), ready_negatives=False)
    ids = {"row 0": [[9] * 9], "row 1": [[5], [6, 7]], "row 2": [[8]]}
    table = pa.table({"negative_ids": [*ids.values()][::-1], "example_id": [*ids][::-1]})
    pq.write_table(table, tmp_path / "n.parquet")
    found, cut = prepare(tmp_path / "j.arrow", {}, rows, how, tmp_path / "n.parquet")
    assert [row["negative_ids"] for row in found] == [[[9] * 3], [[5], [6, 7]], [[8]]]  # two tokens are the prompt's
    assert cut.negatives == 1
    bare, cut_bare = prepare(tmp_path / "b.arrow", {"bare": 1}, rows, how)
    assert bare[0]["negative_ids"] == [] and cut_bare.negatives == 0
    with monkeypatch.context() as patched:
        patched.setattr(Tokenizing, "row", lambda *_: pytest.fail("tokenized again"))
        joined, cut_joined = prepare(tmp_path / "b.arrow", {}, rows, how, tmp_path / "n.parquet", {"bare": 1})
    assert joined.fingerprint() == found.fingerprint() and cut_joined == cut
    pq.write_table(table[:2], tmp_path / "n.parquet")
    with pytest.raises(UserError, match="no negatives for row 0"):
        prepare(tmp_path / "j.arrow", {"other": 1}, rows, how, tmp_path / "n.parquet")


def test_negatives_of_many_rows_are_cut_as_one_by_one():
    encoder = Encoder(make_tokenizer(), max_length=7)
    prompts = [[1] * 3, [1] * 5, [1]]
    negatives = [[[2] * 6, [3]], [[4] * 2], [[5] * 7, [6] * 6, [7]]]
    counted = Truncation()
    lengths = pa.array([len(p) for p in prompts]).to_numpy()
    found = fit_negatives(lengths, pa.array(negatives, pa.list_(pa.list_(pa.int32()))), 7, counted)
    wanted = [[encoder.fit(p, ids, "negatives") for ids in own] for p, own in zip(prompts, negatives, strict=True)]
    assert found.to_pylist() == wanted
    assert (counted.negatives, counted.longest) == (encoder.truncation.negatives, encoder.truncation.longest)


def test_rows_of_ids_need_no_tokenizer_and_rows_of_text_do():
    ids_alone = Encoder(None)
    rows = encode_rows(iter([{"prompt_ids": [1], "completion_ids": [2], "negative_ids": [[3]]}]), ids_alone)
    assert isinstance(rows, EncodedRows) and rows[0]["example_id"] == "0" and encode_rows(rows, ids_alone) is rows
    with pytest.raises(UserError, match="need a tokenizer"):
        encode_rows([{"prompt": "a", "completion": "b"}], ids_alone)
