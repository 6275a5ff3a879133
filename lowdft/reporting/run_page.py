"""A run's report page: turns the contents of its folder into the values of the template."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file

from lowdft import __version__, models
from lowdft.data.prompting import plain_text
from lowdft.errors import UserError
from lowdft.files import digest_of, read_json, write_text
from lowdft.pipeline.context import Run, say
from lowdft.pipeline.leaks import masked
from lowdft.pipeline.metrics_file import mend, read_lines
from lowdft.reporting import benchmark_table, charts, evaluation_table, findings, samples
from lowdft.reporting.metrics import GLOSSARY, HINTS
from lowdft.reporting.page import render
from lowdft.training.checkpoints import damage_of, newest_whole, step_of
from lowdft.training.trainer import STATE_FILE

REFRESH = 15  # seconds between two reloads of the page while training runs
ANSWERS = 12  # number of steps whose sample answers are shown
RUNS = 6  # maximum number of runs in a chart


def write(run: Run, beside: Mapping[str, Path] | None = None, live: str | None = None) -> list[str]:
    """Writes report.html into the run folder, and returns the warnings on it.

    `beside`: name -> run folder of other runs whose curves are also drawn, like those of `evaluation.compare`.
    `live`: what is going on, if the page will be written again; it then reloads itself.

    Raises:
        UserError: no step was logged yet, here or in a folder of `beside`.
    """
    steps = steps_of(run)
    runs = {run.folder.resolve().name: (run.folder, steps)}
    for name, folder in {**_compared(run), **(beside or {})}.items():
        runs[name] = (Path(folder), read_metrics(Path(folder) / "metrics.jsonl"))
    if len(runs) > RUNS:
        raise UserError(f"{len(runs)} runs in one report; wanted at most {RUNS}")
    evaluation = _evaluation(run)
    tables = {name: _log_u(folder) for name, (folder, _) in runs.items()}
    warnings = [*findings.of_steps(steps), *_warnings(run, evaluation, next(iter(tables.values())))]
    page = _page(run, runs, tables, evaluation, warnings, live)
    write_text(run.folder / "report.html", page)
    return warnings


def read_metrics(path: Path) -> list[dict]:
    """The logged steps of another run, or of an unfinished one; raises UserError if there are none."""
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: there is no such folder; wanted a run folder")
    steps = read_lines(path)
    if not steps:
        raise UserError(f"{path} has no logged steps yet; run `lowdft train RECIPE` first, or `lowdft run RECIPE`")
    return steps


def steps_of(run: Run) -> list[dict]:
    """The logged steps. Lines missing after training has finished are taken from its last checkpoint, if it has them.

    Raises:
        UserError: nothing was trained yet.
    """
    path = run.folder / "metrics.jsonl"
    noted = _facts(run.training).get("metrics") if run.training.is_done() else None
    if noted and not (path.is_file() and digest_of(path) == noted):
        mend(path, newest_whole(run.args.output_dir), resuming=False)
        say(f"warning: {path} was changed, cut or deleted after training; curves may lack steps")
    return read_lines(path) if noted else read_metrics(path)


def _compared(run: Run) -> dict[str, Path]:
    """The runs of `evaluation.compare` that are run folders, not bare adapters."""
    found = {name: Path(path) for name, path in run.recipe.evaluation.compare.items()}
    return {name: path for name, path in found.items() if (path / "metrics.jsonl").is_file()}


def _evaluation(run: Run) -> dict | None:
    if (run.folder / "evaluation.json").is_file() and run.evaluation.is_done():
        return read_json(run.folder / "evaluation.json")
    return None


def _warnings(run: Run, evaluation: dict | None, table: tuple | None) -> list[str]:
    """Warnings that need more than the log lines; `table`: values and visits of the moving averages."""
    out = []
    if table:
        gamma = run.args.hyperparameters().get("gamma")
        out += findings.of_log_u(*table, run.args.log_u_init, gamma)
    if run.objective.uses_negatives and not run.ready_negatives():
        out += findings.of_negatives(_facts(run.negatives("train")))
    if cut := _facts(run.training).get("truncation"):
        out.append(f"Rows were {cut}.")
    if evaluation:
        out += findings.of_samples(evaluation["samples"])
    return out


def _facts(product) -> dict:
    return product.facts() if product.manifest.is_file() else {}


def _log_u(folder: Path) -> tuple[list[float], list[int]] | None:
    """Values and visits of the newest checkpoint's moving averages, if there is one."""
    checkpoint = max(folder.glob("checkpoints/checkpoint-*[0-9]"), key=step_of, default=None)
    if checkpoint is None:
        return None
    if damage := damage_of(checkpoint, STATE_FILE):
        say(f"warning: {damage}; the report does not show the moving averages log_u")
        return None
    if not (checkpoint / STATE_FILE).is_file():
        return None
    table = load_file(checkpoint / STATE_FILE)
    return table["values"].tolist(), table["visits"].tolist()


