"""Rows in the files of Python packages, as those of the quickstart are."""

from __future__ import annotations

import pytest
from helpers import ROOT

from lowdft.config.recipe import load_recipe
from lowdft.data.load import load_examples, overlap
from lowdft.errors import UserError


def test_rows_of_the_quickstart(monkeypatch, tmp_path):
    """From any folder: 317 questions to train on and 500 others; no wrong answer is the best one."""
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        section = load_recipe("quickstart", []).data
        train, test = (load_examples(name).examples for name in (section.train, section.eval))
    assert (len(train), len(test)) == (317, 500) and not overlap(train, test)
    for one in [*train, *test]:
        wrong = [negative[-1]["content"] for negative in one.negatives]
        assert wrong and one.completion[-1]["content"] not in wrong


@pytest.mark.parametrize("name, words", [
    ("package:lowdft/start/rows/nothing.jsonl", "lowdft has no such file; it has truthfulqa-test.jsonl"),
    ("package:no_such_package/rows.jsonl", "the Python package no_such_package is not installed"),
])  # fmt: skip
def test_a_missing_file_is_told(name, words):
    with pytest.raises(UserError, match=words):
        load_examples(name)
