"""`benchmarks/step.py`: the products that a method needs, by hand, and one run on a tiny model."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import ROOT, make_llama

sys.path.insert(0, str(ROOT / "benchmarks"))
from rates import linear_shapes, useful_flop  # noqa: E402


def test_useful_products_by_hand():
    """Layers of 10 weights and a head of 100; a prompt of 3, a completion of 2, two negatives of 4 tokens."""
    rows = [{"prompt_ids": [1] * 3, "completion_ids": [1] * 2, "negative_ids": [[1] * 4] * 2}]
    both_ways = 4 * (10 * (3 + 2 + 8) + 100 * (2 + 8))
    assert useful_flop("dft2", {(2, 5): 1}, 100, rows) == both_ways
    assert useful_flop("dft", {(2, 5): 1}, 100, rows) == both_ways + 2 * (10 * (3 + 8) + 100 * 8)


def test_every_linear_layer_but_the_head_is_counted():
    """Two layers: q and o, k and v, gate and up, down."""
    assert linear_shapes(make_llama()) == {(32, 32): 4, (32, 16): 4, (32, 48): 4, (48, 32): 2}


@pytest.mark.slow
def test_runs_on_a_tiny_model(tiny_folder):
    command = [sys.executable, "benchmarks/step.py", "--model", str(tiny_folder), "--shapes", "8,4,2,2", "--steps", "1"]
    more = ["--dtype", "float32", "--trainers", "dft2", "padded dft"]
    out = subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert out.returncode == 0, out.stderr
    rows = [line for line in out.stdout.splitlines() if line.startswith(("| dft2", "| padded dft"))]
    assert len(rows) == 2 and all("Gflop/s" in row for row in rows)