def _page(run: Run, runs: dict, tables: dict, evaluation: dict | None, warnings: list[str], live: str | None) -> str:
    steps = next(iter(runs.values()))[1]
    drawn = charts.of_training([(name, lines) for name, (_, lines) in runs.items()])
    values = [(i, name, table[0]) for i, (name, table) in enumerate(tables.items()) if table]
    drawn.append(charts.histogram("log_u", "Moving averages log_u", "examples", "log_u, nats", values))
    shown = samples.of(evaluation) if evaluation else {"samples": [], "filters": [], "samples_note": ""}
    benchmarks = None
    if (run.folder / "benchmark.json").is_file():
        found = read_json(run.folder / "benchmark.json")
        benchmarks = _table(benchmark_table.cells(found), f"Benchmarks. {benchmark_table.notes(found)}")
    return render(
        title=f"{run.folder.resolve().name}: {run.objective.name} on {_base(run)}",
        subtitle=f"Fine-tuned with {run.objective.name} ({run.objective.source})",
        live=f"As of {time.strftime('%Y-%m-%d %H:%M:%S')}: {live}" if live else None,
        refresh=REFRESH,
        finished=run.training.is_done(),
        progress=f"step {steps[-1]['step']}" if steps else None,
        warnings=warnings,
        evaluation=_table(evaluation_table.cells(evaluation), evaluation_table.title(evaluation))
        if evaluation
        else None,
        benchmarks=benchmarks,
        training=training_facts(run, steps),
        runs=list(runs),
        charts=[chart for chart in drawn if chart],
        hints=HINTS,
        negatives=negative_facts(run),
        answers=answers_while_training(run),
        **shown,
        recipe=masked((run.folder / "recipe.yaml").read_text(encoding="utf-8")),
        glossary=GLOSSARY,
        version=__version__,
    )


def answers_while_training(run: Run) -> list[dict]:
    """The contents of samples.jsonl by prompt: `prompt` and `steps`, the newest (step, answer) pairs."""
    path = run.folder / "samples.jsonl"
    if not path.is_file():
        return []
    lines = read_lines(path)[-ANSWERS:]
    if not lines:
        return []
    examples = run.examples("heldout") or run.examples("train")
    return [
        {"prompt": plain_text(example.prompt), "steps": [(line["step"], line["answers"][i]) for line in lines]}
        for i, example in enumerate(examples[: len(lines[0]["answers"])])
    ]


def _table(cells: tuple[list[str], list[list[str]]], caption: str) -> dict:
    return {"header": cells[0], "rows": cells[1], "caption": caption}


def _base(run: Run) -> str:
    return models.public_name(run.source, run.recipe.model)


def training_facts(run: Run, steps: list[dict]) -> dict[str, object]:
    """The facts about training: settings, time and memory."""
    recipe, args = run.recipe, run.args
    adapter = recipe.adapter
    hyperparameters = ", ".join(f"{k} {v}" for k, v in args.hyperparameters().items())
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    speeds = sorted(step["tokens_per_second"] for step in steps if "tokens_per_second" in step)
    memory = [step["peak_memory_gb"] for step in steps if "peak_memory_gb" in step]
    gap, last = (steps[0].get("reference/gap"), steps[-1]) if steps else (None, {})
    seconds = seconds_of(steps)
    facts = {
        "base": _base(run) + (f" @ {run.source.revision}" if run.source.revision else ""),
        "weights": "4 bit (NF4, double quantization)" if recipe.model.load_in_4bit else f"dense, {recipe.model.dtype}",
        "trained": f"LoRA, r {adapter.r}, alpha {adapter.alpha}, dropout {adapter.dropout}, on {adapter.target_modules}"
        if adapter else "all parameters",
        "objective": f"{run.objective.name} ({run.objective.source})",
        "hyper-parameters": hyperparameters or None,
        "negatives per prompt and step": args.negatives_per_step if run.objective.uses_negatives else None,
        "rows": len(run.examples("train")),
        "steps": f"{last['step']}, {batch} prompts per step and device" if last else None,
        "epochs": f"{last['epoch']:g}" if "epoch" in last else None,
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "time": duration(seconds) if seconds else None,
        "hardware": _facts(run.training).get("hardware"),
        "peak memory": f"{max(memory):.2f} GB" if memory else None,
        "speed": f"{speeds[len(speeds) // 2]:,.0f} tokens/s (median step)" if speeds else None,
        "|policy - reference| at step 1": f"{gap:.3g} nats" if gap is not None else None,
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value is not None}


def seconds_of(steps: list[dict]) -> float:
    """Seconds of training over all sessions; every log line has those since its session began."""
    total, last = 0.0, 0.0
    for seconds in (step["seconds"] for step in steps if "seconds" in step):
        if seconds < last:  # resumed
            total += last
        last = seconds
    return total + last


def duration(seconds: float) -> str:
    """Seconds in readable form."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def negative_facts(run: Run) -> dict[str, object]:
    """Where the negatives come from, and the counts of those sampled from the base."""
    if not run.objective.uses_negatives:
        return {"source": f"none: {run.objective.name} uses no negatives"}
    if run.ready_negatives():
        return {"source": "the rows have their own"}
    section = run.recipe.negatives
    sampling = f"temperature {section.temperature:g}, top_p {section.top_p:g}, top_k {section.top_k}, " \
        f"at most {section.max_new_tokens} tokens, seed {section.seed}"  # fmt: skip
    facts: dict[str, object] = {"source": f"sampled from the base, strategy {section.strategy}", "sampling": sampling}
    counts = _facts(run.negatives("train"))
    total = counts.get("negatives")
    for name, value in counts.items():
        share = isinstance(value, int) and isinstance(total, int) and total and name not in ("negatives", "rows")
        facts[name.replace("_", " ")] = f"{value} ({value / total:.0%})" if share else value
    return facts
