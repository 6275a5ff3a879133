"""benchmark: measures base and trained model with lm-evaluation-harness -> benchmark.json, benchmarks/.

Every result is a separate file, `benchmarks/TASK/SYSTEM-DIGEST.json`, with its samples. The digest identifies base,
quantization, adapter, benchmark and data, so the result of one model is never used for another, and an interrupted call
resumes with the next task.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from lowdft import models
from lowdft.evaluation import alpaca, benchmarks
from lowdft.evaluation.benchmarks import Benchmark
from lowdft.evaluation.paired import difference
from lowdft.files import read_json, write_json, write_text
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.systems import greedy_answers, identities, systems
from lowdft.reporting.benchmark_table import print_table


def main(run: Run, names: list[str] | None = None, limit: int | None = None) -> dict | None:
    """Measures what has not been measured yet, prints the table and writes it.

    Args:
        names: suites and tasks; None means `evaluation.benchmarks`, or else the suite "paper".
        limit: rows per task; None means `evaluation.benchmark_limit`.

    Raises:
        UserError: an unknown task, an unavailable data set, no trained model, or an adapter of another base.
    """
    section = run.recipe.evaluation
    names = names or section.benchmarks or ["paper"]
    limit = section.benchmark_limit if limit is None else limit
    chosen = benchmarks.named([name for name in names if name != alpaca.NAME])
    files = {(system, one): result_file(run, system, identity, one, limit)
             for system, identity in identities(run).items() for one in chosen}  # fmt: skip
    _measure(run, files, limit)
    if alpaca.NAME in names:
        _write_alpaca(run, limit)
    if not chosen:
        return None
    result = summary(chosen, files, limit)
    write_json(run.folder / "benchmark.json", result)
    print_table(result)
    return result


def _measure(run: Run, files: dict[tuple[str, Benchmark], Path], limit: int | None) -> None:
    missing = {key: path for key, path in files.items() if not path.is_file()}
    data = run.recipe.evaluation.benchmark_data
    tasks = {one: benchmarks.load(one, data.get(one.task)) for one in dict.fromkeys(one for _, one in missing)}
    if not missing:
        return
    batch_size = "auto" if torch.cuda.is_available() else run.recipe.evaluation.batch_size
    for system, model in systems(run, {system for system, _ in missing}):
        for one, objects in tasks.items():
            if (system, one) in missing:
                say(f"{one.task}, {system}")
                result = benchmarks.run(model, run.encoder.tokenizer, one, objects, limit, batch_size)
                _write(missing[system, one], system, result)


def _write(path: Path, system: str, result: dict) -> None:
    samples = result.pop("samples")
    lines = [json.dumps(sample, ensure_ascii=False, default=str) for sample in samples]
    write_text(path.with_suffix(".samples.jsonl"), "".join(f"{line}\n" for line in lines))
    write_json(path, {"system": system, **result, "per_row": benchmarks.per_row(result | {"samples": samples})})


def result_file(run: Run, system: str, identity: str, one: Benchmark, limit: int | None) -> Path:
    """The path of a result; its name identifies base, quantization, adapter, benchmark, limit, data and harness."""
    data = run.recipe.evaluation.benchmark_data.get(one.task, [])
    data = {"": data} if isinstance(data, str) else dict(data)
    made_from = models.made_from(run.source, run.recipe.model, run.encoder.tokenizer) | {
        "model": identity,
        "benchmark": [one.task, one.shots, one.metric, one.chat_template],
        "limit": limit,
        "data": {split: _digest(Path(path)) for split, path in data.items()},
        "harness": benchmarks.version(),
    }
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    return run.folder / "benchmarks" / one.task / f"{system}-{digest}.json"


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def summary(chosen: list[Benchmark], files: dict[tuple[str, Benchmark], Path], limit: int | None) -> dict:
    """The contents of benchmark.json: every benchmark's score by system, with the differences from the base."""
    tasks = {}
    for one in chosen:
        results = {system: read_json(path) for (system, other), path in files.items() if other == one}
        base = results["base"]
        metric = base["metric"]
        scores = {}
        for system, result in results.items():
            scores[system] = {"value": result["metrics"][metric], "stderr": _stderr(result, metric)}
            if system != "base":
                scores[system]["ahead"] = difference(result["per_row"], base["per_row"], scores[system], scores["base"])
        tasks[one.task] = {
            **{key: base[key] for key in ("metric", "shots", "chat_template", "rows")},
            "systems": scores,
            "metrics": {system: result["metrics"] for system, result in results.items()},
            "files": {system: str(files[system, one].relative_to(files[system, one].parents[2])) for system in results},
        }
    means = {
        system: sum(task["systems"][system]["value"] for task in tasks.values()) / len(tasks)
        for system in next(iter(tasks.values()))["systems"]
    }
    return {"harness": f"lm-eval {benchmarks.version()}", "limit": limit, "tasks": tasks, "mean": means}


def _stderr(result: dict, metric: str) -> float | None:
    name, _, chosen = metric.partition(",")
    return result["metrics"].get(f"{name}_stderr,{chosen}")


def _write_alpaca(run: Run, limit: int | None) -> None:
    """Writes answers to AlpacaEval's instructions, one file per system, and prints the command to judge them."""
    rows = alpaca.instructions(run.recipe.evaluation.benchmark_data.get(alpaca.NAME), limit)
    prompts = [run.encoder.prompt([{"role": "user", "content": row["instruction"]}], None) for row in rows]
    name = run.folder.name
    for system, model in systems(run):
        path = run.folder / "benchmarks" / alpaca.NAME / f"{system}.json"
        texts = greedy_answers(run, model, prompts, f"AlpacaEval, {system}")
        write_json(path, alpaca.outputs(rows, texts, f"{name}-{system}"))
        say(f"{path}: {len(rows)} answers. To judge them with a paid model (with its key in OPENAI_API_KEY), run:")
        say(f"  pip install alpaca-eval; {alpaca.JUDGE.format(path)}")
