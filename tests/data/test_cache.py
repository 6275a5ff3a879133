"""What was made once is made again when it, or the note beside it, is no longer what was written."""

from __future__ import annotations

import time

import pytest

from lowdft.data.cache import cached
from lowdft.files import atomic, conceal


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Calls `cached` for one file; gives its facts: how often the file was made."""
    made = []

    def write() -> dict:
        (tmp_path / "rows.arrow").write_bytes(b"0123456789")
        made.append(1)
        return {"times": len(made)}

    def no_wait(seconds):
        raise AssertionError("waits for a note that never comes")

    monkeypatch.setattr(time, "sleep", no_wait)
    return lambda **made_from: cached(tmp_path / "rows.json", made_from, [tmp_path / "rows.arrow"], write)["times"]


@pytest.mark.parametrize("name", ["rows.json", "rows.arrow"])
@pytest.mark.parametrize("how", ["deleted", "emptied", "cut"])
def test_damage_is_made_again(make, tmp_path, name, how):
    assert make(seed=1) == make(seed=1) == 1
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink() if how == "deleted" else (tmp_path / name).write_bytes(content[: how == "cut" and 5])
    assert make(seed=1) == make(seed=1) == 2
    assert (tmp_path / "rows.arrow").read_bytes() == b"0123456789"


@pytest.mark.parametrize("name", ["rows.json", "rows.arrow"])
def test_flipped_bits_are_made_again(make, tmp_path, name):
    """The note is another text that means the same, or it is made again."""
    make(seed=1)
    content = (tmp_path / name).read_bytes()
    for place in range(len(content)):
        (tmp_path / name).write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 7]) + content[place + 1 :])
        make(seed=1)
        assert (tmp_path / "rows.arrow").read_bytes() == b"0123456789"
    assert make(seed=1) > len(content) // 2


def test_what_it_was_made_from_may_come_from_the_environment(make):
    conceal("canary-d41d8cd9", "${oc.env:CANARY}")
    assert make(data="canary-d41d8cd9/rows.jsonl") == make(data="canary-d41d8cd9/rows.jsonl") == 1
    atomic._concealed.clear()
    assert make(data="elsewhere") == 2
