"""compare: one recipe run over a grid of settings, on shared negatives and reference -> study.json, study.md, figures.

A study is a YAML file:

    recipe: ../quickstart.yaml            # relative to the study
    output_dir: runs/studies/objectives   # one run folder a combination
    set: {training.num_train_epochs: 2}   # overrides for every run
    grid:
      training.objective: [sft, dft, dft2]
      training.seed: [0, 1, 2]
    spread: training.seed                 # the key whose values are repetitions: mean and spread over them
    paper:                                # a paper's numbers, shown beside the line of that name
      dft: {GSM8K: 79.15}

An axis of the grid is a key with a list of values, or any name with cases that set several keys each:

      method:
        sft: {training.objective: sft}
        simpo: {training.objective: simpo, training.objective_args.beta: 10}
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import shutil
import statistics
import traceback
from contextlib import suppress
from pathlib import Path

from omegaconf import OmegaConf

from lowdft.config.doors import CLOSED, Doors
from lowdft.config.recipe import load_recipe
from lowdft.errors import UserError
from lowdft.files import locked, read_json, replacing, write_error, write_json, write_text
from lowdft.pipeline.artifact import Product
from lowdft.pipeline.context import Run, say
from lowdft.reporting.benchmark_table import of_study
from lowdft.reporting.evaluation_table import SHARES
from lowdft.reporting.study_figures import draw, label
from lowdft.training.metrics import reset_peak_memory

STAGES = ("generate", "score", "train", "evaluate")
KEYS = ("recipe", "output_dir", "set", "grid", "spread", "paper")
MEASURES = {
    "accuracy": "accuracy, %",
    "wins": "rows won, %",
    "margin": "margin, nats",
    "logps/positive": "completions, nats",
    "logps/negative": "negatives, nats",
    "seconds": "training, s",
    "peak_memory_gb": "peak GB",
}


def main(path: str, overrides: list[str], doors: Doors = CLOSED) -> None:
    """Runs what is not yet run, and writes the comparison; one failing run does not stop the others.

    Raises:
        UserError: the study's file is wrong, or a run failed (told at the end, when the others are done).
    """
    study = read_study(Path(path))
    with locked(study["output_dir"]):
        _run_all(study, overrides, doors)


def _run_all(study: dict, overrides: list[str], doors: Doors) -> None:
    folder, failed, results = Path(study["output_dir"]), [], []
    runs = combinations(study)
    for number, (chosen, settings) in enumerate(runs, 1):
        name = folder_name(chosen)
        say(f"[{number}/{len(runs)}] {name}")
        settings = settings | {"output_dir": str(folder / name)}
        try:
            run_one(study["recipe"], as_overrides(settings) + overrides, folder, doors)
        except Exception as error:
            known = isinstance(error, UserError) or write_error(None, error)
            say(f"failed: {error if known else f'{type(error).__name__}: {error}'}")
            if not known:
                write_text(folder / name / "error.txt", traceback.format_exc())
            failed.append(name)
            continue
        results.append({"settings": chosen, **measures_of(folder / name)})
    if results:
        table = tabulate(results, study["spread"], study["paper"])
        write_json(folder / "study.json", {"results": results, "table": table})
        measured = [
            (label(one["settings"], study["spread"]), one["benchmarks"]) for one in results if one["benchmarks"]
        ]
        text = markdown(table, study["spread"]) + (f"\n{of_study(measured)}" if measured else "")
        write_text(folder / "study.md", text)
        drawn = draw(folder, results, table, study["spread"])
        say((folder / "study.md").read_text(encoding="utf-8"))
        say(f"{folder}: {', '.join(['study.md', 'study.json', *drawn])}")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")


def read_study(path: Path) -> dict:
    """The study's keys, checked, with the recipe's path made absolute."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such study")
    study = OmegaConf.to_container(OmegaConf.load(path))
    unknown = set(study) - set(KEYS)
    if unknown:
        raise UserError(f"{path}: {', '.join(sorted(unknown))} is not a key of a study; known are {', '.join(KEYS)}")
    for key in ("recipe", "output_dir", "grid"):
        if key not in study:
            raise UserError(f"{path}: {key} is missing")
    for key, values in study["grid"].items():
        cases = isinstance(values, dict) and all(isinstance(case, dict) for case in values.values())
        if not values or not (isinstance(values, list) or cases):
            raise UserError(f"{path}: grid.{key} is {values!r}; wanted a list of values, or cases with keys and values")
    study["recipe"] = str((path.parent / study["recipe"]).resolve())
    study = {"set": {}, "spread": "training.seed", "paper": {}, **study}
    names = {"base", *(label(chosen, study["spread"]) for chosen, _ in combinations(study))}
    stray = [name for name in study["paper"] if name not in names]
    if stray:
        raise UserError(f"{path}: paper.{stray[0]} is no line of the table; they are {', '.join(sorted(names))}")
    return study


def combinations(study: dict) -> list[tuple[dict, dict]]:
    """Every combination of the grid: what was chosen on each axis, and all the overrides that it makes."""
    axes = [
        [(axis, name, case) for name, case in values.items()]
        if isinstance(values, dict)
        else [(axis, value, {axis: value}) for value in values]
        for axis, values in study["grid"].items()
    ]
    out = []
    for picked in itertools.product(*axes):
        settings = dict(study["set"])
        for _, _, case in picked:
            settings |= case
        out.append(({axis: value for axis, value, _ in picked}, settings))
    return out


def folder_name(chosen: dict) -> str:
    """The run folder of a combination within the study's."""
    return ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in chosen.items())


