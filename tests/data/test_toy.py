"""The toy task: deterministic, right, balanced, and its two splits share no pair."""

from __future__ import annotations

import re

import pytest

from lowdft.data import load_examples
from lowdft.data.toy import bigger_number, read
from lowdft.errors import UserError


def numbers(row):
    return re.fullmatch(r"Which number is bigger, (\d+\.\d+) or (\d+\.\d+)\?", row["prompt"]).groups()


def test_answers_are_right_and_rows_differ():
    rows = bigger_number(192, 0, "train")
    assert len({row["prompt"] for row in rows}) == 192
    for row in rows:
        big, small = sorted(numbers(row), key=float, reverse=True)
        assert float(big) > float(small)
        assert row["answer"] == big and row["completion"] == f"{big} is bigger than {small}."


def test_neither_place_nor_length_tells_the_answer():
    rows = bigger_number(192, 3, "test")
    cases = [(row["answer"] == numbers(row)[0], len(row["answer"].split(".")[1]) ==
              max(len(x.split(".")[1]) for x in numbers(row))) for row in rows]  # fmt: skip
    assert [cases.count((first, longer)) for first in (True, False) for longer in (True, False)] == [48] * 4
    same = [row for row in rows if len({x.split(".")[0] for x in numbers(row)}) == 1]
    assert len(same) == 144
    shorter_wins = [row for row in same if len(row["answer"]) == min(map(len, numbers(row)))]
    assert len(shorter_wins) == 72  # the kind of 9.11 and 9.9
    assert cases != sorted(cases)


def test_deterministic_and_splits_disjoint():
    assert bigger_number(3, 0, "train") == bigger_number(3, 0, "train")
    assert bigger_number(8, 0, "train") != bigger_number(8, 1, "train")
    pairs = {
        split: {frozenset(numbers(row)) for seed in range(5) for row in bigger_number(400, seed, split)}
        for split in ("train", "test")
    }
    assert len(pairs["train"]) > 1500 and not pairs["train"] & pairs["test"]


def test_known_rows():
    assert [row["prompt"] for row in bigger_number(2, 0, "train")] == [
        "Which number is bigger, 61.26 or 61.2?",
        "Which number is bigger, 82.9 or 82.35?",
    ]


def test_load_by_name():
    loaded = load_examples("toy:bigger-number?n=8&seed=1&split=test", split="train")
    assert loaded.layout == "prompt+completion" and loaded.warnings == [] and loaded.skipped == 0
    assert [e.source for e in loaded.examples] == [f"toy:bigger-number:[{i}]" for i in range(8)]
    rows = bigger_number(8, 1, "test")
    assert [e.answer for e in loaded.examples] == [row["answer"] for row in rows]
    assert loaded.examples[0].prompt == [{"role": "user", "content": rows[0]["prompt"]}]
    by_split = load_examples("toy:bigger-number", split="test", prompt_style="direct").examples
    assert [e.prompt for e in by_split] == [row["prompt"] for row in bigger_number(192, 0, "test")]


@pytest.mark.parametrize(
    "source, words",
    [
        ("toy:smaller", "no such toy task"),
        ("toy:bigger-number?m=3", 'unknown option "m"; the options are n, seed, split'),
        ("toy:bigger-number?n=many", 'n is "many"; wanted a whole number'),
        ("toy:bigger-number?n=0", "wanted 1 to 10000"),
        ("toy:bigger-number?split=dev", "wanted train or test"),
    ],
)
def test_wrong_names(source, words):
    with pytest.raises(UserError, match=words):
        load_examples(source)


def test_negatives_say_the_opposite():
    """With negatives=1 each row brings its own sentence with the numbers exchanged; without, none."""
    plain, own = read("toy:bigger-number?n=8"), read("toy:bigger-number?n=8&negatives=1")
    for before, after in zip(plain, own, strict=True):
        assert "negatives" not in before.columns
        big, small = after.columns["completion"].removesuffix(".").split(" is bigger than ")
        assert after.columns == before.columns | {"negatives": [f"{small} is bigger than {big}."]}
