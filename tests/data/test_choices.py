"""Multiple choice is found by itself; a row whose right option is not certain is an error with its field."""

from __future__ import annotations

import json

import pytest

from lowdft.data import load_examples
from lowdft.data.example import to_example
from lowdft.data.formats import to_row
from lowdft.data.layouts import BadRow
from lowdft.data.read import Record
from lowdft.errors import UserError

COLOURS = ["red", "green", "blue"]


def row(written, columns=None):
    return to_row(Record("t.jsonl:1", written), columns)


def texts(found):
    return found.prompt[0].text, found.completion[0].text, [turn.text for (turn,) in found.negatives]


@pytest.mark.parametrize(
    "columns",
    [
        {"question": "Sky?", "choices": COLOURS, "answer": 2},
        {"question": "Sky?", "choices": COLOURS, "answer": "C"},
        {"question": "Sky?", "choices": COLOURS, "answer": " blue "},
        {"question": "Sky?", "choices": json.dumps(COLOURS), "label": "2"},
        {"question": "Sky?", "options": COLOURS, "answer_idx": 0, "label": "c"},
        {"question": "Sky?", "choices": {"text": COLOURS, "label": ["1", "2", "3"]}, "answerKey": "3"},
        {"question_stem": "Sky?", "choices": {"text": COLOURS, "label": ["A", "B", "C"]}, "answerKey": "C"},
        {"question": {"stem": "Sky?", "choices": [{"text": t, "label": t[0]} for t in COLOURS]},
         "answerKey": "b"},
        {"ctx": "Sky?", "endings": COLOURS, "label": "2", "activity_label": "x"},
        {"goal": "Sky?", "choices": COLOURS, "gold": 2.0},
        {"prompt": "Sky?", "choices": COLOURS, "answer": 2},
    ],
)  # fmt: skip
def test_layouts(columns):
    found = row(columns)
    assert texts(found) == ("Sky?", "blue", ["red", "green"])
    assert found.layout == "choices" and found.answer == "blue"


def test_other_trained_answers_win():
    """A completion, or a mapping to one, is trained whatever options stand beside it."""
    assert row({"prompt": "Sky?", "completion": "C", "choices": COLOURS, "answer": 2}).layout == "prompt+completion"
    mapped = row({"question": "Sky?", "choices": COLOURS, "answer": "It is blue."},
                 {"prompt": "question", "completion": "answer"})  # fmt: skip
    assert texts(mapped) == ("Sky?", "It is blue.", [])
    assert row({"question": "Sky?", "choices": "red, green", "answer": "blue"}).layout == "question+answer"


def test_columns_of_the_user():
    mine = {"stem": "Sky?", "alternatives": COLOURS, "right": 2}
    found = row(mine, {"prompt": "stem", "choices": "alternatives", "answer": "right"})
    assert texts(found)[1] == "blue" and found.completion[0].path == "alternatives[2]"


@pytest.mark.parametrize(
    "columns, field, text",
    [
        ({"choices": COLOURS, "answer": 3}, "answer", "Are they counted from 1?"),
        ({"choices": COLOURS, "answer": -1}, "answer", "names none of the 3 options"),
        ({"choices": COLOURS, "answer": "pink"}, "answer", "names none of the 3 options in choices"),
        ({"choices": COLOURS, "label": ""}, "label", "is empty"),
        ({"choices": COLOURS, "label": None}, "label", "is null"),
        ({"choices": COLOURS, "answer": True}, "answer", "is a boolean"),
        ({"choices": ["red"], "answer": 0}, "choices", "has 1 option; at least two"),
        ({"choices": ["red", " red"], "answer": 0}, "choices[1]", "the same as choices[0]"),
        ({"choices": ["red", ""], "answer": 0}, "choices[1]", "every option is a text"),
        ({"choices": ["1", "2", "4"], "answer": 2}, "answer", "option 1 by its text and option 2 by its index"),
        ({"choices": ["B", "A"], "answer": "A"}, "answer", "option 1 by its text and option 0 by its letter"),
        ({"choices": {"text": COLOURS, "label": ["A", "B"]}, "answer": "A"}, "choices", "lists text and label"),
        ({"choices": {"text": COLOURS, "label": ["A", "B", "C"]}, "answerKey": "D"}, "answerKey", "labels A, B, C"),
        ({"choices": COLOURS, "which": 1}, "choices", "no column says which is right"),
    ],
)
def test_mistakes_are_rows_with_errors(columns, field, text):
    with pytest.raises(BadRow) as raised:
        row({"question": "Sky?"} | columns)
    assert raised.value.field == field and text in raised.value.text


def test_mistakes_have_file_and_line(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"question": f"{n}?", "choices": COLOURS, "answer": n} for n in range(5)]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(UserError) as raised:
        load_examples(path)
    assert "t.jsonl:4: answer is 3" in str(raised.value) and "t.jsonl:5: answer is 4" in str(raised.value)
    loaded = load_examples(path, skip_invalid=True)
    assert loaded.layout == "choices" and [len(e.negatives) for e in loaded.examples] == [2, 2, 2]
    assert any("choices is used as a negative" in note for note in loaded.notes)


def test_template():
    """Direct text gets a space after "Answer:", as a model writes it; messages get the prompt alone."""
    found = row({"question": " Sky? ", "choices": COLOURS, "answer": 2})
    made = to_example(found, "direct", None, "Question: {prompt}\nAnswer:")
    assert (made.prompt, made.completion) == ("Question: Sky?\nAnswer:", " blue") and made.answer == "blue"
    assert made.negatives == [" red", " green"]
    assert to_example(found, "direct", None, "{prompt}\n").completion == "blue"
    chat = to_example(found, "chat", None, "Question: {prompt}\nAnswer:")
    assert chat.prompt[0]["content"] == "Question: Sky?\nAnswer:" and chat.completion[0]["content"] == "blue"


def test_template_is_for_text(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    with pytest.raises(UserError, match="data.prompt_template is for string prompts"):
        load_examples(path, prompt_template="{prompt}:")