def as_overrides(settings: dict) -> list[str]:
    """Settings as the overrides of a recipe: `key=value`, the value as YAML reads it."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def run_one(recipe: str, overrides: list[str], study_folder: Path, doors: Doors = CLOSED) -> None:
    """Runs one combination up to its evaluation, with what sibling runs made from the very same things."""
    one = load_recipe(recipe, overrides)
    doors.check(one)
    with locked(one.output_dir):
        run = Run(one)
        run.trust_checkpoint = doors.trust_checkpoint
        run.check()
        for product in (run.negatives("train"), run.negatives("heldout"), run.reference, run.base_evaluation):
            borrow(product, study_folder)
        for stage in STAGES:
            if stage == "train":
                reset_peak_memory()
            importlib.import_module(f"lowdft.pipeline.stages.{stage}").main(run)
        if one.evaluation.benchmarks:
            borrow_benchmarks(run.folder, study_folder)
            importlib.import_module("lowdft.pipeline.stages.benchmark").main(run)


def borrow_benchmarks(folder: Path, study_folder: Path) -> None:
    """Copies the base's results from sibling runs; their names say what they were measured of."""
    for path in study_folder.glob("*/benchmarks/*/base-*.json"):
        target = folder / path.relative_to(path.parents[2])
        if not target.is_file():
            write_text(target, path.read_text(encoding="utf-8"))


def borrow(product: Product, study_folder: Path) -> None:
    """Copies a finished, undamaged product of a sibling run whose manifest matches, where this run has none."""
    if product.manifest.is_file():
        return
    for manifest in sorted(study_folder.glob(f"*/{product.manifest.name}")):
        theirs = Product(manifest.with_name(product.path.name), product.made_from)
        with suppress(UserError):  # made from other things, or damaged
            if theirs.is_done():
                product.begin()  # so that an interrupted copy is made again
                with replacing(product.path) as temporary:
                    shutil.copyfile(theirs.path, temporary)
                product.finish(**theirs.facts())
                return


def measures_of(folder: Path) -> dict:
    """Held-out metrics of the trained model and of the base, cost, and the training's curves."""
    evaluation = read_json(folder / "evaluation.json")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = next(path for name in ("adapter", "model") if (path := folder / f"{name}.manifest.json").is_file())
    cost = {"seconds": read_json(trained)["facts"]["seconds"], "peak_memory_gb": lines[-1].get("peak_memory_gb")}
    curves = {key: [line.get(key) for line in lines] for key in ("logps/positive", "logps/negative", "weights/mean")}
    systems = evaluation["systems"]
    return {
        "rows": evaluation["rows"],
        "after": systems["after"] | cost,
        "base": systems["base"],
        "per_row": evaluation["per_row"]["after"],
        "curves": curves,
        "benchmarks": read_json(folder / "benchmark.json") if (folder / "benchmark.json").is_file() else None,
    }


def tabulate(results: list[dict], spread: str, paper: dict[str, dict]) -> list[dict]:
    """One line a combination without `spread`: [mean, standard deviation] of every measure; the base first.

    `ahead` has, for `SHARES`, [mean, standard error] of the paired difference to the first combination of the grid.
    """
    grouped: dict[str, list[dict]] = {"base": [{"after": results[0]["base"], "per_row": {}}]}
    for result in results:
        grouped.setdefault(label(result["settings"], spread), []).append(result)
    first, table = list(grouped.values())[1], []
    for name, many in grouped.items():
        line: dict = {"name": name, "runs": len(many), "ahead": {}}
        for key in MEASURES:
            values = [one["after"][key] for one in many if one["after"].get(key) is not None]
            if values:
                line[key] = [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]
            if many is not first and all(key in one["per_row"] for one in first + many):
                line["ahead"][key] = paired(*([one["per_row"][key] for one in group] for group in (many, first)))
        table.append(line | {"paper": paper.get(name, {})})
    return table


def paired(ours: list[list[float]], theirs: list[list[float]]) -> list[float | None]:
    """[mean, standard error] of the difference on the same rows, every row's value being its mean over runs."""
    means = [[statistics.mean(row) for row in zip(*runs, strict=True)] for runs in (ours, theirs)]
    differences = [a - b for a, b in zip(*means, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return [statistics.mean(differences), error]


def markdown(table: list[dict], spread: str) -> str:
    """The table, with the spread over `spread` as ± one standard deviation, and the paper's numbers last."""
    keys = [key for key in MEASURES if any(key in line for line in table)]
    ahead = [key for key in keys if any(key in line["ahead"] for line in table)]
    theirs = list(dict.fromkeys(name for line in table for name in line["paper"]))
    header = [MEASURES[key] for key in keys] + [f"{key} ahead, points" for key in ahead]
    header += ["runs", *(f"paper: {name}" for name in theirs)]
    out = [f"| | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    for line in table:
        cells = [_cell(line.get(key), 100 if key in SHARES else 1) for key in keys]
        cells += [_cell(line["ahead"].get(key), 100) for key in ahead]
        cells += [str(line["runs"]), *(str(line["paper"].get(name, "–")) for name in theirs)]
        out.append(f"| {line['name']} | {' | '.join(cells)} |")
    notes = [f"Mean ± standard deviation over {spread}."]
    if ahead:
        notes.append(f"Ahead: difference to {table[1]['name']} on the same rows ± its standard error over rows.")
    return "\n".join([*out, "", " ".join(notes), ""])


def _cell(value: list | None, scale: float) -> str:
    if value is None:
        return "–"
    mean, deviation = value
    return f"{scale * mean:.2f}" + ("" if deviation is None else f" ± {scale * deviation:.2f}")
