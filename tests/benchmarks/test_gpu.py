"""`benchmarks/gpu.py` on a CPU: every section runs or says why not, and the results are written."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers import ROOT

FOR_A_GPU = {"causality", "nf4_codes", "out_of_memory", "deletion"}


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--output", str(tmp_path / "found.md")]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    found = json.loads(next(line for line in lines if line.startswith('{"')))
    assert len(found) == 15
    verdicts = {name: result["verdict"] for name, result in found.items()}
    assert {name for name, verdict in verdicts.items() if verdict == "SKIP"} == FOR_A_GPU
    assert "FAIL" not in verdicts.values(), [r for r in found.values() if r["verdict"] == "FAIL"]
    assert found["ceilings"]["Tflop/s"] > 0 and "15 SKIP" in (tmp_path / "found.md").read_text()
