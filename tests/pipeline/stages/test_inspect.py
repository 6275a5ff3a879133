"""What inspect shows of a row."""

from __future__ import annotations

from lowdft.cli import main


def test_inspect_shows_what_is_scored(recipe, capsys):
    assert main(["inspect", recipe, "--row", "3"]) == 0
    out = capsys.readouterr().out
    for words in [
        "rows.jsonl:4",
        "<|im_start|>assistant",
        "2 scored tokens, ends with <|im_end|>",
        "9 training rows",
        "You are an unhelpful assistant.",
    ]:
        assert words in out
    assert main(["inspect", recipe, "--row", "99"]) == 1
