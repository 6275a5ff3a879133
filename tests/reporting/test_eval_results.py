"""Results in the Hub's form: only benchmarks that the Hub knows, measured whole."""

from __future__ import annotations

import json
from types import SimpleNamespace

import yaml
from helpers import write_benchmark

from lowdft.reporting import eval_results


def test_only_the_hubs_benchmarks_and_only_whole(tmp_path):
    run = SimpleNamespace(folder=tmp_path)
    assert eval_results.text(run) is None
    write_benchmark(tmp_path)
    file = tmp_path / "benchmark.json"
    result = json.loads(file.read_text())
    result["tasks"]["arc_easy"] = result["tasks"]["gsm8k"]
    file.write_text(json.dumps(result))
    (entry,) = yaml.safe_load(eval_results.text(run))
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"} and entry["value"] == 37.5
    assert entry["notes"] == "lm-eval 1, exact_match, 5-shot"
    file.write_text(json.dumps(result | {"limit": 8}))
    assert eval_results.text(run) is None
