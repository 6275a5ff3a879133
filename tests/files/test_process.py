"""What the operating system says of processes, with and without Unix's modules."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from lowdft.files.process import is_alive, peak_bytes


def test_peak_is_at_least_what_is_resident():
    block = bytearray(b"x" * 30_000_000)
    assert peak_bytes() >= len(block) and peak_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_the_starting_process_does_not_count():
    block = bytearray(b"x" * 400_000_000)
    code = "from lowdft.files.process import peak_bytes; print(peak_bytes())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < len(block)


def test_without_the_module_resource(monkeypatch):
    """As on Windows, where psutil knows the peak."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert peak_bytes() == 123.0


def test_a_process_that_ended_is_not_alive():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_alive(process.pid)
    process.communicate(b"\n")
    assert not is_alive(process.pid)
