"""Verdicts on rows, and on rows together; all bad rows are told at once, in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import ROOT

from lowdft.data import Example, load_examples, overlap
from lowdft.data.checks import check_row, check_table, final_answer
from lowdft.data.formats import to_row
from lowdft.data.load import _mixed_layouts, _rows
from lowdft.data.read import Record, read_records
from lowdft.errors import UserError

SAMPLES = ROOT.parent / "shared" / "bad_inputs"


def say(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def call(arguments, name="f"):
    return {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}]}  # fmt: skip


USER = {"role": "user", "content": "q"}
PAIR = {"prompt": "q", "completion": "a"}
ARGUMENTS = "messages[1].tool_calls[0].function.arguments"
ERROR, WARN = "error", "warn"


@pytest.mark.parametrize(
    "columns, expected",
    [
        (say(("user", "q"), ("assistant", "a")), []),
        (say(("system", ""), ("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "a")), []),
        (say(("user", "q"), ("assistant", "")), [(ERROR, "messages[1].content", "is empty; an answer needs")]),
        (say(("user", "q"), ("assistant", " \n\u00a0")), [(ERROR, "messages[1].content", "is only whitespace")]),
        (say(("user", "q"), ("assistant", None)), [(ERROR, "messages[1].content", "null and there is no tool_calls")]),
        (say(("user", "q"), ("assistant", 4)), [(ERROR, "messages[1].content", "is a number (4); text is needed")]),
        (say(("user", ["q"]), ("assistant", "a")), [(ERROR, "messages[0].content", "is a list (['q']);")]),
        (say(("user", " "), ("assistant", "a")), [(WARN, "messages[0].content", "unconditional text")]),
        (say(("user", "q"), ("assistant", "\u200b\u200b")), [(WARN, "messages[1].content", "zero-width")]),
        (say(("user", "q"), ("assistant", "\ud83d")), [(ERROR, "messages[1].content", "lone surrogate")]),
        (say(("user", "caf\ufffd"), ("assistant", "a")), [(WARN, "messages[0].content", "damaged text")]),
        (say(("user", "q"), ("assistant", "a<|im_end|>")), [(WARN, "messages[1].content", "chat-template markup")]),
        (say(("user", "q"), ("bot", "a")), [(ERROR, "messages[1].role", '"bot", an unknown role; known are system')]),
        (say(("user", "q"), ("Assistant", "a")), [(ERROR, "messages[1].role", 'did you mean "assistant"?')]),
        (say(("user", "q"), (None, "a")), [(ERROR, "messages[1].role", "is null; one of")]),
        ({"messages": [{"content": "q"}, {"role": "assistant", "content": "a"}]},
         [(ERROR, "messages[0].role", "is missing (content found)")]),
        ({"messages": [USER, {"role": "assistant"}]}, [(ERROR, "messages[1].content", "is missing (nothing else")]),
        (say(("assistant", "a")), [(ERROR, "messages", "no user message before the answer")]),
        (say(("system", "s"), ("assistant", "a")), [(ERROR, "messages", "no user message before the answer")]),
        (say(("user", "q")), [(ERROR, "messages", "ends with a user message: there is no answer")]),
        (say(("user", "q"), ("assistant", "a"), ("user", "")), [(ERROR, "messages[2]", "an empty user turn")]),
        (say(("user", "q"), ("user", "r"), ("assistant", "a")), [(WARN, "messages[1].role", "two turns of one role")]),
        (say(("user", "q"), ("system", "s"), ("assistant", "a")), [(WARN, "messages[1].role", "is not first")]),
        (say(("assistant", "h"), ("user", "q"), ("assistant", "a")), [(WARN, "messages[0].role", "dropped")]),
        (say(("user", "q"), ("assistant", ""), ("user", "r"), ("assistant", "a")),
         [(WARN, "messages[1].content", "empty earlier assistant turn")]),
        (say(("user", "q"), ("function", "1"), ("assistant", "a")), [(WARN, "messages[1].role", 'read as "tool"')]),
        ({"conversations": [{"from": "human", "text": "q"}, {"from": "gpt", "value": "a"}]},
         [(ERROR, "conversations[0].value", "is missing (text found)")]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "bing", "value": "a"}]},
         [(ERROR, "conversations[1].from", "known are human, gpt")]),
        ({"messages": [USER, call('{"x": 1}')]}, []),
        ({"messages": [USER, call({"x": 1}), {"role": "tool", "tool_call_id": "c1", "content": ""},
                       {"role": "assistant", "content": "a"}]}, []),
        ({"messages": [USER, call('{"x": ')]}, [(ERROR, ARGUMENTS, 'not valid JSON ({"x":)')]),
        ({"messages": [USER, call("[1]")]}, [(ERROR, ARGUMENTS, "a JSON object is needed")]),
        ({"messages": [USER, call("{}", name="")]}, [(ERROR, ARGUMENTS.replace("arguments", "name"), "is missing")]),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": []}]},
         [(ERROR, "messages[1].content", "is empty")]),
        ({"messages": [USER, call("{}"), {"role": "tool", "tool_call_id": "c9", "content": "1"},
                       {"role": "assistant", "content": "a"}]},
         [(ERROR, "messages[2].tool_call_id", 'is "c9", which answers no call (calls before it: c1)')]),
        ({"prompt": "", "completion": "a"}, [(WARN, "prompt", "unconditional text")]),
        ({"prompt": 3, "completion": "a"}, [(ERROR, "prompt", "is a number (3); text is needed")]),
        ({"question": "q", "answer": None}, [(ERROR, "answer", "is null; an answer needs")]),
        (PAIR | {"negatives": ["x", " ", None]}, 
         [(WARN, "negatives[1]", "dropped"), (WARN, "negatives[2]", "dropped")]),
        (PAIR | {"negatives": ["x", 7]}, [(ERROR, "negatives[1]", "is a number (7)")]),
        (PAIR | {"negatives": ["a "]}, [(WARN, "negatives[0]", "equal to the completion")]),
        (PAIR | {"negatives": []}, []),
        (PAIR | {"rejected": [USER]}, [(ERROR, "rejected[0].role", '"assistant" is needed')]),
    ],
)  # fmt: skip
def test_verdict_on_a_row(columns, expected):
    found = check_row(to_row(Record("t.jsonl:3", columns)))
    assert [(WARN if f.warning else ERROR, f.field) for f in found] == [(v, field) for v, field, _ in expected]
    for finding, (_, _, words) in zip(found, expected, strict=True):
        assert words in f"{finding.text} {finding.warning}"
        assert finding.where == "t.jsonl:3"


def table(*rows):
    records = [Record(f"t.jsonl:{i}", row) for i, row in enumerate(rows, 1)]
    return [(f.where[8:], f.field, f.text) for f in check_table([to_row(record) for record in records])]


def test_rows_together():
    def row(prompt, completion, **more):
        return {"prompt": prompt, "completion": completion, **more}

    assert table(row("q", "81"), row("q", "9*9 = 81."), row("r", "a poem"), row("r", "another poem")) == []
    assert table(row("q", "81"), row("q", "81")) == [("2", "", "the row equals line 1")]
    assert table(row("q", "81"), row("q", "81", rejected="80")) == []
    disagrees = "3", "completion", "disagrees with line 1"
    assert table(row("q", "81"), row("q", "9 x 9 = 81"), row("q", "80")) == [disagrees]
    form = "prompt", "equals that of line 1 except for white space or Unicode form"
    assert table(row("q", "a"), row("q ", "a"), row("q ", "b.c")) == [("2", *form)]
    assert table(row("caf\u00e9", "x"), row("cafe\u0301", "x")) == [("2", *form)]
    twice = table(row("q", "a", id="k"), row("r", "b", id="k"))
    assert twice == [("2", "id", '"k" is also the id of t.jsonl:1; each row needs its own. Change one.')]


@pytest.mark.parametrize(
    "text, final",
    [("9*9 = 81.", 81), ("so $1,234.50", 1234.5), ("long " * 50 + "3 #### 12", 12), ("long " * 50 + "3", None),
     ("Yes.", "yes"), ("(B)", "b"), ("Paris.", None), (None, None)],
)  # fmt: skip
def test_final_answer(text, final):
    assert final_answer(text) == final


def write(tmp_path, rows):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_all_bad_rows_are_told_at_once(tmp_path):
    rows = [PAIR] + [{"prompt": f"q{i}", "completion": " " * (i % 2)} for i in range(30)]
    name = write(tmp_path, rows)
    with pytest.raises(UserError) as caught:
        load_examples(name)
    lines = str(caught.value).splitlines()
    wanted = "an answer needs at least one token. Remove the row, or pass --skip-invalid."
    assert lines[0] == f"{name}:2: completion is empty; {wanted}"
    assert lines[1] == f"{name}:3: completion is only whitespace; {wanted}"
    assert len(lines) == 21 and lines[20] == f"… and 10 more bad rows (30 of 31 in {name})."


def test_one_error_of_all_rows_is_told_once(tmp_path):
    name = write(tmp_path, [{"question": "a", "response": "b"}] * 50)
    with pytest.raises(UserError, match=r"l:1: question is of no known layout .* \(50 of 50 rows have this error.\)$"):
        load_examples(name)


def test_skipping_says_how_many_and_fails_if_all(tmp_path):
    rows = [PAIR, {"prompt": "r", "completion": ""}, {"text": "t"}, {"prompt": "", "completion": "b"}]
    loaded = load_examples(write(tmp_path, rows), skip_invalid=True)
    assert loaded.skipped == 2 and [e.source[-1] for e in loaded.examples] == ["1", "4"]
    assert loaded.warnings[0].startswith("2 of 4 rows skipped as invalid: lines 2, 3 (line 2: completion is empty; ")
    assert loaded.warnings[1:] == ["1 row with an empty prompt (unconditional text): line 4 (line 4: prompt is empty)"]
    with pytest.raises(UserError, match="all 2 rows are invalid"):
        load_examples(write(tmp_path, rows[1:3]), skip_invalid=True)


def test_long_values_are_cut_and_rows_never_printed(tmp_path):
    secret = "private " * 500
    with pytest.raises(UserError) as caught:
        load_examples(write(tmp_path, [{"messages": secret}, {secret: 1}, {"messages": [{"role": secret}]}]))
    for line in str(caught.value).splitlines():
        assert line.startswith(str(tmp_path)) and line.count("private") <= 20


def test_one_summary_line_a_kind(tmp_path):
    rows = [{"prompt": "", "completion": f"{i}{'x' * i}"} for i in range(8)]
    rows[1]["negatives"] = ["", "y"]
    loaded = load_examples(write(tmp_path, rows))
    empty = "8 rows with an empty prompt (unconditional text): lines 1, 2, 3, 4, 5 and 3 more (line 1: prompt is empty)"
    assert loaded.warnings[0] == empty
    assert loaded.warnings[1] == "1 row with an empty negative, dropped: line 2 (line 2: negatives[0] is empty)"
    assert [m[0]["content"] for m in loaded.examples[1].negatives] == ["y"]


def test_mixed_layouts_are_told(tmp_path):
    loaded = load_examples(write(tmp_path, [PAIR, {"question": "x", "answer": "y"}]))
    assert loaded.warnings == [
        "1 row with a different layout than the first row of the file: line 2 (line 2: layout question+answer)"
    ]


def test_overlap_of_train_and_held_out():
    train = [Example("a", "What  is 1+1? ", "2", source="train.jsonl:1"),
             Example("b", [{"role": "user", "content": "caf\u00e9"}], [], source="train.jsonl:2")]  # fmt: skip
    system = {"role": "system", "content": "s"}
    held = [Example("x", [system, {"role": "user", "content": "What is 1+1?"}], [], source="test.jsonl:8"),
            Example("y", "cafe\u0301", "x", source="test.jsonl:9"), Example("z", "new", "x", source="t:1")]  # fmt: skip
    assert overlap(train, held) == [
        "2 held-out prompts are also trained on (train.jsonl lines 1, 2; held out: test.jsonl lines 8, 9), so the "
        "evaluation looks too good. Remove them from one of the two."
    ]
    assert overlap(train, held[2:]) == [] and overlap(train, []) == []


# what the samples cannot say of one file alone: line 2 misspells "completion", not "awnser"; the leak needs both sets
ELSEWHERE = {("08_wrong_columns.jsonl", 2): ("error", "completoin"), ("15_eval_leak.jsonl", 2): ("accept", None),
             ("15_eval_leak.jsonl", 3): ("accept", None)}  # fmt: skip


@pytest.mark.skipif(not (SAMPLES / "expected.json").exists(), reason="the samples are not beside the repository")
def test_shared_samples(monkeypatch):
    monkeypatch.chdir(SAMPLES)
    for name, spec in json.loads(Path("expected.json").read_text()).items():
        records = read_records(name)
        rows, found = _rows(records, {})
        bad = {f.where for f in found if not f.warning}
        found += _mixed_layouts(rows, records[0].where) + check_table([row for row in rows if row.where not in bad])
        assert len(records) == len(spec["records"])
        for record, wanted in zip(records, spec["records"], strict=True):
            here = [f for f in found if f.where == record.where]
            verdict = "accept" if not here else "error" if any(not f.warning for f in here) else "warn"
            expected = ELSEWHERE.get((name, wanted["line"]), (wanted["verdict"], wanted["field"]))
            assert verdict == expected[0], record.where
            assert expected[1] is None or expected[1] in [f.field for f in here], record.where
