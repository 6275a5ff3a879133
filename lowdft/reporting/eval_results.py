"""Results in the Hub's format, `.eval_results/*.yaml` (huggingface_hub.EvalResultEntry)."""

from __future__ import annotations

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from lowdft.files import read_json
from lowdft.pipeline.context import Run

# lm-evaluation-harness's task -> the Hub's benchmark: a data set with an eval.yaml, and the id of its task there.
# Both are required (hub-docs, eval-results); other tasks are only in the card's table.
BENCHMARKS = {"gsm8k": ("openai/gsm8k", "gsm8k")}


def text(run: Run) -> str | None:
    """The YAML of the trained model's benchmarks, in percent; None if none of the Hub's was measured on all rows."""
    path = run.folder / "benchmark.json"
    result = read_json(path) if path.is_file() else {"tasks": {}}
    if result.get("limit"):
        return None  # measured on a part of the rows, so it is not a result of the benchmark
    entries = []
    for task, found in result["tasks"].items():
        if task in BENCHMARKS and "after" in found["systems"]:
            shots = f", {found['shots']}-shot" if found["shots"] is not None else ""
            note = f"{result['harness']}, {found['metric']}{shots}"
            value = round(100 * found["systems"]["after"]["value"], 2)
            entries.append(EvalResultEntry(*BENCHMARKS[task], value, notes=note))
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None
