"""Measured results in the Hub's form, `.eval_results/*.yaml` (huggingface_hub.EvalResultEntry)."""

from __future__ import annotations

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from lowdft.files import read_json
from lowdft.pipeline.context import Run

# lm-evaluation-harness's task -> the Hub data set that it is measured on
DATASETS = {
    "mmlu": "cais/mmlu",
    "truthfulqa_mc2": "truthfulqa/truthful_qa",
    "hellaswag": "Rowan/hellaswag",
    "winogrande": "allenai/winogrande",
    "gsm8k": "openai/gsm8k",
    "arc_challenge": "allenai/ai2_arc",
    "arc_easy": "allenai/ai2_arc",
    "openbookqa": "allenai/openbookqa",
    "ifeval": "google/IFEval",
}


def text(run: Run) -> str | None:
    """The YAML of the trained model's benchmarks, in percent; None where no known benchmark was measured whole."""
    path = run.folder / "benchmark.json"
    result = read_json(path) if path.is_file() else {"tasks": {}}
    if result.get("limit"):
        return None  # of a part of the rows: no result of the benchmark
    entries = []
    for task, found in result["tasks"].items():
        if task in DATASETS and "after" in found["systems"]:
            shots = f", {found['shots']}-shot" if found["shots"] is not None else ""
            note = f"{result['harness']}, {found['metric']}{shots}"
            value = round(100 * found["systems"]["after"]["value"], 2)
            entries.append(EvalResultEntry(DATASETS[task], task, value, notes=note))
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None
