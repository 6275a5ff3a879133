"""Runs benchmarks of lm-evaluation-harness, in this process, on a model that is already in memory.

A benchmark is a task of the harness, or a group of tasks, with the number of examples in its prompt and the metric that
is reported. The value of every sample is kept, so that two models can be compared sample by sample.
"""

from __future__ import annotations

import copy
import logging
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from datasets.exceptions import DatasetNotFoundError

from lowdft.errors import UserError
from lowdft.evaluation import metamath
from lowdft.text import did_you_mean

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # as in the harness's own command
BUILDERS = {".csv": "csv", ".parquet": "parquet"}  # otherwise json, which also reads one object per line
SAMPLE_KEYS = ("doc_id", "doc", "target", "resps", "filtered_resps", "filter", "doc_hash", "prompt_hash", "target_hash")


@dataclass(frozen=True)
class Benchmark:
    """A task or group of the harness.

    Args:
        task: its name in the harness.
        shots: examples in the prompt; None means the task's default.
        metric: "metric,filter" as the harness writes it; None means the first one of the task.
        chat_template: put the prompt into the tokenizer's chat template.
    """

    task: str
    shots: int | None = None
    metric: str | None = None
    chat_template: bool = False


SUITES = {
    "paper": (  # arXiv 2502.18679, Table 7
        Benchmark("mmlu", 5, "acc,none"),
        Benchmark("truthfulqa_mc2", 0, "acc,none"),
        Benchmark("hellaswag", 10, "acc_norm,none"),
        Benchmark("winogrande", 5, "acc,none"),
        Benchmark("gsm8k", 5, "exact_match,strict-match"),
        Benchmark("arc_challenge", 25, "acc_norm,none"),
        Benchmark("ifeval", 0, "prompt_level_strict_acc,none", chat_template=True),
    ),
    "math": (  # its Table 1
        Benchmark("metamath_gsm8k", 0, "accuracy,none"),
        Benchmark("metamath_math", 0, "accuracy,none"),
    ),
}


def named(names: list[str]) -> list[Benchmark]:
    """The benchmarks of suites and tasks by name, each once; a task of a suite has the settings of that suite.

    Raises:
        UserError: the harness has no such task (the message has the nearest name), or it is a tag of several tasks.
    """
    known = {one.task: one for suite in SUITES.values() for one in suite}
    found = {}
    for name in names:
        for one in SUITES.get(name) or (known.get(name) or Benchmark(name),):
            if one.task not in known and one.task not in _index(one.task).all_tasks:
                hint = did_you_mean(one.task, [*SUITES, *known, *_index(None).all_tasks])
                raise UserError(
                    f"{one.task}: lm-evaluation-harness has no task of this name.{hint} `lm_eval ls tasks` lists all; "
                    f"suites are {', '.join(SUITES)}."
                )
            entry = None if one.task in known else _index(one.task).task_index[one.task]
            if entry and entry.kind.name == "TAG":
                tasks = ", ".join(sorted(entry.tags))
                raise UserError(f"{one.task}: this name stands for several tasks and has no score; name tasks: {tasks}")
            found[one.task] = one
    return list(found.values())


def version() -> str:
    """The version of the harness."""
    return _harness().__version__


def load(benchmark: Benchmark, data: str | dict[str, str] | None = None) -> list:
    """The harness's task objects of a benchmark, with their data.

    Args:
        data: local files to use instead of the task's data set: the path of the rows to answer, or paths by split.

    Raises:
        UserError: a data set can neither be found nor downloaded, or `data` lacks a split.
    """
    manager = _index(benchmark.task)
    own = metamath.TASKS.get(benchmark.task)
    try:
        if own:
            found = manager.load([_own(own, data)])
        elif data is None:
            found = manager.load([benchmark.task])
        else:
            spec = _with_rows(benchmark, manager.task_index[benchmark.task].cfg, data)
            found = manager.load([{"group": f"local_{benchmark.task}", "task": [spec]}])
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
        if not isinstance(error, DatasetNotFoundError | ConnectionError) and "ouldn't find" not in str(error):
            raise
        raise UserError(_no_data(benchmark.task, error)) from error
    if benchmark.task == "ifeval":
        _require_punkt()
    tasks = list(found["tasks"].values())
    return tasks if len(tasks) == 1 else list(found["groups"].values())[:1]


