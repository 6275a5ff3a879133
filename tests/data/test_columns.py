"""Columns as people's files have them: answers marked as bad, lists printed as text, Arrow's nulls, unused columns."""

from __future__ import annotations

import json

import datasets
import pandas
import pytest
from helpers import CHAT_TEMPLATE, make_tokenizer

from lowdft.data import load_examples
from lowdft.data.encode import Encoder
from lowdft.data.formats import to_row
from lowdft.data.layouts import BadRow, unused_columns
from lowdft.data.python_rows import encode_rows
from lowdft.data.read import Record
from lowdft.errors import InvalidRows, UserError

USER, GOOD = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CALLS = [{"name": "f", "arguments": {"city": "P"}}], [{"name": "g", "arguments": {"x": 1}}]
TEMPLATE = CHAT_TEMPLATE.replace("m['content']", "(m['content'] or m['tool_calls'] | tojson)")


def row(written, **kwargs):
    return to_row(Record("t.jsonl:1", written), **kwargs)


def encoder() -> Encoder:
    return Encoder(make_tokenizer(TEMPLATE), max_length=512)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize("label", [False, "False", "false"])
def test_a_completion_marked_as_bad_is_not_trained_on(label):
    with pytest.raises(BadRow, match="label is false, so this completion is a bad answer.*to the negatives"):
        row({"prompt": "2+2?", "completion": "5", "label": label})
    assert row({"prompt": "2+2?", "completion": "4", "label": True}).completion[0].text == "4"
    of_class = {"prompt": "Rude?", "completion": "no", "label": str(label)}
    assert row(of_class, columns={"answer": "label"}).completion[0].text == "no"


