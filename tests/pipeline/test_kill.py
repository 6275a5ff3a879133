"""Kills, failing writes, damage, two writers, power failures, from generation to export: nothing is lost or repeated.

`LOWDFT_KILLS=60 python -m pytest tests/pipeline/test_kill.py` kills more often; `benchmarks/kills.py` and
`benchmarks/durability.py` say how it is done.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

SCRIPT = ROOT / "benchmarks" / "kills.py"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dft", "dft2"])
def test_nothing_is_lost(objective):
    """The end after all kills equals an uninterrupted run's: rows, losses, log_u, adapter, manifests, files."""
    kills = os.environ.get("LOWDFT_KILLS", "12")
    command = [sys.executable, str(SCRIPT), "--kills", kills, "--objective", objective]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-3000:]
    found = json.loads(out.stdout[out.stdout.index("{") :])
    assert found["kills"] >= int(kills) and found["what"] == {}


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("cc") is None, reason="needs Linux, root, a C compiler"
)
def test_disturbances_leave_no_dead_end_and_no_loss():
    """The short form of `benchmarks/durability.py`; damage, which takes minutes, is in `test_damage.py`."""
    parts = ["faults", "kills", "full", "pairs", "power"]
    command = [sys.executable, str(SCRIPT.with_name("durability.py")), *parts]
    command += ["--count", "4", "--every", "200", "--end-every", "10"]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
