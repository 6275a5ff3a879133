"""One process writes a folder; the next one is told which, and changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lowdft.errors import UserError
from lowdft.files import locked

HOLD = (
    "import sys; from lowdft.files import locked\nwith locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path` until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_writer_is_refused_by_name_until_the_first_is_dead(tmp_path, holder):
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"another lowdft is writing.*process {holder.pid} on .*Nothing was changed"):
        with locked(tmp_path):
            pass
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_ranks_after_the_first_leave_it_to_the_first(tmp_path, holder, monkeypatch):
    before = (tmp_path / ".lock").read_text()
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == before  # the first rank's note, which this one neither waits for
    assert (tmp_path / ".lock").read_text() == before


def test_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"), locked(tmp_path / "file" / "folder"):
        pass
