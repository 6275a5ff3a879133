"""No half file is ever taken for a whole one."""

from __future__ import annotations

import json

import pytest

from lowdft.errors import UserError
from lowdft.files import read_json, replacing, write_json


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text('{"a": ')
        raise RuntimeError("killed")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_folder_is_replaced_whole(tmp_path):
    for content in ("old", "new"):
        with replacing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["new"]


def test_full_disk_is_told_in_words(tmp_path):
    with pytest.raises(UserError, match="No space left on device.*free some space"), replacing(tmp_path / "x"):
        raise OSError(28, "No space left on device")


def test_broken_json_is_told_in_words(tmp_path):
    (tmp_path / "x.json").write_text('{"a"')
    with pytest.raises(UserError, match="is not JSON"):
        read_json(tmp_path / "x.json")


def test_what_a_killed_process_left_goes(tmp_path):
    """A file and a folder of a process that died; the leftovers of other paths stay."""
    (tmp_path / ".a.json.1.tmp").write_text("half")
    (tmp_path / ".a.json.2.tmp").mkdir()
    (tmp_path / ".b.json.1.tmp").write_text("another's")
    write_json(tmp_path / "a.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.json.1.tmp", "a.json"]
