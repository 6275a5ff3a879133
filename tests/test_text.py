"""Nothing from data is obeyed by a terminal."""

from __future__ import annotations

import pytest

from lowdft.text import printable


@pytest.mark.parametrize("text, shown", [
    ("plain é 漢 \t\n", "plain é 漢 \t\n"),
    ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
    ("\x9b31m\r\x7f", r"\x9b31m\r\x7f"),
    ("abc\u202edcba", r"abc\u202edcba"),
])  # fmt: skip
def test_control_characters_are_written_out(text, shown):
    assert printable(text) == shown
