"""A rank that does not move says so, and where it stands."""

from __future__ import annotations

import threading

from lowdft.distributed import collectives
from lowdft.training import heartbeat


def test_a_hanging_rank_is_told(monkeypatch, capsys):
    """The main thread waits for another rank that never comes."""
    monkeypatch.setattr(heartbeat, "SECONDS", 0.2)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "rank", lambda: 0)
    told = threading.Event()
    monkeypatch.setattr(heartbeat.Heartbeat, "_tell", tells(heartbeat.Heartbeat._tell, told))

    def wait_for_the_other_rank():
        assert told.wait(60)

    with heartbeat.Heartbeat() as watch:
        watch.on_substep_end(None, None, None)
        wait_for_the_other_rank()
    error = capsys.readouterr().err
    assert "rank 0 has not moved for" in error and "(in wait" in error and "rank hangs" in error


def tells(original, told: threading.Event):
    def tell(self, seconds: float) -> None:
        original(self, seconds)
        told.set()

    return tell
