"""No half file is ever taken for a whole one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from lowdft.errors import UserError
from lowdft.files import atomic, read_json, replacing, write_json


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


def test_temporaries_of_dead_processes_go_and_those_of_live_ones_stay(tmp_path):
    """A file and a folder of a process that died; another machine's, until it is a day old; other paths'."""
    here = atomic._owner().rpartition("-")[0]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".a.json.{here}-{dead.pid}-aa.tmp").write_text("half")
    (tmp_path / f".a.json.{here}-{dead.pid}-bb.tmp").mkdir()
    (tmp_path / f".a.json.{here}-{os.getpid()}-cc.tmp").write_text("an earlier process of this number")
    kept = [f".a.json.{here}-{os.getppid()}-dd.tmp", ".a.json.elsewhere-1-ee.tmp", f".b.json.{here}-{dead.pid}-ff.tmp"]
    for name in kept:
        (tmp_path / name).write_text("a live process's, or another path's")
    (tmp_path / ".a.json.elsewhere-2-aa.tmp").write_text("old")
    os.utime(tmp_path / ".a.json.elsewhere-2-aa.tmp", (0, 0))
    write_json(tmp_path / "a.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "a.json"])


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.*free some space"),
        (OSError(errno.EDQUOT, ""), "Disk quota exceeded.*quota is used up"),
        (OSError(errno.EROFS, ""), "Read-only file system.*choose another output_dir"),
        (OSError(errno.EACCES, ""), "Permission denied.*permissions"),
        (OSError(errno.EIO, ""), "Input/output error.*check it"),
        (Exception("No space left on device (os error 28)"), "No space left.*free"),  # tokenizers
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), "quota is used up"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "could not be written"),
    ],
)
def test_failed_writes_say_why_and_what_to_do(error, words, tmp_path):
    with pytest.raises(UserError, match=words), replacing(tmp_path / "x"):
        raise error
    assert "free" not in words or "read-only" not in words
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "x"):
        raise KeyError("x")


def test_new_names_are_flushed_after_the_rename(tmp_path, monkeypatch):
    """The file before its rename, then the folder that holds the name, and the parent of a new folder."""
    done = []
    real_sync, real_replace = os.fsync, os.replace

    def name(handle):
        return os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(("fsync", name(handle))), real_sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("rename", b.name)), real_replace(a, b)))
    write_json(tmp_path / "new" / "a.json", {})
    assert [what for what, _ in done] == ["fsync", "fsync", "rename", "fsync"]
    assert done[0][1] == tmp_path.name and done[-1] == ("fsync", "new") and done[2] == ("rename", "a.json")


def test_what_a_recipe_takes_from_the_environment_is_not_written(tmp_path):
    atomic.conceal('s3cr"et-value', "${oc.env:CANARY}")
    atomic.conceal("short", "${oc.env:SHORT}")
    write_json(tmp_path / "a.json", {"key": 'a s3cr"et-value in a text', "other": "short"})
    assert read_json(tmp_path / "a.json") == {"key": "a ${oc.env:CANARY} in a text", "other": "short"}
    atomic._concealed.clear()
