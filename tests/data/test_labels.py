"""Classification: the other labels become negatives."""

from __future__ import annotations

import pytest

from lowdft.data import Example
from lowdft.data.labels import find_labels, with_labels
from lowdft.errors import UserError


def rows(*completions):
    return [Example(str(i), f"{i}?", text, source=f"t.jsonl:{i + 1}") for i, text in enumerate(completions)]


def test_other_labels_are_negatives():
    found = with_labels(rows(" yes", " no"), ["no", "yes", "maybe"])
    assert [e.negatives for e in found] == [[" no", " maybe"], [" yes", " maybe"]]
    turn = [{"role": "assistant", "content": "1"}]
    chat = Example("a", [{"role": "user", "content": "q"}], turn)
    assert with_labels([chat], [1, 2])[0].negatives == [[{"role": "assistant", "content": "2"}]]


def test_labels_found():
    assert find_labels(rows(" yes", " no", "yes", "no")) == ["no", "yes"]
    for bad in (rows("a", "b", "c"), rows("a", "a"), rows(*(str(i % 21) for i in range(90)))):
        with pytest.raises(UserError, match="data.labels is auto, but"):
            find_labels(bad)


def test_strange_rows_are_named():
    with pytest.raises(UserError, match=r"1 rows have a completion.*t.jsonl:2 \('perhaps'\)"):
        with_labels(rows("yes", "perhaps"), ["yes", "no"])
    own = rows("yes")
    own[0].negatives = ["no"]
    with pytest.raises(UserError, match="t.jsonl:1: the row has its own negatives"):
        with_labels(own, ["yes", "no"])
