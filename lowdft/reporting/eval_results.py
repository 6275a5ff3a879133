"""Measured results in the Hub's form, `.eval_results/*.yaml` (huggingface_hub.EvalResultEntry)."""

from __future__ import annotations

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from lowdft.files import read_json
from lowdft.pipeline.context import Run
from lowdft.reporting.evaluation_table import first_metric

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
    """The YAML of the trained model's benchmarks, in percent; None where no known benchmark was measured."""
    path = run.folder / "benchmarks.json"
    entries = []
    for task, found in (read_json(path) if path.is_file() else {}).items():
        metric, _, after = first_metric(found.get("base"), found.get("after"))
        if task in DATASETS and after is not None:
            note = f"lm-evaluation-harness, {metric or 'score'}"
            entries.append(EvalResultEntry(DATASETS[task], task, round(100 * after, 2), notes=note))
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None
