"""SIGKILL again and again, at random and at chosen moments, from generation to export: nothing is lost or repeated.

`LOWDFT_KILLS=60 python -m pytest tests/test_kill.py` kills more often; `benchmarks/kills.py` says how it is done.
"""

from __future__ import annotations

import json
import os
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
