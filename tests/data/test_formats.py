"""Every layout becomes the same canonical example; what fits none is refused by name."""

from __future__ import annotations

import json

import pytest

from lowdft.data import load_examples
from lowdft.data.example import to_example
from lowdft.data.formats import to_row
from lowdft.data.layouts import BadRow, detect_layout
from lowdft.data.read import Record
from lowdft.errors import UserError

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in [("user", "2+2?"), ("assistant", "4"), ("assistant", "5")])
OTHER = {"role": "assistant", "content": "6"}
SYSTEM = {"role": "system", "content": "Be brief."}


def row(written, **kwargs):
    return to_row(Record("t.jsonl:1", written), **kwargs)


def example(written, style="chat", system_prompt=None, **kwargs):
    return to_example(row(written, **kwargs), style, system_prompt)


def write(tmp_path, rows):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize(
    "layout, columns, negatives",
    [
        ("messages", {"messages": [USER, GOOD]}, []),
        ("messages", {"messages": json.dumps([USER, GOOD])}, []),
        ("prompt+completion", {"prompt": "2+2?", "completion": "4"}, []),
        ("prompt+completion", {"prompt": [USER], "completion": [GOOD]}, []),
        ("prompt+completion", {"prompt": [USER], "completion": "4", "negatives": ["5", "6"]}, [BAD, OTHER]),
        ("prompt+completion", {"prompt": "2+2?", "completion": "4", "negatives": '["5"]'}, [BAD]),
        ("prompt+completion", {"prompt": "2+2?", "completion": "4", "negatives": [[BAD], [USER, OTHER]]}, [BAD, OTHER]),
        ("question+answer", {"question": "2+2?", "answer": "4", "rejected": ["5", "6"]}, [BAD, OTHER]),
        ("prompt+answer", {"prompt": "2+2?", "answer": "4"}, []),
        ("query+response", {"query": "2+2?", "response": "4", "type": "MATH_Rephrased"}, []),
        ("prompt+completion", {"prompt": "2+2?", "completion": "4", "query": "3?", "response": "3"}, []),
        ("instruction+output", {"instruction": "2+2?", "input": "", "output": "4"}, []),
        ("conversations", {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, []),
        ("conversations", {"conversations": [USER, GOOD]}, []),
        ("prompt+chosen", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}, [BAD]),
        ("prompt+chosen", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [BAD]),
        ("prompt+chosen", {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [BAD]),
        ("prompt+chosen", {"prompt": "2+2?", "chosen": "4", "rejected": None}, []),
        ("chosen", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [BAD]),
        ("chosen", {"chosen": [USER, GOOD], "rejected_1": [USER, OTHER], "rejected_0": [USER, BAD]}, [BAD, OTHER]),
        ("real", {"real": [USER, GOOD], "generated": [USER, BAD]}, [BAD]),
        ("real", {"real": [USER, GOOD], "generated_10": [USER, OTHER], "generated_9": [USER, BAD]}, [BAD, OTHER]),
        ("prompt+real", {"prompt": "2+2?", "real": "4", "generated_0": "5"}, [BAD]),
        ("messages", {"messages": [USER, GOOD], "prompt": "2+2?", "chosen": [USER, GOOD], "rejected": "5"}, [BAD]),
        ("prompt+completion", {"prompt": "2+2?", "completion": "4", "messages": None}, []),
    ],
)
def test_layouts_give_one_example(layout, columns, negatives):
    found, made = row(columns), example(columns)
    assert found.layout == layout
    assert (made.prompt, made.completion) == ([USER], [GOOD])
    assert made.negatives == [[n] for n in negatives]
    assert made.source == "t.jsonl:1" and made.tools is None and made.answer is None


def test_last_assistant_turn_is_trained():
    turns = [SYSTEM, USER, GOOD, {"role": "user", "content": "x2?"}, {"role": "assistant", "content": "8"}]
    assert row({"messages": turns}).trained_turn == "messages[4]"
    made = example({"messages": turns})
    assert made.prompt == turns[:4] and made.completion == turns[4:]
    assert row({"question": "a", "answer": "b"}).trained_turn == "answer"


def test_text_stays_text_under_direct_style():
    made = example({"prompt": "2+2?", "completion": "4", "rejected": "5"}, "direct", "Be brief.")
    assert (made.prompt, made.completion, made.negatives) == ("2+2?", "4", ["5"])
    assert example({"messages": [USER, GOOD]}, "direct").prompt == [USER]


def test_alpaca_input_is_joined():
    made = example({"instruction": "Add.", "input": "2 2", "output": "4", "text": "ignored"}, "direct")
    assert (made.prompt, made.completion) == ("Add.\n\n2 2", "4")
    with pytest.raises(BadRow, match="^input is a list"):
        row({"instruction": "Add.", "input": [2], "output": "4"})


def test_system_column_and_system_prompt():
    sharegpt = {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
    assert example(sharegpt | {"system": "Be brief."}).prompt == [SYSTEM, USER]
    assert example(sharegpt | {"system": "Be brief."}, system_prompt="Else.").prompt == [SYSTEM, USER]
    assert example(sharegpt | {"system": ""}, system_prompt="Be brief.").prompt == [SYSTEM, USER]
    assert example({"messages": [SYSTEM, USER, GOOD], "system": "Be brief."}).prompt == [SYSTEM, USER]
    assert example({"prompt": "p", "completion": "c", "system": "S"}, "direct").prompt == "S\n\np"


def test_old_role_opening_turn_and_tool_calls_are_made_canonical():
    called = {"role": "assistant", "content": None, "name": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}  # fmt: skip
    result = {"role": "function", "name": "f", "content": "1"}
    tools = [{"type": "function", "function": {"name": "f"}}]
    made = example({"messages": [OTHER, USER, called, result, GOOD], "tools": json.dumps(tools)})
    assert [m["role"] for m in made.prompt] == ["user", "assistant", "tool"]
    assert made.prompt[1] == {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}  # fmt: skip
    assert made.tools == tools
    split = example({"prompt": [USER], "completion": [called, result, GOOD]})
    assert [m["role"] for m in split.prompt] == ["user", "assistant", "tool"] and split.completion == [GOOD]


def test_column_map_wins_over_detection():
    columns = {"question_text": "2+2?", "good": "4", "bad": "5", "uid": 7, "gold": 4}
    columns |= {"messages": [USER, BAD], "prompt": "x"}
    names = {"prompt": "question_text", "completion": "good", "negatives": "bad", "example_id": "uid", "answer": "gold"}
    made = example(columns, columns=names)
    assert (made.prompt, made.completion, made.negatives) == ([USER], [GOOD], [[BAD]])
    assert (made.example_id, made.answer) == ("7", "4")
    assert example({"dialog": [USER, GOOD]}, columns={"messages": "dialog"}).completion == [GOOD]
    assert row({"dialog": [USER, GOOD]}, columns={"messages": "dialog"}).trained_turn == "dialog[1]"


def test_bare_answer_beside_the_completion():
    assert example({"prompt": "p", "completion": "It is 4.", "answer": "4"}).answer == "4"
    assert example({"question": "p", "answer": "#### 4"}).answer is None
    mapped = {"prompt": "question", "completion": "answer"}
    assert example({"question": "p", "answer": "#### 4"}, columns=mapped).answer is None
    both = example({"question": "p", "answer": "#### 4", "gold": 4}, columns={"answer": "gold"})
    assert (both.answer, both.completion[0]["content"]) == ("4", "#### 4")


def test_wrong_column_map(tmp_path):
    name = write(tmp_path, [{"question_text": "a", "good": "b"}])
    words = 'no row has the column "goood".*as completion; the columns are question_text, good. Did you mean "good"'
    with pytest.raises(UserError, match=words):
        load_examples(name, columns={"prompt": "question_text", "completion": "goood"})
    with pytest.raises(UserError, match='"promt" is not a known name; did you mean "prompt"'):
        load_examples(name, columns={"promt": "question_text"})


@pytest.mark.parametrize(
    "columns, field, words",
    [
        ({"question": "a", "response": "b"}, "question", "of no known layout (columns found: question, response)"),
        ({"prompt": "a", "awnser": "b"}, "awnser", 'did you mean "answer"?'),
        ({"prompt": "a", "completoin": "b"}, "completoin", 'did you mean "completion"?'),
        ({"Prompt": "a", "Completion": "b"}, "Prompt", 'did you mean "prompt"?'),
        ({"text": "a"}, "text", "not clear where the prompt ends"),
        ({"prompt": "a", "completion": "b", "messages": [USER, GOOD]}, "", "messages and prompt+completion"),
        ({}, "", "no columns"),
        ({"messages": "user: hi"}, "messages", "is a string (user: hi); a list of {role, content} is needed"),
        ({"messages": []}, "messages", "is an empty list"),
        ({"messages": [USER, "4"]}, "messages[1]", "is a string (4)"),
        ({"prompt": "a", "completion": "b", "negatives": "c"}, "negatives", "is a string (c); a list of answers"),
        ({"prompt": "a", "chosen": [USER, GOOD]}, "chosen", "has a different prompt than prompt"),
        ({"chosen": [USER, GOOD], "rejected": [OTHER, USER, BAD]}, "rejected", "has a different prompt"),
        ({"chosen": "Human: a", "rejected": "Human: b"}, "chosen", "is a string"),
        ({"prompt": "a", "completion": "b", "id": [1]}, "id", "is a list ([1]); a string or a number is needed"),
        ({"prompt": "a", "completion": "b", "tools": {"x": 1}}, "tools", "is an object"),
    ],
)
def test_rows_of_no_layout(columns, field, words):
    with pytest.raises(BadRow) as caught:
        row(columns)
    assert caught.value.field == field and words in caught.value.text


def test_detect_layout_by_names():
    assert detect_layout(["id", "question", "answer"]) == "question+answer"
    assert detect_layout(["prompt", "completion", "answer"]) == "prompt+completion"
    assert detect_layout(["prompt", "completion", "messages"], mapped=["messages"]) == "messages"
    with pytest.raises(BadRow, match=r"conversations is missing \(id, items found\)"):
        detect_layout(["id", "items"], expected="conversations")


def test_ids_follow_content_not_order(tmp_path):
    rows = [{"prompt": p, "completion": "x"} for p in "abca"]
    ids = [e.example_id for e in load_examples(write(tmp_path, rows)).examples]
    back = {e.prompt[0]["content"]: e.example_id for e in load_examples(write(tmp_path, rows[2::-1])).examples}
    assert ids[:3] == [back["a"], back["b"], back["c"]] and ids[3] == ids[0] + "-2"
    assert all(len(i) == 16 for i in ids[:3]) and len(set(ids)) == 4
    assert example({"prompt": "a", "completion": "x", "id": 12}).example_id == "12"


def test_loaded_tells_layout_negatives_and_fingerprint(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": None}]
    loaded = load_examples(write(tmp_path, rows))
    assert loaded.layout == "prompt+chosen" and loaded.warnings == []
    assert loaded.notes == ["layout: prompt+chosen", "rejected is used as a negative (rows: 1, first line 1)"]
    assert load_examples(write(tmp_path, rows)).fingerprint == loaded.fingerprint
    assert load_examples(write(tmp_path, rows[::-1])).fingerprint != loaded.fingerprint
    chat = load_examples(write(tmp_path, [{"messages": [USER, GOOD]}]))
    assert chat.notes == ["layout: messages (the last assistant turn of each row is trained on)"]


def test_csv_and_parquet_rows_load(tmp_path):
    csv = tmp_path / "t.csv"
    csv.write_text("id,question,answer,rejected\nx,2+2?,4,5\ny,1+1?,2,\n")
    first, second = load_examples(csv).examples
    assert (first.example_id, first.prompt, first.negatives) == ("x", [USER], [[BAD]])
    assert second.negatives == []
    import pyarrow as pa
    import pyarrow.parquet as pq

    call = {**GOOD, "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}
    rows = [{"messages": [USER, GOOD]}, {"messages": [USER, call]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    plain, calling = load_examples(tmp_path / "t.parquet").examples
    assert (plain.prompt, plain.completion) == ([USER], [GOOD])
    assert calling.completion[0]["tool_calls"] == [{"name": "f", "arguments": {}}]