@pytest.mark.parametrize(
    "written",
    [
        {"prompt": json.dumps([USER]), "completion": json.dumps([GOOD])},
        {"prompt": "2+2?", "chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, GOOD])},
    ],
)
def test_messages_in_a_cell_of_csv_are_messages(written):
    found = row(written)
    assert [turn.text for turn in found.prompt + found.completion] == ["2+2?", "4"]
    assert all(negative[0].text == "4" for negative in found.negatives)


def test_a_list_that_is_no_messages_stays_text():
    assert row({"prompt": "[1, 2]", "completion": '[{"a": 1}]'}).completion[0].text == '[{"a": 1}]'


@pytest.mark.parametrize(
    "written, columns, words",
    [
        ({"prompt": str([USER]), "completion": "4"}, {}, "prompt is a list of messages as Python prints it"),
        ({"prompt": "2+2?", "chosen": str([USER, GOOD])}, {}, "chosen is a list of messages as Python prints it"),
        (
            {"prompt": "a", "completion": "b", "bad": "['x', 'y']"},
            {"negatives": "bad"},
            "bad is a string.*as JSON",
        ),
    ],
)
def test_lists_as_python_prints_them_are_refused(written, columns, words):
    with pytest.raises(BadRow, match=words):
        row(written, columns=columns)


def test_a_mapped_negative_may_be_text():
    (negative,) = row({"prompt": "a", "completion": "b", "bad": "c"}, columns={"negatives": "bad"}).negatives
    assert negative[0].text == "c"


def test_columns_that_are_not_used_are_told(tmp_path):
    rows = [{"question": q, "answer": "a", "context": "c", "negative": ["b"], "id": q} for q in "qr"]
    loaded = load_examples(write(tmp_path / "t.jsonl", rows))
    assert "columns that are not used: context, negative" in loaded.notes
    assert loaded.warnings == [
        '2 rows with the column negative, which is not used: lines 1, 2 (line 1: negative did you mean "negatives"?)'
    ]
    with pytest.warns(UserWarning, match="2 rows with the column negative, which is not used"):
        encode_rows(rows, encoder())
    scored = [{"prompt": "q", "chosen": "a", "rejected": "b", "score_rejected": 0.1}]
    assert load_examples(write(tmp_path / "s.jsonl", scored)).warnings == []
    assert unused_columns(("instruction", "input", "output", "rejected_2", "tools"), "instruction+output") == ()
    assert unused_columns(("question", "subject"), "choices") == ()


@pytest.mark.parametrize("source", ["parquet", "datasets"])
def test_calls_keep_their_own_arguments(tmp_path, source):
    """Arrow gives both calls the fields of both; TRL removes those that are null, and so does lowdft."""
    rows = [{"messages": [USER, {"role": "assistant", "tool_calls": calls}]} for calls in CALLS]
    table = datasets.Dataset.from_list(rows)
    if source == "parquet":
        table.to_parquet(tmp_path / "t.parquet")
        found = [example.completion[0]["tool_calls"] for example in load_examples(tmp_path / "t.parquet").examples]
        assert found == [*CALLS]
    else:
        of_table, of_rows = (encode_rows(some, encoder()) for some in (table, rows))
        assert [one["completion_ids"] for one in of_table] == [one["completion_ids"] for one in of_rows]


def test_a_transform_of_a_data_set_is_applied():
    table = datasets.Dataset.from_list([{"prompt": "q", "completion": "a"}] * 2)
    shouting = table.with_transform(lambda batch: {name: [t.upper() for t in texts] for name, texts in batch.items()})
    found, wanted = (encode_rows(some, encoder()) for some in (shouting, [{"prompt": "Q", "completion": "A"}] * 2))
    assert [one["prompt_ids"] for one in found] == [one["prompt_ids"] for one in wanted]


def test_what_pandas_lacks_is_missing():
    frame = pandas.DataFrame(
        [{"prompt": "q", "completion": "a", "negatives": ["b"]}, {"prompt": "q", "completion": "a"}]
    )
    found = encode_rows(frame, encoder())
    assert [len(one["negative_ids"]) for one in found] == [1, 0]


@pytest.mark.parametrize(
    "written, words",
    [
        ({"prompt": "q", "completion": "a", "negatives": {"a": 1}}, "negatives.content is missing"),
        ({"prompt_ids": [1], "completion_ids": [2**40]}, "completion_ids is a list"),
        ({"prompt_ids": [1], "completion_ids": [True]}, "completion_ids is a list"),
    ],
)
def test_values_of_other_kinds_are_errors(written, words):
    with pytest.raises(InvalidRows, match=words):
        encode_rows([written], encoder())


@pytest.mark.parametrize("what", ["system", "tools"])
def test_what_the_template_leaves_out_is_an_error(what):
    silent = (
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    prompt = [{"role": "system", "content": "Be brief."}, USER] if what == "system" else [USER]
    tools = [{"type": "function", "function": {"name": "look_up"}}] if what == "tools" else None
    found = Encoder(make_tokenizer(silent if what == "system" else CHAT_TEMPLATE))
    with pytest.raises(
        UserError, match=f"the chat template leaves out the.*{'system' if what == 'system' else 'look_up'}"
    ):
        found.row({"prompt": prompt, "completion": [GOOD], "tools": tools})


def test_tools_beside_a_prompt_of_text_are_an_error():
    with pytest.raises(UserError, match="has tools, but its prompt is text"):
        encoder().row({"prompt": "q", "completion": "a", "tools": [{"name": "f"}]})


def test_6_an_end_that_the_tokenizer_spells_is_an_error():
    """ChatML on a base whose vocabulary lacks its markers."""
    found = Encoder(make_tokenizer(CHAT_TEMPLATE.replace("<|im_end|>", "<|end|>")))
    with pytest.raises(UserError, match=r"ends an answer with <\|end\|>, which this tokenizer spells in several"):
        found.row({"prompt": [USER], "completion": [GOOD]})
    assert found.row({"prompt": "2+2?", "completion": "4"})["completion_ids"]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_16_reasoning_in_a_field_is_written_or_refused(field):
    thought = [GOOD | {field: "two and two"}]
    with pytest.raises(UserError, match="drops the reasoning"):
        Encoder(make_tokenizer(CHAT_TEMPLATE)).row({"prompt": [USER], "completion": thought})
    writing = make_tokenizer(CHAT_TEMPLATE.replace("m['content']", f"(m['{field}'] or '') + '</think>' + m['content']"))
    found = Encoder(writing).row({"prompt": [USER], "completion": thought})
    assert "two and two" in writing.decode(found["completion_ids"])