def run(model, tokenizer, benchmark: Benchmark, tasks: list, limit: int | None, batch_size: int | str) -> dict:
    """Scores the current model (adapter on or off) on a benchmark.

    Args:
        tasks: from `load`; they can be used again for another model.
        limit: rows per task; None means all.
        batch_size: a number, or "auto".

    Returns:
        `metrics` of the benchmark as the harness names them, with their standard errors; `shots`; `rows`; `metric`;
        and `samples`, one dict per task, row and filter.
    """
    harness = _harness()
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    loaded = _index(benchmark.task).load(tasks)
    for task in loaded["tasks"].values():
        if benchmark.shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=benchmark.shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
    try:
        out = evaluator.evaluate(
            lm, loaded, limit=limit, apply_chat_template=benchmark.chat_template, fewshot_as_multiturn=True
        )
    except AssertionError as error:
        if "sequence length" not in str(error):
            raise
        raise UserError(f"{benchmark.task}: the model's context is too short for its answers ({error})") from error
    name = next(name for name in (benchmark.task, *out["results"]) if name in out["results"])
    metrics = {k: v for k, v in out["results"][name].items() if "," in k and isinstance(v, float | int)}
    values = [key for key in metrics if "_stderr," not in key]
    return {
        "harness": harness.__version__,
        "metric": benchmark.metric or values[0],
        "metrics": metrics,
        "shots": next(iter(loaded["tasks"].values())).get_config("num_fewshot"),
        "chat_template": benchmark.chat_template,
        "rows": sum(len({one["doc_id"] for one in rows}) for rows in out["samples"].values()),
        "samples": [_sample(task, one) for task, rows in out["samples"].items() for one in rows],
    }


def per_row(result: dict) -> dict[str, float]:
    """The reported metric of every row by "task/row"; empty if the score is not the mean over its rows."""
    metric, chosen = result["metric"].split(",", 1)
    rows = {
        f"{one['task']}/{one['doc_id']}": float(one["metrics"][metric])
        for one in result["samples"]
        if one["filter"] == chosen and isinstance(one["metrics"].get(metric), float | int)
    }
    mean = sum(rows.values()) / len(rows) if rows else float("nan")
    return rows if abs(mean - result["metrics"][result["metric"]]) < 1e-6 else {}


def _sample(task: str, one: dict) -> dict:
    return {"task": task, **{k: one[k] for k in SAMPLE_KEYS}, "metrics": {k: one[k] for k in one["metrics"]}}


def _harness():
    try:
        import lm_eval
    except ImportError:
        raise UserError(
            'benchmarks need lm-evaluation-harness, which is not installed: pip install "lowdft[eval]"'
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


@cache
def _index(name: str | None):
    """The harness's tasks: those in folders with which the name begins, if that includes it, else all tasks.

    Reading all of them takes most of a minute.
    """
    folder = Path(_harness().__file__).parent / "tasks"
    from lm_eval.tasks import TaskManager

    near = [one for one in folder.iterdir() if name and one.is_dir() and (f"{name}_").startswith(f"{one.name}_")]
    if name in metamath.TASKS:
        return TaskManager(include_defaults=False)
    if near:
        manager = TaskManager(include_defaults=False, include_path=near)
        if name in manager.all_tasks:
            return manager
    return TaskManager() if name is None else _index(None)


def _with_rows(benchmark: Benchmark, config: dict | None, data: str | dict[str, str]) -> dict:
    key = f"evaluation.benchmark_data.{benchmark.task}"
    if not config or "dataset_path" not in config:
        raise UserError(f"{key}: this is a group of tasks; give files for its tasks one by one, and name those tasks")
    answered = config.get("test_split") or config.get("validation_split")
    shown = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split")
    files = {answered: data} if isinstance(data, str) else dict(data)
    shots = config.get("num_fewshot") if benchmark.shots is None else benchmark.shots
    if shown and not shots:
        files.setdefault(shown, files.get(answered))  # the harness opens this split but does not use it
    for split in {answered, shown} - {None}:
        if files.get(split) is None:
            raise UserError(f"{key} has {', '.join(files)}; {benchmark.task} also reads the split {split}")
    return {"task": benchmark.task, **_local(key, files)}


def _local(key: str, files: dict[str, str]) -> dict:
    for split, path in files.items():
        if not Path(path).is_file():
            raise UserError(f"{key}: {split} is {path}; there is no such file")
    paths = {split: str(Path(path).resolve()) for split, path in files.items()}
    builder = BUILDERS.get(Path(next(iter(paths.values()))).suffix, "json")
    return {"dataset_path": builder, "dataset_name": None, "dataset_kwargs": {"data_files": paths}}


def _own(task: dict, data: str | dict[str, str] | None) -> dict:
    task = copy.deepcopy(task)
    if data is not None:
        files = {"test": data} if isinstance(data, str) else data
        task |= _local(f"evaluation.benchmark_data.{task['task']}", files) | {"custom_dataset": None}
    return task


def _no_data(task: str, error: Exception) -> str:
    config = metamath.TASKS.get(task) or _index(task).task_index[task].cfg or {}
    name = config.get("dataset_path") or "the data set that the message names"
    told = str(error).splitlines()[0][:200]
    return (
        f"{task}: its data set could not be fetched ({told}). On a machine with a network run `hf download --repo-type "
        f"dataset {name}` and copy the cache (HF_HOME) here, or give your own copy of the rows with "
        f"evaluation.benchmark_data.{task}=FILE (or a file per split); it needs the columns of that data set."
    )


def _require_punkt() -> None:
    """Raises UserError without nltk's table for IFEval, which would otherwise fail after generating all answers."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise UserError(
            "ifeval needs nltk's table punkt_tab: run `python -m nltk.downloader punkt_tab`, or copy the folder "
            "tokenizers/punkt_tab from another machine to ~/nltk_data (or to NLTK_DATA)"
        ) from None
